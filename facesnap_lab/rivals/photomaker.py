"""PhotoMaker: ID embeddings are fused into the text's word for the person, and the UNet's attention gets a LoRA.

Sources: Li et al., "PhotoMaker" (2024), section 3.2, and github.com/TencentARC/PhotoMaker: `FuseModule` of
`photomaker/model.py`. Each reference contributes one embedding. Together they take the place of the class word
("stacked ID embedding").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.clip import ImageEncoder
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_lab.rivals.attention import Injection, lora_layers
from facesnap_lab.rivals.ip_adapter import clip_tokens
from facesnap_lab.rivals.method import Features, References, Rival, Text, UNetCall

CLASS_WORDS = ("person", "man", "woman", "boy", "girl", "guy", "lady", "child", "people", "men", "women")
RANK = 64


@dataclass(frozen=True)
class PhotoMakerConfig:
    """Sizes. lora: name, inputs and outputs of each changed projection; see `lora_layers`."""

    clip_dim: int
    context_dim: int
    rank: int
    lora: tuple[tuple[str, int, int], ...]


class MLP(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, outputs)
        self.fc2 = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.layernorm(x))))


class FuseModule(nn.Module):
    """Fuse word embeddings and ID embeddings, both [..., dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp1 = MLP(2 * dim, dim)
        self.mlp2 = MLP(dim, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, words: Tensor, identities: Tensor) -> Tensor:
        fused = words + self.mlp1(torch.cat([words, identities], dim=-1))
        return self.layer_norm(fused + self.mlp2(fused))


class LoRALayer(nn.Module):
    """A low-rank change of a projection, zero at the beginning."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.lora_down = nn.Linear(inputs, rank, bias=False)
        self.lora_up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.lora_up.weight)


class PhotoMaker(Rival):
    """The projection of CLIP's class token, the fusion, and the LoRAs."""

    name = "photomaker"

    def __init__(self, config: PhotoMakerConfig):
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.clip_dim)
        self.visual_projection = nn.Linear(config.clip_dim, config.context_dim, bias=False)
        self.fuse_module = FuseModule(config.context_dim)
        self.lora = nn.ModuleDict({name: LoRALayer(*sizes, config.rank) for name, *sizes in config.lora})

    @classmethod
    def create(cls, start: FaceSnapWeights, unet: Any) -> Rival:
        layers = lora_layers(unet)
        rank = min(RANK, *(size for _, *sizes in layers for size in sizes))
        return cls(PhotoMakerConfig(start.info.mixer.clip_dim, unet.config.cross_attention_dim, rank, layers))

    @staticmethod
    def features(clip: ImageEncoder, references: References) -> Features:
        return (clip_tokens(clip, references.clip_pixels)[:, 0],)

    @staticmethod
    def class_words(tokenizer: Any, captions: Sequence[str | None], length: int) -> Tensor:
        """Find the first class word of each caption.

        Raises:
            FaceSnapError: a caption has none.
        """
        found = torch.zeros(len(captions), length, dtype=torch.bool)
        encoded = [tokenizer(word, add_special_tokens=False).input_ids for word in CLASS_WORDS]
        words = [ids for ids in encoded if tokenizer.unk_token_id not in ids]
        for row, caption in enumerate(captions):
            if caption is None:
                continue
            ids = tokenizer(caption, truncation=True, max_length=length).input_ids
            ends = [i + len(w) - 1 for w in words for i in range(len(ids)) if ids[i : i + len(w)] == w]
            if not ends:
                raise FaceSnapError(
                    f"'{caption}' has no word for the person, which PhotoMaker needs; use one of "
                    f"{', '.join(CLASS_WORDS)}."
                )
            found[row, min(ends)] = True
        return found

    def forward(self, features: Features, text: Text, call: UNetCall | None) -> Injection:
        identities = self.visual_projection(self.norm(features[0]))
        present = features[0].flatten(1).any(1)
        rows = []
        for context, words, identity, visible in zip(
            text.context.to(identities), text.class_words, identities, present
        ):
            stacked = self._stack(context, int(words.long().argmax()), identity)
            # selected, not skipped: with DDP, every weight must have a gradient in every step
            rows.append(torch.where(visible & words.any(), stacked, context))
        lora = {name: (layer.lora_down.weight, layer.lora_up.weight) for name, layer in self.lora.items()}
        return Injection(torch.stack(rows), lora=lora)

    def _stack(self, context: Tensor, word: int, identities: Tensor) -> Tensor:
        """Replace a token of a text [T,C] by its fusions with R identities. The end of the text is cut off."""
        fused = self.fuse_module(context[word].expand_as(identities), identities)
        return torch.cat([context[:word], fused, context[word + 1 :]])[: len(context)]
