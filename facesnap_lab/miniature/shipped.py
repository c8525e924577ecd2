"""The miniature's trained networks, which are part of the package."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facesnap_ext.landmarks.flame import save_flame
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.search import find_models
from facesnap_lab.miniature.render import head

WEIGHTS = Path(__file__).with_name("weights")
SDXL = WEIGHTS / "sdxl"  # diffusers' layout
MODELS = WEIGHTS / "models"  # the content of a WebUI's models/facesnap, without FLAME
FACESNAP = MODELS / "facesnap.safetensors"
JUDGES = WEIGHTS / "judges"  # recognition models used for measuring only
LIGHTNING = WEIGHTS / "lightning.safetensors"

STEPS, SCALE = 12, 2.0
FEW_STEPS = 8  # as in the paper, with guidance 2; the LoRA was distilled for 4 steps, but 4 steps make images paler


def write_models(folder: Path) -> ModelFiles:
    """Write all model files that the engine needs to a folder; the miniature's head replaces FLAME."""
    shutil.copytree(MODELS, folder, dirs_exist_ok=True)
    flame = folder / "flame.safetensors"
    if not flame.exists():
        save_flame(flame, vars(head()), "the miniature's procedural head")
    return find_models(folder)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A pipeline with suitable numbers of steps and guidance."""

    pipe: Any
    steps: int
    scale: float  # classifier-free guidance scale; 1: no guidance


def base_sampler() -> Sampler:
    """Load the miniature's SDXL."""
    return with_base_scheduler(load_sdxl())


def few_step_sampler() -> Sampler:
    """Load the miniature's SDXL with its distilled LoRA, the counterpart of the paper's turbo checkpoint."""
    return with_lora(load_sdxl(), LIGHTNING)


def with_lora(pipe: Any, lora: Path, scale: float = SCALE) -> Sampler:
    """Merge a distilled LoRA into the pipeline's UNet, and set the scheduler for few steps and a guidance scale."""
    pipe.unet.load_lora_adapter(str(lora.parent), weight_name=lora.name, prefix="unet", local_files_only=True)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    return with_few_step_scheduler(pipe, scale)


def load_sdxl(folder: Path = SDXL) -> Any:
    """Load diffusers' pipeline of the miniature's SDXL in single precision on the CPU."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)


def with_base_scheduler(pipe: Any) -> Sampler:
    """Set the scheduler for the miniature's SDXL, or a model trained like it."""
    from diffusers import DPMSolverMultistepScheduler

    return _with_scheduler(
        pipe, DPMSolverMultistepScheduler, STEPS, SCALE, algorithm_type="dpmsolver++", use_karras_sigmas=True
    )


def with_few_step_scheduler(pipe: Any, scale: float = SCALE) -> Sampler:
    """Set the scheduler for a distilled UNet."""
    from diffusers import EulerDiscreteScheduler

    return _with_scheduler(
        pipe, EulerDiscreteScheduler, FEW_STEPS, scale, use_karras_sigmas=False, timestep_spacing="trailing"
    )


def _with_scheduler(pipe: Any, scheduler: Any, steps: int, scale: float, **settings: Any) -> Sampler:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe, steps, scale)
