"""FFRNet's residuals for each UNet call of one sampling pass.

Several people share an image according to their regions; see `regions.blend_weights`. At every position, the weights
add up to at most 1, so that no part of the UNet receives more than it was trained with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
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
from facesnap_ext.regions import blend_weights

MAX_ROWS = 8  # maximum number of rows kept if one evaluation arrives in many calls; each takes 60 MB at 1024²

Label = tuple[bool, int]
"""Whether a row counts as unconditional (if that makes a difference), and its index among the rows of this kind."""


class Residuals:
    """The residuals of all people in an image during one sampling pass, blended."""

    def __init__(self, people: Sequence[Conditioning]):
        self.people = tuple(people)
        self._runners = [_OnePerson(person) for person in self.people]
        # by the active people, the size of a residual, and the image
        self._weights: dict[tuple[tuple[int, ...], int, int, int], Tensor] = {}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move every FFRNet that is not on the device yet, or only in part because memory ran out."""
        for network in ffrnets(self.people):
            # the first and last weights to be moved
            ends = (network.conv_in.weight, network.controlnet_mid_block.weight)
            if any(end.device != torch.device(device) or end.dtype != (dtype or end.dtype) for end in ends):
                network.to(device, dtype)

    def rows(
        self,
        x: Tensor,
        timesteps: Tensor,
        is_cond: Sequence[bool],
        y: Tensor | None = None,
        acting: Sequence[bool] | None = None,
        images: Sequence[int] | None = None,
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
            images: the index in the batch of each row's image, for people whose placements differ; by default, all rows
                belong to the first image.

        Returns:
            One residual per block from shallow to deep, followed by the middle block's: each [R, …], or [1, …] if all
            rows are for one image. None if no one is active.
        """
        who = tuple([i for i in range(len(self._runners)) if acting is None or acting[i]])
        if not who:
            return None
        row_images = tuple(images or [0] * len(x))
        each = [self._runners[i].rows(x, timesteps, is_cond, y, row_images) for i in who]
        first = self.people[who[0]]
        if len(who) == 1 and first.region is None and not first.placements:
            return each[0]
        return [self._blend(who, parts, row_images) for parts in zip(*each)]

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

    def per_image(self, who: Sequence[int]) -> bool:
        """Whether any of these people have different placements in the images of the batch."""
        return any(self.people[i].placements for i in who)

    def _blend(self, who: tuple[int, ...], parts: Sequence[Tensor], images: tuple[int, ...]) -> Tensor:
        """The weighted sum of all people's residuals for one block, [R or 1, C, h, w]."""
        height, width = parts[0].shape[2:]
        if self.per_image(who):
            weights = torch.stack(
                [self.blend_weights(who, height, width, image).expand(-1, height, width) for image in images], 1
            )[:, :, None].to(parts[0])  # [people, R, 1, h, w]
        else:
            weights = self.blend_weights(who, height, width).to(parts[0])
        first, *others = (part * weight for part, weight in zip(parts, weights))
        return sum(others, start=first)


class _OnePerson:
    """FFRNet's residuals for one person.

    Without text, a row's residuals depend only on its latent and timestep. All rows of one image therefore share one
    run of FFRNet, regardless of the order, grouping or number of calls in which the host sends them. Rows count as
    equal if all inputs of their residuals are equal. These inputs include the pooled text and, if unconditional rows
    have separate tokens, whether the row is unconditional.

    With an `ffrnet_interval` above 1, most evaluations reuse the residuals of the previous evaluation. An image is
    identified by its position among the conditional or the unconditional rows.
    """

    def __init__(self, person: Conditioning):
        self.person = person
        self._landmark_features: dict[tuple[int, int, int], Tensor] = {}  # landmark features by latent size and image
        self._identity: list[KeysValues] = []  # embedded tokens for conditional and, if they differ, unconditional rows
        self._evaluations = 0
        self._current = self._previous = _Evaluation(math.nan)

    @torch.no_grad()
    def rows(
        self,
        x: Tensor,
        timesteps: Tensor,
        is_cond: Sequence[bool],
        y: Tensor | None = None,
        images: Sequence[int] = (),
    ) -> list[Tensor]:
        """Weighted residuals; see `Residuals.rows`."""
        x = x[:, : self.person.ffrnet.config.in_channels]
        if self.person.text_free:
            y = None
        elif y is None:
            raise ValueError("these weights were trained with text and need the UNet's y")
        sides_differ = self.person.uncond_tokens is not None or y is not None
        sides = [sides_differ and not cond for cond in is_cond]
        self._begin_evaluation(float(timesteps[0]))
        images = images if self.person.placements else [0] * len(x)
        places = self._find_or_run(x, timesteps, sides, y, images)
        outputs = self._current.outputs
        if self.person.strength.cond_only and not all(is_cond):
            mask = torch.tensor(is_cond, dtype=x.dtype, device=x.device)[:, None, None, None]
            return [residual[places] * mask.to(residual.dtype) for residual in outputs]
        if len(self._current.labels) == 1:
            return outputs  # there is only one image, and its residuals are broadcast over the rows
        return [residual[places] for residual in outputs]

    def _begin_evaluation(self, timestep: float) -> None:
        if self._current.timestep == timestep:
            return
        if self.person.strength.ffrnet_interval > 1:
            self._previous = self._current
        self._current = _Evaluation(timestep)
        self._evaluations += 1

    def _find_or_run(
        self, x: Tensor, timesteps: Tensor, sides: Sequence[bool], y: Tensor | None, images: Sequence[int]
    ) -> list[int]:
        """The position of each row in the current evaluation; FFRNet runs for the rows that are not stored yet."""
        inputs = _comparable(x, timesteps, sides, y, images)
        places = self._current.find(inputs)
        if None in places and not self._current.has_room(inputs):
            self._current.forget()
            places = self._current.find(inputs)
        if None not in places:
            return [place for place in places if place is not None]
        # a row that contains NaN equals no row, not even itself
        first = [row if place is None else place for row, place in enumerate(_find(inputs, inputs))]
        new = [row for row, place in enumerate(places) if place is None and first[row] == row]
        labels = self._current.labels_for([sides[row] for row in new])
        outputs = self._reused(labels, x.shape[2:])
        if outputs is None:
            new_y = None if y is None else y[new]
            new_sides, new_images = [sides[row] for row in new], [images[row] for row in new]
            outputs = self._run(x[new], timesteps[new], new_sides, new_y, new_images)
        offset = len(self._current.labels)
        self._current.add(labels, inputs[new], outputs)
        return [offset + new.index(first[row]) if place is None else place for row, place in enumerate(places)]

    def _reused(self, labels: list[Label], size: torch.Size) -> list[Tensor] | None:
        """The previous evaluation's residuals; None if FFRNet must run in this evaluation."""
        if (self._evaluations - 1) % self.person.strength.ffrnet_interval == 0:
            return None
        return self._previous.outputs_of(labels, size)

    def _run(
        self, x: Tensor, timesteps: Tensor, sides: Sequence[bool], y: Tensor | None, images: Sequence[int]
    ) -> list[Tensor]:
        """Weighted residuals; `sides` is True for rows that get the unconditional tokens."""
        with _without_autocast(x.device.type):
            identity = self._embedded_tokens(x.device)
            if self.person.uncond_tokens is not None:
                rows = [int(side) for side in sides]
                identity = [(keys[rows], values[rows]) for keys, values in identity]
            run = compiled.run if self.person.compile else FFRNet.__call__
            if len(set(images)) > 1:
                features = torch.cat([self._embedded_landmarks(x, image) for image in images])
            else:
                features = self._embedded_landmarks(x, images[0])
            residuals = run(self.person.ffrnet, x, timesteps, identity, features, y)
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
        if not all(bool(residual.isfinite().all()) for residual in residuals) and bool(x.isfinite().all()):
            raise FaceSnapError(
                f"FFRNet of {self.person.name} computes values that are not finite in {str(x.dtype)[6:]}, so the file "
                "is damaged or needs a wider number type; download or create it again."
            )

    def _embedded_tokens(self, device: torch.device) -> list[KeysValues]:
        if not self._identity:
            both = [tokens for tokens in (self.person.tokens, self.person.uncond_tokens) if tokens is not None]
            self._identity = self.person.ffrnet.embed_tokens(torch.cat(both).to(device))
        return self._identity

    def _embedded_landmarks(self, x: Tensor, image: int = 0) -> Tensor:
        key = (x.shape[2], x.shape[3], image)
        if key not in self._landmark_features:
            scale = self.person.ffrnet.config.pixels_per_latent
            place = self.person.in_image(image)
            landmarks = None if place is None else place.landmarks
            drawn = landmark_image(landmarks, scale * key[1], scale * key[0], self.person.hint, x.device)
            self._landmark_features[key] = self.person.ffrnet.embed_landmarks(drawn)
        return self._landmark_features[key]


class _Evaluation:
    """The distinct rows of one UNet evaluation, which a host may send in several calls, and their residuals."""

    def __init__(self, timestep: float):
        self.timestep = timestep
        self.labels: list[Label] = []
        self.outputs: list[Tensor] = []  # [K, …] each
        self._inputs: Tensor | None = None  # [K, F]
        self._seen = Counter[bool]()  # how many unconditional and other rows have been stored

    def find(self, inputs: Tensor) -> list[int | None]:
        """The index of each row of a call among the stored rows."""
        return [None] * len(inputs) if self._inputs is None else _find(inputs, self._inputs)

    def labels_for(self, sides: Sequence[bool]) -> list[Label]:
        """Labels for rows that follow the stored ones."""
        seen = self._seen.copy()
        labels = []
        for side in sides:
            labels.append((side, seen[side]))
            seen[side] += 1
        return labels

    def outputs_of(self, labels: list[Label], size: torch.Size) -> list[Tensor] | None:
        """The residuals of rows by their labels; None if some are not stored or the latents had a different size."""
        if not set(labels) <= set(self.labels) or self.outputs[0].shape[2:] != size:
            return None
        if labels == self.labels:
            return self.outputs
        rows = [self.labels.index(label) for label in labels]
        return [output[rows] for output in self.outputs]

    def add(self, labels: list[Label], inputs: Tensor, outputs: list[Tensor]) -> None:
        if self._inputs is None:
            self.labels, self._inputs, self.outputs = labels, inputs, outputs
        else:
            self.labels = self.labels + labels
            self._inputs = torch.cat([self._inputs, inputs])
            self.outputs = [torch.cat(pair) for pair in zip(self.outputs, outputs)]
        self._seen.update(side for side, _ in labels)

    def has_room(self, inputs: Tensor) -> bool:
        """Whether rows can be added: the size must match and the number is limited, because tiles arrive in many
        calls."""
        return self._inputs is None or (inputs.shape[1] == self._inputs.shape[1] and len(self.labels) < MAX_ROWS)

    def forget(self) -> None:
        """Drop the rows but keep their count, so that later rows get new labels."""
        self.labels, self._inputs, self.outputs = [], None, []


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


def _comparable(x: Tensor, timesteps: Tensor, sides: Sequence[bool], y: Tensor | None, images: Sequence[int]) -> Tensor:
    """All inputs of each row's residuals, concatenated: [R, F]."""
    side, image = (x.new_tensor(values, dtype=torch.float32)[:, None] for values in (sides, images))
    parts = [x.flatten(1).float(), timesteps.float()[:, None], side, image]
    return torch.cat([*parts, *([] if y is None else [y.float()])], 1)


def _find(rows: Tensor, known: Tensor) -> list[int | None]:
    """For each row [R, F] the index of the first equal row in `known` [K, F], or None."""
    if rows.shape[1] != known.shape[1] or rows.device != known.device:
        return [None] * len(rows)
    equal = torch.stack([(known == row).all(dim=1) for row in rows]).tolist()
    return [row.index(True) if True in row else None for row in equal]


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Use the network's own dtype even inside a host's autocast; some devices do not support autocast at all."""
    return torch.autocast(device_type, enabled=False) if device_type in ("cuda", "cpu", "xpu") else nullcontext()
