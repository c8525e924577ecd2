"""What is trained against but not trained: SDXL, CLIP, ArcFace and the few-step model."""

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

CACHED_TEXT = 256 * 2**20  # bytes of encoded captions that are kept


class TextEncoder:
    """SDXL's two text encoders by the pipeline's own `encode_prompt`, with the last captions' results kept."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.null = self._encode("", null=True)
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._room = max(1, CACHED_TEXT // sum(t.numel() * t.element_size() for t in self.null))

    def __call__(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Context [N,77,C] and pooled text [N,P] of captions; None is what this pipeline takes for no text."""
        rows = [self.null if caption is None else self._kept_or_encoded(caption) for caption in captions]
        context, pooled = (torch.cat(column) for column in zip(*rows))
        return context, pooled

    def _kept_or_encoded(self, caption: str) -> tuple[Tensor, Tensor]:
        if caption not in self._kept:
            self._kept[caption] = self._encode(caption)
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)
        self._kept.move_to_end(caption)
        return self._kept[caption]

    @torch.no_grad()
    def _encode(self, caption: str, null: bool = False) -> tuple[Tensor, Tensor]:
        # one caption at a time: in a batch, rounding would depend on which others had been kept
        context, null_context, pooled, null_pooled = self.pipe.encode_prompt(
            caption, device=self.pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=null
        )
        return (null_context, null_pooled) if null else (context, pooled)


@dataclass(frozen=True, eq=False)
class Frozen:
    """The networks without gradients of their own, on the training device.

    alpha_bar: cumulative product of the schedule's alphas [1000]. few_step and arcface are None without L_id.
    """

    unet: nn.Module
    vae: nn.Module
    clip: ImageEncoder
    text: TextEncoder
    alpha_bar: Tensor
    prediction_type: str
    few_step: FewStep | None
    arcface: ArcFace | None
    pipe: Any  # diffusers' pipeline of the same networks, for samples

    @property
    def vae_scale(self) -> int:
        """Pixels to a latent cell, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_frozen(config: TrainConfig, device: torch.device) -> Frozen:
    """Load everything that a run needs and does not train; nothing is downloaded.

    Raises:
        FaceSnapError: a file is missing, unfit, or another kind of model.
    """
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    pipe = load_base(config.base, config.base_config, dtype)
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        network.eval().requires_grad_(False).to(device)
    if dtype is torch.float16:
        pipe.vae.to(torch.float32)  # SDXL's own VAE overflows in half precision
    few_step = load_few_step(pipe, config.lightning) if config.id_rows else None
    if config.gradient_checkpointing:
        pipe.vae.enable_gradient_checkpointing()
        for unet in {id(net): net for net in (pipe.unet, few_step and few_step.unet) if net is not None}.values():
            unet.enable_gradient_checkpointing()
            unet.train()  # older diffusers checkpoint in training mode alone; SDXL has nothing else that depends on it

    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise FaceSnapError(
            f"{config.base.name} predicts '{schedule.config.prediction_type}', which FaceSnap is not trained with; use "
            "a base that predicts epsilon or v_prediction."
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
    """An SDXL pipeline of diffusers, from its folder or from a checkpoint in one file.

    Args:
        base_config: for one file, a folder with the configurations and tokenizers of SDXL as diffusers lays them out;
            by default those in diffusers' own cache.

    Raises:
        FaceSnapError: it is not there, or not SDXL.
    """
    from diffusers import StableDiffusionXLPipeline

    try:
        if path.is_dir():
            pipe = StableDiffusionXLPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
        else:
            own = {"config": str(base_config)} if base_config else {}
            pipe = StableDiffusionXLPipeline.from_single_file(path, torch_dtype=dtype, local_files_only=True, **own)
    except Exception as error:  # diffusers and its parts raise whatever they meet
        advice = "" if path.is_dir() or base_config else " and set 'base_config' to a folder with SDXL's configurations"
        reason = reason_of(error)
        raise FaceSnapError(f"{path} cannot be loaded as an SDXL model ({reason}); check it{advice}.") from error
    if pipe.text_encoder is None or pipe.text_encoder_2 is None or pipe.unet.config.addition_embed_type != "text_time":
        raise FaceSnapError(f"{path} is not an SDXL model with both text encoders; use one.")
    return pipe


def size_ids(side: int, rows: int, device: torch.device) -> Tensor:
    """SDXL's size fields [rows,6] of uncropped square pictures: original size, crop and target size."""
    return torch.tensor([[side, side, 0, 0, side, side]] * rows, dtype=torch.float32, device=device)


def text_y(pooled: Tensor, sizes: Tensor, size_dim: int) -> Tensor:
    """FFRNet's `y` [N,adm_dim] with text, as SDXL's UNet makes it of pooled text [N,P] and size fields [N,6]."""
    return torch.cat([pooled, sinusoid(sizes.flatten(), size_dim).reshape(len(sizes), -1).to(pooled.dtype)], dim=-1)
