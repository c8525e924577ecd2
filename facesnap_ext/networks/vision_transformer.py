"""A Vision Transformer that classifies images (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929).

The computation is that of transformers' `ViTForImageClassification`. It is written out here, because transformers is
slow to import and may fetch code that a config.json names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Vision Transformer.

    Attributes:
        width: number of channels of a token.
        layers, heads: number of layers, and of attention heads per layer.
        hidden: number of channels inside the MLP.
        image, patch: sides of the square input and of its patches, in pixels.
        labels: number of outputs.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    image: int
    patch: int
    labels: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its name in transformers' files."""
        w, patches = self.width, (self.image // self.patch) ** 2
        shapes: dict[str, tuple[int, ...]] = {
            "vit.embeddings.cls_token": (1, 1, w),
            "vit.embeddings.position_embeddings": (1, patches + 1, w),
            "vit.embeddings.patch_embeddings.projection.weight": (w, 3, self.patch, self.patch),
            "vit.embeddings.patch_embeddings.projection.bias": (w,),
        }
        linear = {"vit.layernorm": (w,), "classifier": (self.labels, w)}
        for layer in range(self.layers):
            name = f"vit.encoder.layer.{layer}"
            linear |= {f"{name}.attention.attention.{one}": (w, w) for one in ("query", "key", "value")}
            linear |= {f"{name}.attention.output.dense": (w, w), f"{name}.intermediate.dense": (self.hidden, w)}
            linear |= {f"{name}.output.dense": (w, self.hidden)}
            linear |= {f"{name}.layernorm_{where}": (w,) for where in ("before", "after")}
        for name, shape in linear.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return shapes


@dataclass(frozen=True, eq=False)
class VisionTransformer:
    """A Vision Transformer with its weights.

    Args:
        weights: a tensor for each name in `Sizes.shapes`.
        activation: a key of `ACTIVATIONS`.
        epsilon: added to the variance in layer norms.
    """

    sizes: Sizes
    weights: Mapping[str, Tensor]
    activation: str = "gelu"
    epsilon: float = 1e-12

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Classify images.

        Args:
            pixels: [N, 3, image, image], normalised.

        Returns:
            [N, labels]: the logits.
        """
        weights, sizes = self.weights, self.sizes
        x = F.conv2d(pixels, *self._pair("vit.embeddings.patch_embeddings.projection"), stride=sizes.patch)
        first = weights["vit.embeddings.cls_token"].expand(len(pixels), -1, -1)
        x = torch.cat([first, x.flatten(2).mT], dim=1) + weights["vit.embeddings.position_embeddings"]
        for layer in range(sizes.layers):
            name = f"vit.encoder.layer.{layer}"
            x = x + self._attention(f"{name}.attention", self._norm(f"{name}.layernorm_before", x))
            hidden = self._linear(f"{name}.intermediate.dense", self._norm(f"{name}.layernorm_after", x))
            x = x + self._linear(f"{name}.output.dense", ACTIVATIONS[self.activation](hidden))
        return self._linear("classifier", self._norm("vit.layernorm", x[:, 0]))

    def _attention(self, name: str, x: Tensor) -> Tensor:
        heads = (self._linear(f"{name}.attention.{one}", x) for one in ("query", "key", "value"))
        query, key, value = (each.unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2) for each in heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self._linear(f"{name}.output.dense", attended)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self._pair(name))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.sizes.width,), *self._pair(name), self.epsilon)
