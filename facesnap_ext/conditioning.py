"""The conditioning of one image: one `Conditioning` per person, created by the engine and used by the hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.hints import POINTS72
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks.ffrnet import FFRNet, KeysValues
from facesnap_ext.regions import Region
from facesnap_ext.settings.strength import Strength


@dataclass(frozen=True)
class Placement:
    """A person's landmarks and region in one image of a batch; see `Conditioning`."""

    landmarks: Landmarks | None
    region: Region | None


@dataclass(frozen=True)
class Conditioning:
    """One person in one pose, ready for sampling.

    Attributes:
        tokens: identity tokens [1, 16, context_dim].
        landmarks: the points that are drawn as the control image; None conditions on the identity only.
        text_free: whether FFRNet was trained without text. If not, it receives the rows' own pooled text `y`.
        hint: the kind of landmark image, a key of `hints.HINTS`.
        uncond_tokens: identity tokens of the unconditional rows, like `tokens`; None uses `tokens` for all rows.
        name: the weight file's name, for messages.
        region: where the person is applied in the output image; None means everywhere.
        placements: the person's placement in each image of a batch that starts from different init images, and None for
            images without the person; empty if `landmarks` and `region` apply to all images.
        adapter: returns the keys and values that `networks.adapter.Adapter` computes; None without an adapter.
        compile: run FFRNet through torch.compile; see `networks.compiled`.

    Raises:
        FaceSnapError: the number of block weights differs from FFRNet's number of residuals.
    """

    ffrnet: FFRNet
    tokens: Tensor
    landmarks: Landmarks | None
    strength: Strength = field(default_factory=Strength)
    text_free: bool = True
    hint: str = POINTS72
    uncond_tokens: Tensor | None = None
    name: str = "FaceSnap"
    region: Region | None = None
    adapter: Callable[[], tuple[KeysValues, ...]] | None = None
    compile: bool = False
    placements: tuple[Placement | None, ...] = ()

    def __post_init__(self) -> None:
        residuals = len(self.ffrnet.config.skip_widths) + 1
        weights = len(self.strength.block_weights)
        if weights not in (0, residuals):
            raise FaceSnapError(
                f"{self.name} has {residuals} residuals, but the number of block weights is {weights}; enter "
                f"{residuals} block weights or none."
            )

    def in_image(self, image: int) -> Placement | None:
        """The person's placement in an image of the batch; None if the person is not in it."""
        if not self.placements:
            return Placement(self.landmarks, self.region)
        return self.placements[image % len(self.placements)]

    @property
    def has_adapter(self) -> bool:
        """Whether the adapter adds attention to the UNet."""
        return self.adapter is not None and self.strength.adapter_weight > 0


def ffrnets(people: Sequence[Conditioning]) -> list[FFRNet]:
    """The distinct FFRNets of several people; people with the same weight file share one."""
    return list({id(one.ffrnet): one.ffrnet for one in people}.values())
