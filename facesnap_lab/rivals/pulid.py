"""PuLID: ID tokens from ID embedding and multi-level CLIP features, aligned with the UNet's behaviour without them.

Sources: Guo et al., "PuLID" (2024), sections 3.1 and 3.2, and github.com/ToTheBeginning/PuLID: `IDEncoder` of
`pulid/encoders.py`. The training code is not published. Its identity loss is L_id of FaceSnap's trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.identity.clip import ImageEncoder
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_lab.rivals.attention import Attended, Injection, adapter_for, keys_values
from facesnap_lab.rivals.ip_adapter import direction
from facesnap_lab.rivals.method import Features, References, Rival, Text, UNetCall

GLOBAL_TOKENS = 5
LEVELS = 5
SEMANTIC, LAYOUT = 0.6, 0.1  # weights of the two alignment losses


@dataclass(frozen=True)
class PuLIDConfig:
    """Sizes. hidden: largest width of hidden layers. adapter: of the UNet's cross-attentions."""

    id_dim: int
    clip_dim: int
    hidden: int
    adapter: AdapterConfig


def mlp(inputs: int, first: int, second: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, first), nn.LayerNorm(first), nn.LeakyReLU()),
        *(nn.Linear(first, second), nn.LayerNorm(second), nn.LeakyReLU()),
        nn.Linear(second, outputs),
    )


class IDEncoder(nn.Module):
    """Five tokens from the ID embedding and CLIP's class token, and one token for each level of CLIP's features."""

    def __init__(self, config: PuLIDConfig):
        super().__init__()
        dim, width, hidden = config.adapter.context_dim, config.clip_dim, config.hidden
        outputs = GLOBAL_TOKENS * dim
        first, second = min(outputs // 4, hidden), min(outputs // 2, hidden)
        self.body = mlp(config.id_dim + width, first, second, outputs)
        inner = min(width, hidden)
        self.mapping = nn.ModuleList(mlp(width, inner, inner, dim) for _ in range(LEVELS))
        self.mapping_patch = nn.ModuleList(mlp(width, inner, inner, dim) for _ in range(LEVELS))

    def forward(self, identity: Tensor, levels: Tensor) -> Tensor:
        """Return tokens [N, 10, dim].

        Args:
            identity: [N, id_dim + clip_dim]. levels: CLIP tokens of each level [N, 5, T, clip_dim], class token first.
        """
        tokens = [self.body(identity).unflatten(-1, (GLOBAL_TOKENS, -1))]
        for level, (whole, patch) in enumerate(zip(self.mapping, self.mapping_patch)):
            found = levels[:, level]
            tokens.append(whole(found[:, :1]) + patch(found[:, 1:]).mean(dim=1, keepdim=True))
        return torch.cat(tokens, dim=1)


def semantic_loss(with_id: Attended, without: Attended) -> Tensor:
    """L_align-sem of a cross-attention: how the image's response to the text's tokens changes.

    ‖softmax(K Q_tidᵀ / √d) Q_tid − softmax(K Q_tᵀ / √d) Q_t‖², averaged over the elements.
    """
    responses = [
        F.scaled_dot_product_attention(one.text_keys, one.queries, one.queries).float() for one in (with_id, without)
    ]
    return F.mse_loss(*responses)


def layout_loss(with_id: Attended, without: Attended) -> Tensor:
    """L_align-layout of a cross-attention: ‖Q_tid − Q_t‖², averaged over the elements."""
    return F.mse_loss(with_id.queries.float(), without.queries.float())


class PuLID(Rival):
    """The ID encoder, and keys and values for the UNet's attention to its tokens."""

    name = "pulid"

    def __init__(self, config: PuLIDConfig, adapter: Adapter | None = None):
        super().__init__()
        self.config = config
        self.id_adapter = IDEncoder(config)
        self.ip_adapter = adapter or Adapter(config.adapter)

    @classmethod
    def create(cls, start: FaceSnapWeights, unet: Any) -> Rival:
        adapter = adapter_for(unet)
        return cls(PuLIDConfig(start.info.mixer.id_dim, start.info.mixer.clip_dim, 1024, adapter.config), adapter)

    @staticmethod
    @torch.no_grad()
    def features(clip: ImageEncoder, references: References) -> Features:
        weight = next(clip.parameters())
        pixels = references.clip_pixels.to(weight)
        states = clip.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        last = len(states) - 1
        levels = torch.stack([states[round((i + 1) * last / LEVELS)].float() for i in range(LEVELS)], dim=1)
        identity = torch.cat([direction(references.embeddings), direction(levels[:, -1, 0])], dim=-1)
        return identity, levels

    @staticmethod
    def alignment_loss(attended: dict[int, Attended], without: dict[int, Attended]) -> Tensor:
        """Return the weighted alignment losses, averaged over the cross-attentions."""
        losses = [
            SEMANTIC * semantic_loss(one, without[i]) + LAYOUT * layout_loss(one, without[i])
            for i, one in attended.items()
        ]
        return torch.stack(losses).mean()

    def forward(self, features: Features, text: Text, call: UNetCall | None) -> Injection:
        identity, levels = (feature.mean(1) for feature in features)
        return Injection(text.context, keys_values(self.ip_adapter, self.id_adapter(identity, levels)))
