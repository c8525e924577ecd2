"""The networks that stay frozen during training: SDXL, CLIP, ArcFace and the few-step model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.identity.clip import ImageEncoder, load_image_encoder
from facesnap_ext.networks.ffrnet import sinusoid
from facesnap_lab.training.arcface import ArcFace, load_arcface
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.lightning import FewStep, load_few_step

CACHED_TEXT = 256 * 2**20  # size in bytes of the cache of encoded captions


class TextEncoder:
    """SDXL's two text encoders, via the pipeline's `encode_prompt`, with a cache of recent captions."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.null = self._encode("", null=True)
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._capacity = max(1, CACHED_TEXT // sum(t.numel() * t.element_size() for t in self.null))

    def __call__(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Return context [N,77,C] and pooled text [N,P] of captions; None stands for the pipeline's null text."""
        rows = [self.null if caption is None else self._cached(caption) for caption in captions]
        context, pooled = (torch.cat(column) for column in zip(*rows))
        return context, pooled

    def _cached(self, caption: str) -> tuple[Tensor, Tensor]:
        if caption not in self._cache:
            self._cache[caption] = self._encode(caption)
            if len(self._cache) > self._capacity:
                self._cache.popitem(last=False)
        self._cache.move_to_end(caption)
        return self._cache[caption]

    @torch.no_grad()
    def _encode(self, caption: str, null: bool = False) -> tuple[Tensor, Tensor]:
        # one caption at a time: in a batch, rounding would depend on which captions are cached
        context, null_context, pooled, null_pooled = self.pipe.encode_prompt(
            caption, device=self.pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=null
        )
        return (null_context, null_pooled) if null else (context, pooled)


@dataclass(frozen=True, eq=False)
class Frozen:
    """The frozen networks, on the training device.

    alpha_bar: cumulative product of the schedule's alphas [1000]. few_step, arcface: None without L_id.
    pipe: diffusers pipeline of the same networks, for samples.
    """

    unet: nn.Module
    vae: nn.Module
    clip: ImageEncoder
    text: TextEncoder
    alpha_bar: Tensor
    prediction_type: str
    few_step: FewStep | None
    arcface: ArcFace | None
    pipe: Any

    @property
    def vae_scale(self) -> int:
        """Side of a latent cell in pixels."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_frozen(config: TrainConfig, device: torch.device) -> Frozen:
    """Load all networks that a run uses but does not train. Nothing is downloaded.

    Raises:
        FaceSnapError: a file is missing, damaged or a different kind of model.
    """
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    pipe = load_base(config.base, config.base_config, dtype)
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        network.eval().requires_grad_(False).to(device)
    if dtype is torch.float16:
        pipe.vae.to(torch.float32)  # SDXL's original VAE overflows in half precision
    few_step = load_few_step(pipe, config.lightning) if config.id_rows else None
    if config.gradient_checkpointing:
        pipe.vae.enable_gradient_checkpointing()
        for unet in {id(net): net for net in (pipe.unet, few_step and few_step.unet) if net is not None}.values():
            unet.enable_gradient_checkpointing()
            unet.train()  # older diffusers versions checkpoint only in training mode, which has no other effect in SDXL

    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise FaceSnapError(
            f"{config.base.name} has the prediction type '{schedule.config.prediction_type}', which is not supported; "
            "use a base with 'epsilon' or 'v_prediction'."
        )
    return Frozen(
        unet=pipe.unet,
        vae=pipe.vae,
        clip=load_image_encoder(config.clip, device, dtype),
        text=TextEncoder(pipe),
        alpha_bar=schedule.alphas_cumprod.to(device),
        prediction_type=schedule.config.prediction_type,
        few_step=few_step,
        arcface=load_arcface(config.face_pack).to(device) if config.id_rows else None,
        pipe=pipe,
    )


def load_base(path: Path, base_config: Path | None, dtype: torch.dtype) -> Any:
    """Load an SDXL pipeline from a diffusers folder or a single-file checkpoint.

    Args:
        base_config: for a single file, a folder with SDXL's configs and tokenizers in diffusers' layout; by default the
            ones in the Hugging Face cache.

    Raises:
        FaceSnapError: the model does not exist, or is not SDXL.
    """
    from diffusers import StableDiffusionXLPipeline

    import facesnap_lab.miniature.second.autoencoder  # noqa: F401 (a pipeline names it, but diffusers imports nothing)

    try:
        if path.is_dir():
            pipe = StableDiffusionXLPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
        else:
            options = {"config": str(base_config)} if base_config else {}
            pipe = StableDiffusionXLPipeline.from_single_file(path, torch_dtype=dtype, local_files_only=True, **options)
    except Exception as error:  # diffusers and its dependencies raise errors of many types
        advice = "" if path.is_dir() or base_config else " and set 'base_config' to a folder with SDXL's configs"
        reason = reason_of(error)
        raise FaceSnapError(f"{path} cannot be loaded as an SDXL model ({reason}); check it{advice}.") from error
    if pipe.text_encoder is None or pipe.text_encoder_2 is None or pipe.unet.config.addition_embed_type != "text_time":
        raise FaceSnapError(f"{path} is not an SDXL model with both text encoders; use one that is.")
    return pipe


def size_ids(side: int, rows: int, device: torch.device) -> Tensor:
    """Return SDXL's size conditioning [rows,6] of uncropped square images: original size, crop and target size."""
    return torch.tensor([[side, side, 0, 0, side, side]] * rows, dtype=torch.float32, device=device)


def text_y(pooled: Tensor, sizes: Tensor, size_dim: int) -> Tensor:
    """Return FFRNet's `y` [N,adm_dim] for pooled text [N,P] and size ids [N,6], computed as in SDXL's UNet."""
    return torch.cat([pooled, sinusoid(sizes.flatten(), size_dim).reshape(len(sizes), -1).to(pooled.dtype)], dim=-1)
