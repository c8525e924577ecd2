"""The two networks that are trained, as one module, and their moving average."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from facesnap_ext.networks import ffrnet as parts
from facesnap_ext.networks.ffrnet import FFRNet


class TrainedNetworks(nn.Module):
    """Mixer (of either kind) and FFRNet behind one `forward`, the unit that data-parallel wrappers synchronise."""

    def __init__(self, mixer: nn.Module, ffrnet: FFRNet):
        super().__init__()
        self.mixer = mixer
        self.ffrnet = ffrnet

    def forward(
        self,
        embeddings: Tensor,
        clip_tokens: Tensor,
        drawings: Tensor,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """Residuals from shallow to deep, the middle's last.

        Args:
            embeddings: ArcFace embeddings of one reference each [N,E]. clip_tokens: of the same [N,T,C].
            drawings: landmarks [N,3,sh,sw] in 0…1.
            x: scaled noise latents [N,4,h,w]. timesteps: [N]. y: pooled text and sizes, see `FFRNet.forward`.
        """
        tokens = self.mixer(embeddings[:, None], clip_tokens[:, None])
        identity = self.ffrnet.embed_tokens(tokens)
        return self.ffrnet(x, timesteps, identity, self.ffrnet.embed_landmarks(drawings), y)


class TokensInText(TrainedNetworks):
    """The Mixer alone, its tokens for the UNet's own cross-attention: the paper's ablation without FFRNet.

    FFRNet is neither run nor trained; it stays, so that checkpoints are the same FaceSnap files.
    """

    def __init__(self, mixer: nn.Module, ffrnet: FFRNet):
        super().__init__(mixer, ffrnet)
        ffrnet.requires_grad_(False)

    def forward(self, embeddings: Tensor, clip_tokens: Tensor, *unused: Tensor | None) -> Tensor:
        """Identity tokens [N,T,C]; arguments as of `TrainedNetworks.forward`."""
        return self.mixer(embeddings[:, None], clip_tokens[:, None])


def in_text(context: Tensor, tokens: Tensor) -> Tensor:
    """Text context [N,77,C] with identity tokens [N,T,C] behind it.

    They stand behind the null text, too: FFRNet's residuals act on both rows of classifier-free guidance, and training
    never shows null text without them.
    """
    return torch.cat([context, tokens.to(context)], dim=1)


def checkpoint_activations(networks: TrainedNetworks) -> None:
    """Recompute FFRNet's blocks in the backward pass in place of keeping what is inside them."""
    for module in networks.ffrnet.modules():
        if isinstance(module, parts.ResnetBlock | parts.TransformerBlock | parts.LandmarkEmbedding):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


@torch.no_grad()
def update_average(average: list[Tensor], parameters: Iterable[Tensor], decay: float, step: int) -> None:
    """Move an average towards the parameters after step number `step`, counted from 1.

    Early averages forget faster, by (1 + step) / (10 + step), or they would long keep what training started from
    (as in tf.train.ExponentialMovingAverage).
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
