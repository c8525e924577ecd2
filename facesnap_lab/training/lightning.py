"""The lightning branch: portraits generated from pure noise in a few steps, for L_id (eq. 4, after PuLID)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.tensors import read_tensors

ADAPTER = "lightning"


@dataclass(frozen=True, eq=False)
class FewStep:
    """The few-step UNet: a separate network, the base itself, or the base with a LoRA that is enabled on demand."""

    unet: nn.Module
    is_lora: bool

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Return the few-step UNet. A LoRA is enabled only inside the `with` block."""
        if self.is_lora:
            self.unet.enable_adapters()
        try:
            yield self.unet
        finally:
            if self.is_lora:
                self.unet.disable_adapters()


def load_few_step(pipe: Any, path: Path | None) -> FewStep:
    """Load the few-step model (SDXL-Lightning in the paper), frozen.

    Args:
        pipe: the base. A LoRA is added to its UNet and disabled.
        path: a LoRA or a UNet in diffusers' layout (.safetensors), or a UNet's folder. None if the base itself is a
            few-step model.

    Raises:
        FaceSnapError: the file is of a different kind, or does not match the base.
    """
    base = pipe.unet
    if path is None:
        return FewStep(base, is_lora=False)
    if path.is_file() and (kind := recognise(path)) is Kind.LORA:
        _add_lora(pipe, path)
        return FewStep(base, is_lora=True)
    if path.is_file() and kind is not Kind.SDXL_UNET:
        raise FaceSnapError(f"{path.name} is {kind.value}, not a few-step LoRA or UNet; use SDXL-Lightning's file.")
    try:
        if path.is_dir():
            unet = type(base).from_pretrained(path, torch_dtype=base.dtype, local_files_only=True)
        else:
            with torch.device("meta"):
                unet = type(base).from_config(base.config)
            unet.load_state_dict(read_tensors(path, dtype=base.dtype), assign=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = reason_of(error)
        raise FaceSnapError(f"{path} is not a UNet that matches the base ({reason}); use one made for it.") from error
    return FewStep(unet.to(base.device).eval().requires_grad_(False), is_lora=False)


def _add_lora(pipe: Any, path: Path) -> None:
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=ADAPTER, local_files_only=True)
        pipe.unet.disable_adapters()
    except Exception as error:  # diffusers and peft raise errors of many types
        reason = reason_of(error)
        raise FaceSnapError(
            f"{path.name} is not a LoRA for the base's UNet ({reason}); use one made for it."
        ) from error
    pipe.unet.requires_grad_(False).to(pipe.unet.dtype)


def few_step_latents(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    alpha_bar: Tensor,
    prediction_type: str,
    steps: int,
    grad_steps: int,
) -> Tensor:
    """Sample latents from pure noise, with Euler steps at trailing timesteps.

    Equivalent to diffusers' `EulerDiscreteScheduler` with `timestep_spacing="trailing"`, as SDXL-Lightning requires.

    Args:
        predict: the conditioned UNet, from scaled latents [N,4,h,w] and timesteps [N] to its prediction.
        noise: x_T, standard normal noise [N,4,h,w].
        alpha_bar: [T]; see `Frozen`.
        grad_steps: number of final steps that are backpropagated through.

    Returns:
        The denoised latents [N,4,h,w] float32.
    """
    total = len(alpha_bar)
    timesteps = [round(total - i * total / steps) - 1 for i in range(steps)]
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().float()
    sigmas = [*(sigmas[t] for t in timesteps), torch.zeros_like(sigmas[0])]
    x = noise.float() * sigmas[0]
    for i, timestep in enumerate(timesteps):
        sigma = sigmas[i]
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= steps - grad_steps):
            scaled = x / (sigma**2 + 1).sqrt()
            output = predict(scaled, torch.full((len(x),), timestep, device=x.device)).float()
            if prediction_type == "v_prediction":
                # x_0 = sqrt(alpha_bar) x_t − sqrt(1 − alpha_bar) v, and epsilon = (x − x_0) / sigma
                output = sigma * scaled / (sigma**2 + 1).sqrt() + output / (sigma**2 + 1).sqrt()
            x = x + (sigmas[i + 1] - sigma) * output
    return x
