"""ConsistentID: tokens of facial parts beside those of the overall face, and attention that is localised to the parts.

Sources: Huang et al., "ConsistentID" (2024), section 3, and github.com/JackAILab/ConsistentID: `FacialEncoder` of
`attention.py`, `ProjPlusModel` and `BalancedL1Loss` of `functions.py`. The parts come from the 72 points instead of a
face parser. Captions here do not name facial parts, so their tokens have separate keys and values instead of being
fused into words of the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from facesnap_ext.identity.clip import ImageEncoder, preprocess
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_lab.rivals.attention import Attended, Injection, adapter_for, keys_values
from facesnap_lab.rivals.ip_adapter import FaceProjection, Resampler, clip_tokens, direction, resampler_config
from facesnap_lab.rivals.method import Features, References, Rival, Text, UNetCall
from facesnap_lab.rivals.photomaker import FuseModule

PARTS: dict[str, tuple[tuple[int, ...], ...]] = {  # outlines, as indices into the 72 points
    "face": ((*range(17), *range(26, 16, -1)),),
    "eyes": (tuple(range(36, 44)), tuple(range(44, 52))),
    "nose": ((27, *range(31, 36)),),
    "mouth": (tuple(range(52, 64)),),
}
FACE_TOKENS = 4
CROP_SCALE = 1.3  # size of a part's crop, relative to the box of its points
LOCALISATION = 0.01  # weight of the loss


@dataclass(frozen=True)
class ConsistentIDConfig:
    """Sizes. adapter: of the UNet's cross-attentions."""

    id_dim: int
    clip_dim: int
    adapter: AdapterConfig


class FacePlusProjection(nn.Module):
    """Tokens of the overall face, as in IP-Adapter FaceID Plus: the embedding's tokens attend to the CLIP tokens."""

    def __init__(self, config: ConsistentIDConfig):
        super().__init__()
        dim = config.adapter.context_dim
        sizes = resampler_config(config.clip_dim, dim, queries=0)
        self.face = FaceProjection(config.id_dim, FACE_TOKENS, dim)
        self.perceiver = Resampler(replace(sizes, width=dim, feedforward=4 * dim, heads=max(1, dim // 64)))

    def forward(self, embeddings: Tensor, tokens: Tensor, references: int = 1) -> Tensor:
        """Return tokens [N, 4, dim] of embeddings [N, id_dim] and CLIP tokens [N, K, clip_dim]."""
        return self.perceiver(tokens, references, self.face(embeddings))


class FacialEncoder(nn.Module):
    """One token for each facial part: its CLIP tokens, pooled by a perceiver and fused with a learned word."""

    def __init__(self, clip_dim: int, dim: int):
        super().__init__()
        self.perceiver = Resampler(resampler_config(clip_dim, dim, queries=1))
        self.words = nn.Parameter(torch.randn(len(PARTS), dim))
        self.fuse_module = FuseModule(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens [N, P, dim] of CLIP tokens [N, R, P, T, clip_dim] of R references' parts."""
        people, references, parts = tokens.shape[:3]
        each = tokens.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        found = self.perceiver(each, references).view(people, parts, -1)
        return self.fuse_module(self.words.expand_as(found), found)


def part_crops(image: np.ndarray, points: np.ndarray, parts: Sequence[str]) -> list[np.ndarray]:
    """Cut facial parts out of an image [H,W,3] with the 72 landmarks [72,2] in pixels.

    Returns:
        Squares [S,S,3], black outside of the part's box.
    """
    crops = []
    for part in parts:
        own = points[[i for outline in PARTS[part] for i in outline]]
        centre, half = (own.min(0) + own.max(0)) / 2, CROP_SCALE * (own.max(0) - own.min(0)) / 2
        limit = np.array(image.shape[1::-1])
        low = np.clip(np.floor(centre - half).astype(int), 0, limit - 1)
        high = np.maximum(np.clip(np.ceil(centre + half).astype(int), 0, limit), low + 1)
        box = image[low[1] : high[1], low[0] : high[0]]
        side = max(box.shape[:2])
        crop = np.zeros((side, side, 3), image.dtype)
        top, left = (side - box.shape[0]) // 2, (side - box.shape[1]) // 2
        crop[top : top + box.shape[0], left : left + box.shape[1]] = box
        crops.append(crop)
    return crops


def part_masks(points: Tensor, side: int) -> Tensor:
    """Rasterise the parts in square images: masks [N,P,side,side] in 0…1.

    Args:
        points: the 72 landmarks [N,72,2] in pixels. side: of the images in pixels.
    """
    masks = []
    for face in points.cpu().numpy():
        for outlines in PARTS.values():
            mask = Image.new("L", (side, side))
            for outline in outlines:
                ImageDraw.Draw(mask).polygon([tuple(point) for point in (face[list(outline)] - 0.5).tolist()], fill=255)
            masks.append(np.asarray(mask, np.float32) / 255)
    return torch.from_numpy(np.stack(masks)).view(len(points), len(PARTS), side, side).to(points.device)


def localisation_loss(attended: Attended, masks: Tensor) -> Tensor:
    """Return how much more a cross-attention's part tokens are attended to outside of their parts than inside.

    The attention to a token is divided by its maximum over the image (ConsistentID's `BalancedL1Loss`).

    Args:
        attended: with the parts' keys last. masks: [N,P,H,W] of square images.
    """
    assert attended.identity_keys is not None
    queries, keys = attended.queries.float(), attended.identity_keys.float()
    scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    weights = scores.softmax(-1)[..., -masks.shape[1] :]  # [N, heads, h×w, P]
    weights = weights / (weights.amax(2, keepdim=True) + 1e-5)
    side = round(weights.shape[2] ** 0.5)
    inside = F.adaptive_avg_pool2d(masks, side).flatten(2).transpose(1, 2)[:, None]
    outside = 1 - inside
    within = (weights * inside).sum(2) / (inside.sum(2) + 1e-5)
    beyond = (weights * outside).sum(2) / (outside.sum(2) + 1e-5)
    return (beyond - within).mean()


class ConsistentID(Rival):
    """The projections of the face and of its parts, and keys and values for the UNet's attention to their tokens."""

    name = "consistentid"

    def __init__(self, config: ConsistentIDConfig, adapter: Adapter | None = None):
        super().__init__()
        self.config = config
        self.image_proj = FacePlusProjection(config)
        self.facial_encoder = FacialEncoder(config.clip_dim, config.adapter.context_dim)
        self.ip_adapter = adapter or Adapter(config.adapter)

    @classmethod
    def create(cls, start: FaceSnapWeights, unet: Any) -> Rival:
        adapter = adapter_for(unet)
        return cls(ConsistentIDConfig(start.info.mixer.id_dim, start.info.mixer.clip_dim, adapter.config), adapter)

    @staticmethod
    def features(clip: ImageEncoder, references: References) -> Features:
        """Return directions [N,E], and CLIP tokens [N,P,T,C] of the parts, of which the first is the whole face."""
        _, *others = PARTS
        pixels = [references.clip_pixels.cpu()[:, None]]
        images, points = references.images.cpu().numpy(), references.points.cpu().numpy()
        crops = [crop for image, own in zip(images, points) for crop in part_crops(image, own, others)]
        pixels.append(preprocess(crops, clip.image_size).unflatten(0, (len(images), -1)))
        together = torch.cat(pixels, dim=1).to(references.clip_pixels.device)
        tokens = clip_tokens(clip, together.flatten(0, 1)).unflatten(0, (len(images), -1))
        return direction(references.embeddings), tokens

    @staticmethod
    def diffusion_loss(attended: dict[int, Attended], points: Tensor, side: int) -> Tensor:
        """Return the weighted localisation loss, averaged over the cross-attentions."""
        masks = part_masks(points, side)
        return LOCALISATION * torch.stack([localisation_loss(one, masks) for one in attended.values()]).mean()

    def forward(self, features: Features, text: Text, call: UNetCall | None) -> Injection:
        embeddings, parts = features
        references = parts.shape[1]
        face = self.image_proj(embeddings.mean(1), parts[:, :, 0].flatten(1, 2), references)
        tokens = torch.cat([face, self.facial_encoder(parts)], dim=1)
        return Injection(text.context, keys_values(self.ip_adapter, tokens))
