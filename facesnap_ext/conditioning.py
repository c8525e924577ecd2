"""What one picture is guided by, and the residuals that FFRNet makes of it for each call of a UNet.

Several people in one picture share it out by their regions, see `regions.shares`: in each place and on each residual
they add up to one person at most, so that no part of the UNet gets more than it was trained with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.hints import HINTS, POINTS72
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks import compiled
from facesnap_ext.networks.ffrnet import FFRNet, KeysValues
from facesnap_ext.regions import Region, blend_weights

ROWS_KEPT = 8  # of one evaluation that comes in many calls; at 1024² each takes 60 MB


@dataclass(frozen=True)
class Conditioning:
    """A person and a pose, ready for sampling; made by the engine, used by the hosts."""

    ffrnet: FFRNet
    tokens: Tensor  # identity tokens [1, 16, context_dim]
    landmarks: Landmarks | None  # None: a black drawing, guidance by identity alone
    weight: float = 1.0
    start: float = 0.0  # fraction of sampling at which it begins
    end: float = 1.0  # and ends
    every: int = 1  # FFRNet runs in each so many-th evaluation of the UNet; those between take its residuals again
    cond_only: bool = False  # leave the unconditional rows alone
    text_free: bool = True  # False: the weights were trained with text and get the rows' own `y`
    hint: str = POINTS72  # how the landmarks are drawn, of `HINTS`
    uncond_tokens: Tensor | None = None  # of the unconditional rows, as `tokens`; None: the same
    name: str = "FaceSnap"  # of the weight file, for messages
    blocks: tuple[float, ...] = ()  # of each residual, from the shallowest skip to the middle; none: all 1
    hires: str = "both"  # the passes in which it acts: "first", "second" (hires fix) or "both"
    region: Region | None = None  # where it acts in the output picture; None: everywhere
    adapter: Callable[[], tuple[KeysValues, ...]] | None = None  # gives what `adapter.Adapter` makes for the UNet
    adapter_weight: float = 0.0  # of the adapter by itself, `weight` does not count
    compile: bool = False  # run FFRNet through torch.compile, see `compiled`

    def __post_init__(self) -> None:
        residuals = len(self.ffrnet.config.skip_widths) + 1
        if len(self.blocks) not in (0, residuals):
            raise FaceSnapError(
                f"{self.name} gives {residuals} residuals and there are {len(self.blocks)} block weights; "
                f"give {residuals} or none."
            )

    @property
    def has_adapter(self) -> bool:
        """Whether attention is to be added to the UNet."""
        return self.adapter is not None and self.adapter_weight > 0

    def acts_at(self, progress: float) -> bool:
        """Whether it acts at this fraction of sampling, `start <= progress < end`; an end of 1 has no end, since
        samplers with several UNet calls a step run past their own count."""
        return self.start <= progress and (progress < self.end or self.end >= 1)

    def acts_in(self, second_pass: bool) -> bool:
        """Whether it acts in this pass: hires fix's second one, or the only or first one."""
        return self.hires in ("both", "second" if second_pass else "first")


class Residuals:
    """The residuals of all people of a picture during one sampling pass, blended."""

    def __init__(self, conditionings: Sequence[Conditioning]):
        self.conditionings = tuple(conditionings)
        self._people = [_OnePerson(conditioning) for conditioning in self.conditionings]
        self._blend_weights: dict[tuple[tuple[int, ...], int, int], Tensor] = {}  # by who acts and a residual's size

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move every FFRNet; one that is there already is not gone through, one that ran out of memory halfway is."""
        for network in networks(self.conditionings):
            ends = (network.conv_in.weight, network.controlnet_mid_block.weight)  # moved first, and last
            if any(at.device != torch.device(device) or at.dtype != (dtype or at.dtype) for at in ends):
                network.to(device, dtype)

    def rows(
        self,
        x: Tensor,
        timesteps: Tensor,
        is_cond: Sequence[bool],
        y: Tensor | None = None,
        acting: Sequence[bool] | None = None,
    ) -> list[Tensor] | None:
        """Weighted and blended residuals for the rows of one UNet call.

        The picture is shared out among those who act at the time: who has ended, or not begun, leaves their place to
        the others. Which side a row is of changes no share: a `cond_only` person is absent from unconditional rows
        and nobody else takes their place there, so that classifier-free guidance pushes towards them alone.

        Args:
            x: scaled latents [R, C, h, w]. timesteps: discrete [R].
            is_cond: for each row, whether it is of the conditional side.
            y: the rows' pooled text and sizes [R, adm_dim]; used by weights trained with text only.
            acting: for each guidance, whether it acts now; by default all do.

        Returns:
            From shallow to deep, the middle's last. Each is [R, …], or [1, …] where one image fills all rows. None if
            nobody acts.
        """
        who = tuple(i for i in range(len(self._people)) if acting is None or acting[i])
        if not who:
            return None
        each = [self._people[i].rows(x, timesteps, is_cond, y) for i in who]
        if len(who) == 1 and self.conditionings[who[0]].region is None:
            return each[0]
        return [self._blend(who, parts) for parts in zip(*each)]

    def blend_weights(self, who: tuple[int, ...], height: int, width: int) -> Tensor:
        """How those who act share out the picture: [people, h, w], or [people, 1, 1] where nobody has a region."""
        key = (who, height, width)
        if key not in self._blend_weights:
            regions = [self.conditionings[i].region for i in who]
            masks = blend_weights([None if region is None else region.mask(width, height) for region in regions])
            self._blend_weights[key] = torch.from_numpy(masks)
        return self._blend_weights[key]

    def _blend(self, who: tuple[int, ...], parts: Sequence[Tensor]) -> Tensor:
        """Sum of one residual of each person [R or 1, C, h, w], times their shares."""
        each = self.blend_weights(who, *parts[0].shape[2:]).to(parts[0])
        return sum(part * share for part, share in zip(parts, each))


class _OnePerson:
    """FFRNet's residuals of one person.

    Without text, the residuals of a row depend on nothing but its latent and timestep, so all rows of an image share
    one run, in whichever order, grouping or number of calls a host sends them: FFRNet runs on the distinct rows of an
    evaluation alone. Rows are told apart by all that they depend on: the pooled text, and the side where the sides have
    tokens of their own.

    With `Guidance.every` above 1 most evaluations take the residuals of the one before: each image its own, which is
    known by its place among the images of its side.
    """

    def __init__(self, conditioning: Conditioning):
        self.conditioning = conditioning
        self._features: dict[tuple[int, int], Tensor] = {}  # embedded drawings by latent size
        self._identity: list[KeysValues] = []  # embedded tokens, of the conditional side and, if any, the other
        self._evaluations = 0
        self._now = self._before = _Evaluation(math.nan)

    @torch.no_grad()
    def rows(self, x: Tensor, timesteps: Tensor, is_cond: Sequence[bool], y: Tensor | None = None) -> list[Tensor]:
        """Weighted residuals; see `Residuals.rows`."""
        x = x[:, : self.conditioning.ffrnet.config.in_channels]
        if self.conditioning.text_free:
            y = None
        elif y is None:
            raise ValueError("these weights were trained with text and need the UNet's y")
        differ = self.conditioning.uncond_tokens is not None or y is not None
        sides = [differ and not cond for cond in is_cond]
        inputs = [x.flatten(1).float(), timesteps.float()[:, None], x.new_tensor(sides, dtype=torch.float32)[:, None]]
        inputs = torch.cat([*inputs, *([] if y is None else [y.float()])], 1)

        if self._now.timestep != (timestep := float(timesteps[0])):
            if self.conditioning.every > 1:
                self._before = self._now
            self._now = _Evaluation(timestep)
            self._evaluations += 1
        now = self._now
        place = now.places(inputs)
        if None in place:
            if not now.has_room(inputs):
                now.forget()
                place = now.places(inputs)
            # a row that is not a number equals none, not even itself
            first = [row if found is None else found for row, found in enumerate(_places(inputs, inputs))]
            new = [row for row, known in enumerate(place) if known is None and first[row] == row]
            new_sides = [sides[row] for row in new]
            labels = now.labels_of(new_sides)
            outputs = None
            if (self._evaluations - 1) % self.conditioning.every:
                outputs = self._before.outputs_of(labels, x.shape[2:])
            if outputs is None:
                outputs = self._run(x[new], timesteps[new], new_sides, None if y is None else y[new])
            there = len(now.labels)
            now.add(labels, inputs[new], outputs)
            place = [there + new.index(first[row]) if known is None else known for row, known in enumerate(place)]

        if self.conditioning.cond_only and not all(is_cond):
            mask = torch.tensor(is_cond, dtype=x.dtype, device=x.device)[:, None, None, None]
            return [residual[place] * mask.to(residual.dtype) for residual in now.outputs]
        if len(now.labels) == 1:
            return now.outputs  # one image: its residuals broadcast over the rows
        return [residual[place] for residual in now.outputs]

    def _run(self, x: Tensor, timesteps: Tensor, sides: Sequence[bool], y: Tensor | None) -> list[Tensor]:
        """Weighted residuals of rows; `sides` is True for those that get the unconditional side's own tokens."""
        with _own_type(x.device.type):
            identity = self._embedded_tokens(x.device)
            if self.conditioning.uncond_tokens is not None:
                rows = [int(side) for side in sides]
                identity = [(keys[rows], values[rows]) for keys, values in identity]
            run = compiled.run if self.conditioning.compile else FFRNet.__call__
            residuals = run(self.conditioning.ffrnet, x, timesteps, identity, self._landmark_features(x), y)
        weights = [self.conditioning.weight * block for block in self.conditioning.blocks or [1.0] * len(residuals)]
        return [residual if weight == 1 else residual * weight for residual, weight in zip(residuals, weights)]

    def _embedded_tokens(self, device: torch.device) -> list[KeysValues]:
        if not self._identity:
            both = [t for t in (self.conditioning.tokens, self.conditioning.uncond_tokens) if t is not None]
            self._identity = self.conditioning.ffrnet.embed_tokens(torch.cat(both).to(device))
        return self._identity

    def _landmark_features(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        if size not in self._features:
            scale = self.conditioning.ffrnet.config.picture_scale
            picture = landmark_picture(
                self.conditioning.landmarks, scale * size[1], scale * size[0], self.conditioning.hint, x.device
            )
            self._features[size] = self.conditioning.ffrnet.embed_landmarks(picture)
        return self._features[size]


def _own_type(device_type: str) -> AbstractContextManager:
    """Inside it the network's own type decides, also within a host's autocast; other devices refuse even to switch
    it off."""
    return torch.autocast(device_type, enabled=False) if device_type in ("cuda", "cpu", "xpu") else nullcontext()


def networks(conditionings: Sequence[Conditioning]) -> list[FFRNet]:
    """The FFRNets of several people, each once: those of one weight file have one in common."""
    return list({id(conditioning.ffrnet): conditioning.ffrnet for conditioning in conditionings}.values())


def landmark_picture(
    landmarks: Landmarks | None,
    width: int,
    height: int,
    hint: str = POINTS72,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw landmarks as FFRNet sees them: [1, 3, height, width] float32 in 0…1 on black."""
    if landmarks is None:
        return torch.zeros(1, 3, height, width, device=device)
    drawn = torch.from_numpy(HINTS[hint](landmarks, width, height)).to(device)  # a quarter of the bytes in 8 bits
    return drawn.permute(2, 0, 1)[None].float() / 255


class _Evaluation:
    """The distinct rows of one evaluation of the UNet, which a host may send in several calls, and their residuals.

    labels: of each row its side, and its number among the rows of that side.
    """

    def __init__(self, timestep: float):
        self.timestep = timestep
        self.labels: list[tuple[bool, int]] = []
        self.outputs: list[Tensor] = []  # [K, …] each
        self._inputs: Tensor | None = None  # [K, F]
        self._seen = Counter[bool]()  # rows of each side

    def places(self, inputs: Tensor) -> list[int | None]:
        """Where each row of a call is among those here."""
        return [None] * len(inputs) if self._inputs is None else _places(inputs, self._inputs)

    def labels_of(self, sides: Sequence[bool]) -> list[tuple[bool, int]]:
        """Labels of rows that come after those here."""
        seen = self._seen.copy()
        labels = []
        for side in sides:
            labels.append((side, seen[side]))
            seen[side] += 1
        return labels

    def outputs_of(self, labels: list[tuple[bool, int]], size: torch.Size) -> list[Tensor] | None:
        """Residuals of rows by their labels; None where some are not here, or latents were of another size."""
        if not set(labels) <= set(self.labels) or self.outputs[0].shape[2:] != size:
            return None
        if labels == self.labels:
            return self.outputs
        rows = [self.labels.index(label) for label in labels]
        return [output[rows] for output in self.outputs]

    def add(self, labels: list[tuple[bool, int]], inputs: Tensor, outputs: list[Tensor]) -> None:
        if self._inputs is None:
            self.labels, self._inputs, self.outputs = labels, inputs, outputs
        else:
            self.labels = self.labels + labels
            self._inputs = torch.cat([self._inputs, inputs])
            self.outputs = [torch.cat(pair) for pair in zip(self.outputs, outputs)]
        self._seen.update(side for side, _ in labels)

    def has_room(self, inputs: Tensor) -> bool:
        """Whether rows may join those here: not those of another size, nor many in many calls, as tiles come."""
        return self._inputs is None or (inputs.shape[1] == self._inputs.shape[1] and len(self.labels) < ROWS_KEPT)

    def forget(self) -> None:
        """Forget the rows, but for how many they were: those to come get other labels."""
        self.labels, self._inputs, self.outputs = [], None, []


def _places(rows: Tensor, known: Tensor) -> list[int | None]:
    """For each row [R, F] the index of the first equal one in `known` [K, F], or None."""
    if rows.shape[1] != known.shape[1] or rows.device != known.device:
        return [None] * len(rows)
    equal = torch.stack([(known == row).all(dim=1) for row in rows]).tolist()
    return [found.index(True) if True in found else None for found in equal]
