"""FFRNet's residuals for each UNet call of one sampling pass.

Several people share an image according to their regions; see `regions.blend_weights`. At every position, the weights
add up to at most 1, so that no part of the UNet receives more than it was trained with.

Hosts announce which image each row of a UNet call belongs to. With this, nothing but the first evaluation of a pass
makes the CPU wait for the GPU. Rows that were not announced are compared by value, for which it has to wait.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.conditioning import Conditioning, ffrnets
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.hints import HINTS, POINTS72
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks import compiled
from facesnap_ext.networks.ffrnet import FFRNet, KeysValues
from facesnap_ext.networks.unet_rows import Constants, Evaluation, Label, Rows, first_copies
from facesnap_ext.regions import blend_weights


class Residuals:
    """The residuals of all people in an image during one sampling pass, blended.

    Attributes:
        constants: tensors of Python values on the UNet's device.
    """

    def __init__(self, people: Sequence[Conditioning]):
        self.people = tuple(people)
        self.constants = Constants()
        self._runners = [_OnePerson(person, self.constants) for person in self.people]
        self._evaluation: int | None = None  # the number of the announced evaluation
        self._weights: dict[Hashable, Tensor] = {}  # see `blend_weights`
        self._row_weights: dict[Hashable, Tensor] = {}  # see `row_weights`

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move every FFRNet that is not on the device yet, or only in part because memory ran out."""
        for network in ffrnets(self.people):
            # the first and last weights to be moved
            ends = (network.conv_in.weight, network.controlnet_mid_block.weight)
            if any(end.device != torch.device(device) or end.dtype != (dtype or end.dtype) for end in ends):
                network.to(device, dtype)

    def begin_evaluation(self) -> None:
        """Announce that the following UNet calls belong to a new evaluation.

        Without this, calls belong to the same evaluation if their timesteps are equal.
        """
        self._evaluation = (self._evaluation or 0) + 1

    def rows(
        self,
        x: Tensor,
        timesteps: Tensor,
        is_cond: Sequence[bool],
        y: Tensor | None = None,
        acting: Sequence[bool] | None = None,
        images: Sequence[int] | None = None,
        announced: bool = False,
    ) -> list[Tensor] | None:
        """Weighted and blended residuals for the rows of one UNet call.

        Only the people active at this time share the image. The weights are the same for conditional and unconditional
        rows: a `cond_only` person is missing from unconditional rows and no one else takes their place there, so that
        classifier-free guidance pushes towards only that person.

        Args:
            x: scaled latents [R, C, h, w].
            timesteps: discrete timesteps [R].
            is_cond: whether each row is conditional.
            y: the rows' pooled text and sizes [R, adm_dim]; only used by weights that were trained with text.
            acting: whether each person is active now; by default all are.
            images: the index in the batch of each row's image; by default, all rows belong to the first image.
            announced: whether the host guarantees, after `begin_evaluation`, that all rows of an image are copies and
                that each row arrives once. Otherwise, rows are compared by value.

        Returns:
            One residual per block from shallow to deep, followed by the middle block's: each [R, …], or [1, …] if all
            rows are for one image. None if no one is active in any of the rows.
        """
        who = tuple([i for i in range(len(self._runners)) if acting is None or acting[i]])
        row_images = tuple(images or [0] * len(x))
        each = {
            position: parts
            for position, i in enumerate(who)
            if (parts := self._runners[i].rows(x, timesteps, is_cond, y, row_images, self._evaluation, announced))
        }
        if not each:
            return None
        first = self.people[who[0]]
        if len(who) == 1 and first.region is None and not first.placements:
            return each[0]
        return [self._blend(who, dict(zip(each, parts)), row_images) for parts in zip(*each.values())]

    def blend_weights(self, who: tuple[int, ...], height: int, width: int, image: int = 0) -> Tensor:
        """The weights of the people active in an image: [people, h, w], or [people, 1, 1] if no one has a region."""
        key = (who, height, width, image if self.per_image(who) else 0)
        if key not in self._weights:
            masks: list[np.ndarray | None] = []
            for place in (self.people[i].in_image(image) for i in who):
                if place is None:
                    masks.append(np.zeros((height, width), np.float32))
                else:
                    masks.append(None if place.region is None else place.region.sample(width, height))
            self._weights[key] = torch.from_numpy(blend_weights(masks))
        return self._weights[key]

    def row_weights(self, who: tuple[int, ...], height: int, width: int, images: Sequence[int], like: Tensor) -> Tensor:
        """`blend_weights` for the rows of a UNet call, with the device and type of `like`: [people, R, 1, h, w], or R
        is 1 if the weights are the same in all images, and h and w are 1 if no one has a region."""
        varied = tuple(images) if self.per_image(who) else ()
        key = (who, height, width, varied, like.device, like.dtype)
        if key not in self._row_weights:
            if varied:
                each = [self.blend_weights(who, height, width, image).expand(-1, height, width) for image in varied]
                weights = torch.stack(each, 1)
            else:
                weights = self.blend_weights(who, height, width)[:, None]
            self._row_weights[key] = weights[:, :, None].to(like)
        return self._row_weights[key]

    def per_image(self, who: Sequence[int]) -> bool:
        """Whether any of these people have different placements in the images of the batch."""
        return any(self.people[i].placements for i in who)

    def _blend(self, who: tuple[int, ...], parts: dict[int, Tensor], images: tuple[int, ...]) -> Tensor:
        """The weighted sum of people's residuals for one block, [R or 1, C, h, w].

        Args:
            parts: residuals by position in `who`.
        """
        like = next(iter(parts.values()))
        height, width = like.shape[2:]
        weights = self.row_weights(who, height, width, images, like)
        first, *others = (part * weights[position] for position, part in parts.items())
        return sum(others, start=first)


class _OnePerson:
    """FFRNet's residuals for one person.

    Without text, a row's residuals depend only on its latent and timestep. All rows of one image therefore share one
    run of FFRNet, regardless of the order, grouping or number of calls in which the host sends them. Rows also share it
    if all inputs of their residuals are equal. These inputs include the pooled text and, if unconditional rows have
    separate tokens, whether the row is unconditional. FFRNet does not run for rows in which the person is not active.

    With an `ffrnet_interval` above 1, most evaluations reuse the residuals of the previous evaluation. An image is
    identified by its position among the conditional or the unconditional rows.
    """

    def __init__(self, person: Conditioning, constants: Constants):
        self.person = person
        self.constants = constants
        self._landmark_features: dict[tuple[int, int, int], Tensor] = {}  # landmark features by latent size and image
        self._null_text: dict[torch.Size, Tensor] = {}  # by latent size
        self._visible: dict[tuple[int, torch.Size], bool] = {}  # by image and latent size; see `_is_visible`
        self._identity: list[KeysValues] = []  # embedded tokens for conditional and, if they differ, unconditional rows
        self._evaluations = 0
        self._current = self._previous = Evaluation(None)

    @torch.no_grad()
    def rows(
        self,
        x: Tensor,
        timesteps: Tensor,
        is_cond: Sequence[bool],
        y: Tensor | None,
        images: Sequence[int],
        evaluation: int | None,
        announced: bool,
    ) -> list[Tensor] | None:
        """Weighted residuals, which are zero in rows without the person; None if there are no other rows. See
        `Residuals.rows`."""
        x = x[:, : self.person.ffrnet.config.in_channels]
        if self.person.text_free:
            y = None
        elif y is None:
            raise ValueError("these weights were trained with text and need the UNet's y")
        cond_only = self.person.strength.cond_only
        acts = [
            (cond or not cond_only) and self._is_visible(image, x.shape[2:]) for cond, image in zip(is_cond, images)
        ]
        if not any(acts):
            return None
        sides_differ = self.person.uncond_tokens is not None or y is not None
        sides = [sides_differ and not cond for cond in is_cond]
        keys: list[Hashable] | None = None
        if announced:  # with text, no rows are copies
            keys = [object() if y is not None else (*label, x.shape[2:]) for label in zip(sides, images)]
        placed = list(images) if self.person.placements else [0] * len(x)
        chosen = [row for row, active in enumerate(acts) if active]
        self._begin_evaluation(float(timesteps[0]) if evaluation is None else evaluation)
        places = iter(self._find_or_run(Rows(x, timesteps, sides, placed, y, keys).take(chosen, self.constants)))
        spread = [next(places) if active else 0 for active in acts]
        parts = [self.constants.select(residual, spread) for residual in self._current.outputs]
        if all(acts):
            return parts
        return [part * self.constants.tensor(acts, x.device, part.dtype)[:, None, None, None] for part in parts]

    def _is_visible(self, image: int, size: torch.Size) -> bool:
        """Whether any part of the person's region is in an image of the pass."""
        key = (image if self.person.placements else 0, size)
        if key not in self._visible:
            place = self.person.in_image(image)
            region = None if place is None else place.region
            levels = [[-(-side // 2**level) for side in size] for level in range(len(self.person.ffrnet.config.widths))]
            self._visible[key] = place is not None and (
                region is None or any(region.sample(width, height).any() for height, width in levels)
            )
        return self._visible[key]

    def _begin_evaluation(self, evaluation: float) -> None:
        if self._current.name == evaluation:
            return
        if self.person.strength.ffrnet_interval > 1:
            self._previous = self._current
        self._current = Evaluation(evaluation)
        self._evaluations += 1

    def _find_or_run(self, rows: Rows) -> list[int]:
        """The position of each row in the current evaluation; FFRNet runs for the rows that are not stored yet."""
        places = self._current.find(rows)
        if None in places and not self._current.has_room(rows.x):
            self._current.forget()
            places = self._current.find(rows)
        if None not in places:
            return [place for place in places if place is not None]
        first = first_copies(rows)
        new = [row for row, place in enumerate(places) if place is None and first[row] == row]
        labels = self._current.labels_for([rows.sides[row] for row in new])
        new_rows = rows.take(new, self.constants)
        outputs = self._reused(labels, rows.x.shape[2:])
        if outputs is None:
            outputs = self._run(new_rows)
        offset = len(self._current.labels)
        self._current.add(labels, new_rows, outputs)
        return [offset + new.index(first[row]) if place is None else place for row, place in enumerate(places)]

    def _reused(self, labels: list[Label], size: torch.Size) -> list[Tensor] | None:
        """The previous evaluation's residuals; None if FFRNet must run in this evaluation."""
        if (self._evaluations - 1) % self.person.strength.ffrnet_interval == 0:
            return None
        return self._previous.outputs_of(labels, size, self.constants)

    def _run(self, rows: Rows) -> list[Tensor]:
        """Weighted residuals."""
        x = rows.x
        with _without_autocast(x.device.type):
            identity = self._embedded_tokens(x.device)
            if self.person.uncond_tokens is not None:
                sides = [int(side) for side in rows.sides]
                select = self.constants.select
                identity = [(select(keys, sides), select(values, sides)) for keys, values in identity]
            run = compiled.run if self.person.compile else FFRNet.__call__
            if len(set(rows.images)) > 1:
                features = torch.cat([self._embedded_landmarks(x, image) for image in rows.images])
            else:
                features = self._embedded_landmarks(x, rows.images[0])
            y = self._embedded_null_text(x) if rows.y is None else rows.y
            residuals = run(self.person.ffrnet, x, rows.timesteps, identity, features, y)
        if self._evaluations == 1:  # a check takes time, because the GPU is waited for
            self._check_finite(x, residuals)
        strength = self.person.strength
        weights = [strength.weight * weight for weight in strength.block_weights or [1.0] * len(residuals)]
        return [residual if weight == 1 else residual * weight for residual, weight in zip(residuals, weights)]

    def _check_finite(self, x: Tensor, residuals: Sequence[Tensor]) -> None:
        """Check the residuals of a latent that is finite itself; without this, the host blames the checkpoint.

        Raises:
            FaceSnapError: some are not finite.
        """
        finite = torch.stack([residual.isfinite().all() for residual in residuals]).all()
        if bool(~finite & x.isfinite().all()):
            raise FaceSnapError(
                f"FFRNet of {self.person.name} computes values that are not finite in {str(x.dtype)[6:]}, so the file "
                "is damaged or needs a wider number type; download or create it again."
            )

    def _embedded_tokens(self, device: torch.device) -> list[KeysValues]:
        if not self._identity:
            both = [tokens for tokens in (self.person.tokens, self.person.uncond_tokens) if tokens is not None]
            self._identity = self.person.ffrnet.embed_tokens(torch.cat(both).to(device))
        return self._identity

    def _embedded_null_text(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        if size not in self._null_text:
            scale = self.person.ffrnet.config.pixels_per_latent
            self._null_text[size] = self.person.ffrnet.null_text(scale * size[0], scale * size[1], x.device)
        return self._null_text[size]

    def _embedded_landmarks(self, x: Tensor, image: int = 0) -> Tensor:
        key = (x.shape[2], x.shape[3], image)
        if key not in self._landmark_features:
            scale = self.person.ffrnet.config.pixels_per_latent
            place = self.person.in_image(image)
            landmarks = None if place is None else place.landmarks
            drawn = landmark_image(landmarks, scale * key[1], scale * key[0], self.person.hint, x.device)
            self._landmark_features[key] = self.person.ffrnet.embed_landmarks(drawn)
        return self._landmark_features[key]


def landmark_image(
    landmarks: Landmarks | None,
    width: int,
    height: int,
    hint: str = POINTS72,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw FFRNet's control image: [1, 3, height, width] float32 in 0…1 on black, all black without landmarks."""
    if landmarks is None:
        return torch.zeros(1, 3, height, width, device=device)
    # transfer 8-bit values, which are a quarter of the data
    image = torch.from_numpy(HINTS[hint](landmarks, width, height)).to(device)
    return image.permute(2, 0, 1)[None].float() / 255


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Use the network's own dtype even inside a host's autocast; some devices do not support autocast at all."""
    return torch.autocast(device_type, enabled=False) if device_type in ("cuda", "cpu", "xpu") else nullcontext()
