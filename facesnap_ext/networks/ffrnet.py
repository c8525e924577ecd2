"""Face Fidelity Reinforce Network (FFRNet): SDXL's encoder as a ControlNet conditioned on identity tokens.

The modules use the key names of diffusers' `ControlNetModel`, so that its files load unchanged. FFRNet differs from a
usual ControlNet in two respects: cross-attention attends to identity tokens instead of text, and the pooled text
embedding is zero ("text-free"). The residuals thus depend only on latent, timestep, tokens and landmarks. They are
exactly the same for the conditional and the unconditional row of an image, which therefore share one forward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.networks.layers import CastingConv2d, CastingLinear, Conv2d, GroupNorm, LayerNorm, Linear

KeysValues = tuple[Tensor, Tensor]  # keys and values of one attention layer, each [N, T, width]
SIZE_FIELDS = 6  # SDXL's micro-conditioning: original size, crop offset and target size, each as height and width
NORM_GROUPS = 32
FLOAT8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class FFRNetConfig:
    """Sizes of an FFRNet. They match the UNet that it was made for."""

    in_channels: int
    widths: tuple[int, ...]  # channels of each level
    depths: tuple[tuple[int, ...], ...]  # transformer blocks after each ResNet block of each level
    middle_depth: int  # transformer blocks in the middle block; -1: one ResNet block without attention
    context_dim: int  # width of an identity token
    adm_dim: int  # width of `y`: the pooled text embedding and six embedded sizes
    hint_widths: tuple[int, ...]  # channels of the landmark embedding's stages, each at half the previous resolution
    heads: tuple[int, ...]  # attention heads of each level; cannot be derived from tensor shapes
    size_dim: int = 256  # width of one embedded size

    def __post_init__(self) -> None:
        if self.adm_dim < SIZE_FIELDS * self.size_dim:
            raise ValueError(f"adm_dim {self.adm_dim} is too small for {SIZE_FIELDS} sizes of width {self.size_dim}")

    @property
    def skip_widths(self) -> tuple[int, ...]:
        """Channels of the skip residuals from shallow to deep, in the order of the UNet encoder's skip connections."""
        skips = [self.widths[0]]
        for level, (width, depths) in enumerate(zip(self.widths, self.depths)):
            downsampled = level < len(self.widths) - 1
            skips += [width] * (len(depths) + downsampled)
        return tuple(skips)

    def with_blocks(self, blocks: int) -> FFRNetConfig:
        """Limit each transformer of the deepest level and of the middle block to at most `blocks` blocks."""
        *depths, deepest = self.depths
        deepest = tuple([min(depth, blocks) for depth in deepest])
        return replace(self, depths=(*depths, deepest), middle_depth=min(self.middle_depth, blocks))

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of the landmark image per latent cell, along each axis."""
        return 2 ** (len(self.hint_widths) - 1)

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], heads: Sequence[int] | None = None, size_dim: int = 256
    ) -> FFRNetConfig:
        """Derive the sizes from tensor shapes.

        Args:
            shapes: tensor shapes by diffusers' key names.
            heads: attention heads of each level; by default one per 64 channels, as in SDXL.
            size_dim: width of one embedded size, diffusers' `addition_time_embed_dim`.
        """
        depths: list[list[int]] = []
        widths: list[int] = []
        while f"down_blocks.{len(widths)}.resnets.0.conv1.weight" in shapes:
            block = f"down_blocks.{len(widths)}"
            widths.append(shapes[f"{block}.resnets.0.conv1.weight"][0])
            depths.append([])
            while f"{block}.resnets.{len(depths[-1])}.conv1.weight" in shapes:
                depths[-1].append(_count_blocks(shapes, f"{block}.attentions.{len(depths[-1])}"))
        blocks = 0
        while f"controlnet_cond_embedding.blocks.{blocks}.weight" in shapes:
            blocks += 1
        hints = [shapes["controlnet_cond_embedding.conv_in.weight"][0]]
        hints += [shapes[f"controlnet_cond_embedding.blocks.{i}.weight"][0] for i in range(1, blocks, 2)]
        contexts = [shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")]
        has_attention = "mid_block.attentions.0.norm.weight" in shapes
        return cls(
            in_channels=shapes["conv_in.weight"][1],
            widths=tuple(widths),
            depths=tuple(map(tuple, depths)),
            middle_depth=_count_blocks(shapes, "mid_block.attentions.0") if has_attention else -1,
            context_dim=contexts[0],
            adm_dim=shapes["add_embedding.linear_1.weight"][1],
            hint_widths=tuple(hints),
            heads=tuple(heads) if heads else tuple([max(1, width // 64) for width in widths]),
            size_dim=size_dim,
        )


def _count_blocks(shapes: Mapping[str, Sequence[int]], attention: str) -> int:
    """Return the number of transformer blocks under the key `attention`."""
    depth = 0
    while f"{attention}.transformer_blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    return depth


class FFRNet(nn.Module):
    """The network; see `forward`. Given the same weights and inputs, it produces the same output as diffusers'
    `ControlNetModel`."""

    def __init__(self, config: FFRNetConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        time_dim = 4 * widths[0]
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time_dim)
        self.add_embedding = Embedding(config.adm_dim, time_dim)
        self.controlnet_cond_embedding = LandmarkEmbedding(config.hint_widths, widths[0])

        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        for level, (width, depths, heads) in enumerate(zip(widths, config.depths, config.heads)):
            last = level == len(widths) - 1
            self.down_blocks.append(
                DownBlock(channels, width, depths, time_dim, config.context_dim, heads, downsample=not last)
            )
            channels = width
        self.mid_block = MidBlock(channels, config.middle_depth, time_dim, config.context_dim, config.heads[-1])
        self.controlnet_down_blocks = nn.ModuleList(Conv2d(width, width, 1) for width in config.skip_widths)
        self.controlnet_mid_block = Conv2d(channels, channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Compute type. 8-bit weights are cast to it."""
        return self.conv_in.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> FFRNet:
        """Implement `to`, `half` etc., except that float8 weights keep their type. The layers cast them when used."""
        return super()._apply(lambda t: fn(t).to(t.dtype) if t.dtype in FLOAT8_TYPES else fn(t), *args, **kwargs)

    def embed_landmarks(self, image: Tensor) -> Tensor:
        """Embed a landmark image [N, 3, H, W] in 0…1, black background, as [N, widths[0], H / scale, W / scale], where
        scale is `config.pixels_per_latent`."""
        return self.controlnet_cond_embedding(image.to(self.dtype))

    def embed_tokens(self, tokens: Tensor) -> list[KeysValues]:
        """Compute keys and values [N, T, width] of all cross-attentions, from shallow to deep, for identity tokens
        [N, T, context_dim]. They depend on nothing else, so one call suffices for all steps of an image."""
        tokens = tokens.to(self.dtype)
        return [module.attn2.keys_values(tokens) for module in self.modules() if isinstance(module, TransformerBlock)]

    def null_text(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the text-free `y` [1, adm_dim] for an image of this size in pixels: a zero pooled text embedding and
        SDXL's size fields."""
        sizes = torch.tensor([height, width, 0, 0, height, width], device=device)
        embedded = sinusoid(sizes, self.config.size_dim).flatten()
        pooled = embedded.new_zeros(self.config.adm_dim - embedded.numel())
        return torch.cat([pooled, embedded])[None]

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        identity: Iterable[KeysValues],
        landmark_features: Tensor,
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """Compute the residuals for one UNet call.

        Args:
            x: scaled latents [N, C >= in_channels, h, w] as the UNet receives them. Extra channels are ignored;
                inpainting checkpoints append the mask and the masked image.
            timesteps: discrete timesteps [N], 0…999.
            identity: from `embed_tokens` for tokens [N or 1, T, context_dim].
            landmark_features: from `embed_landmarks`, [N or 1, widths[0], h, w].
            y: pooled text embedding and sizes [N, adm_dim] for weights trained with text; None for text-free weights.

        Returns:
            Residuals [N, channels, height, width] from shallow to deep: one for each of `config.skip_widths`, then the
            residual of the middle block.
        """
        x = x[:, : self.config.in_channels].to(self.dtype)
        if y is None:
            scale = self.config.pixels_per_latent
            y = self.null_text(scale * x.shape[2], scale * x.shape[3], x.device)
        emb = self.time_embedding(sinusoid(timesteps, self.config.widths[0]).to(self.dtype))
        emb = emb + self.add_embedding(y.to(self.dtype))
        keys_values = iter(identity)  # each cross-attention consumes the next item

        h = self.conv_in(x) + landmark_features.to(self.dtype)
        skips = [h]
        for block in self.down_blocks:
            h, block_skips = block(h, emb, keys_values)
            skips += block_skips
        h = self.mid_block(h, emb, keys_values)
        residuals = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips)]
        return [*residuals, self.controlnet_mid_block(h)]


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding [N] → [N, dim] in float32, cosines first (`flip_sin_to_cos`), with a maximum
    period of 10000."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedding(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.linear_1 = Linear(dim, out)
        self.linear_2 = Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class LandmarkEmbedding(nn.Module):
    def __init__(self, widths: Sequence[int], out: int):
        super().__init__()
        self.conv_in = Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for channels, next_channels in itertools.pairwise(widths):
            self.blocks.append(Conv2d(channels, channels, 3, padding=1))
            self.blocks.append(Conv2d(channels, next_channels, 3, padding=1, stride=2))
        self.conv_out = Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class DownBlock(nn.Module):
    def __init__(
        self,
        inputs: int,
        width: int,
        depths: Sequence[int],
        time_dim: int,
        context_dim: int,
        heads: int,
        downsample: bool,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width if i else inputs, width, time_dim) for i in range(len(depths)))
        # In SDXL-shaped UNets, a level has attention after all of its ResNet blocks or after none.
        self.attentions = (
            nn.ModuleList(Transformer(width, depth, context_dim, heads) for depth in depths) if any(depths) else None
        )
        self.downsamplers = nn.ModuleList([Downsample(width)]) if downsample else None

    def forward(self, h: Tensor, emb: Tensor, identity: Iterator[KeysValues]) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, emb)
            if self.attentions is not None:
                h = self.attentions[i](h, identity)
            skips.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h)
            skips.append(h)
        return h, skips


class MidBlock(nn.Module):
    def __init__(self, width: int, depth: int, time_dim: int, context_dim: int, heads: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, time_dim) for _ in range(2 if depth >= 0 else 1))
        self.attentions = nn.ModuleList([Transformer(width, depth, context_dim, heads)]) if depth >= 0 else None

    def forward(self, h: Tensor, emb: Tensor, identity: Iterator[KeysValues]) -> Tensor:
        h = self.resnets[0](h, emb)
        if self.attentions is not None:
            h = self.resnets[1](self.attentions[0](h, identity), emb)
        return h


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = CastingConv2d(width, width, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, width: int, time_dim: int):
        super().__init__()
        self.norm1 = GroupNorm(NORM_GROUPS, inputs)
        self.conv1 = CastingConv2d(inputs, width, 3, padding=1)
        self.time_emb_proj = CastingLinear(time_dim, width)
        self.norm2 = GroupNorm(NORM_GROUPS, width)
        self.conv2 = CastingConv2d(width, width, 3, padding=1)
        self.conv_shortcut = CastingConv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, context_dim: int, heads: int):
        super().__init__()
        self.norm = GroupNorm(NORM_GROUPS, width, eps=1e-6)
        self.proj_in = CastingLinear(width, width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, context_dim, heads) for _ in range(depth))
        self.proj_out = CastingLinear(width, width)

    def forward(self, x: Tensor, identity: Iterator[KeysValues]) -> Tensor:
        n, c, height, width = x.shape
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, next(identity))
        return x + self.proj_out(h).transpose(1, 2).reshape(n, c, height, width)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, context_dim, heads)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, identity: KeysValues) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, self.attn1.keys_values(normed))
        x = x + self.attn2(self.norm2(x), identity)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = CastingLinear(width, width, bias=False)
        self.to_k = CastingLinear(context_dim, width, bias=False)
        self.to_v = CastingLinear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([CastingLinear(width, width)])

    def keys_values(self, context: Tensor) -> KeysValues:
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        q, k, v = (
            part.expand(len(x), -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), *keys_values)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # Index 1 is dropout in diffusers, which has no weights.
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), CastingLinear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = CastingLinear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)
