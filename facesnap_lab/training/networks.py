"""The two trained networks as one module, and their moving average."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from facesnap_ext.networks import ffrnet as blocks
from facesnap_ext.networks.ffrnet import FFRNet


class TrainedNetworks(nn.Module):
    """Mixer (of any kind) and FFRNet behind one `forward`, the unit that data-parallel wrappers synchronise."""

    def __init__(self, mixer: nn.Module, ffrnet: FFRNet):
        super().__init__()
        self.mixer = mixer
        self.ffrnet = ffrnet

    def forward(
        self,
        embeddings: Tensor,
        clip_tokens: Tensor,
        landmark_images: Tensor,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """Return FFRNet's residuals from shallow to deep, with the middle block's residual last.

        Args:
            embeddings: ArcFace embeddings [N,E], one reference per row. clip_tokens: CLIP tokens of the same references
                [N,T,C].
            landmark_images: [N,3,sh,sw] in 0…1.
            x: scaled noisy latents [N,4,h,w]. timesteps: [N]. y: pooled text and sizes; see `FFRNet.forward`.
        """
        tokens = self.mixer(embeddings[:, None], clip_tokens[:, None])
        identity = self.ffrnet.embed_tokens(tokens)
        return self.ffrnet(x, timesteps, identity, self.ffrnet.embed_landmarks(landmark_images), y)


class TokensInText(TrainedNetworks):
    """Only the Mixer, whose tokens enter the UNet's own cross-attention: the paper's ablation without FFRNet.

    FFRNet is neither run nor trained. It is kept so that checkpoints remain ordinary FaceSnap files.
    """

    def __init__(self, mixer: nn.Module, ffrnet: FFRNet):
        super().__init__(mixer, ffrnet)
        ffrnet.requires_grad_(False)

    def forward(self, embeddings: Tensor, clip_tokens: Tensor, *unused: Tensor | None) -> Tensor:
        """Return identity tokens [N,T,C]. Takes the same arguments as `TrainedNetworks.forward`."""
        return self.mixer(embeddings[:, None], clip_tokens[:, None])


def append_tokens(context: Tensor, tokens: Tensor) -> Tensor:
    """Append identity tokens [N,T,C] to the text context [N,77,C].

    They are appended to the null text too: FFRNet's residuals apply to both rows of classifier-free guidance, and
    training never shows null text without them.
    """
    return torch.cat([context, tokens.to(context)], dim=1)


def checkpoint_activations(networks: nn.Module) -> None:
    """Recompute the activations of FFRNet's blocks, if there are any, in the backward pass instead of storing them."""
    for module in networks.modules():
        if isinstance(module, blocks.ResnetBlock | blocks.TransformerBlock | blocks.LandmarkEmbedding):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


@torch.no_grad()
def update_average(average: list[Tensor], parameters: Iterable[Tensor], decay: float, step: int) -> None:
    """Update an exponential moving average with the parameters after step number `step`, counted from 1.

    In early steps the decay is only (1 + step) / (10 + step), as in tf.train.ExponentialMovingAverage. Otherwise the
    average would retain the initial weights for a long time.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
