"""The miniature's trained networks, as they come with FaceSnap."""

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
SDXL = WEIGHTS / "sdxl"  # diffusers' folder
MODELS = WEIGHTS / "models"  # what a WebUI's models/facesnap holds, but for FLAME
FACESNAP = MODELS / "facesnap.safetensors"
JUDGES = WEIGHTS / "judges"  # packs that only measure
LIGHTNING = WEIGHTS / "lightning.safetensors"

STEPS, SCALE = 12, 2.0
FEW_STEPS = 8  # the paper's, with its guidance of 2; the LoRA was distilled for 4, which it draws paler


def write_models(folder: Path) -> ModelFiles:
    """Fill a model folder with everything that the engine asks for; FLAME's place is taken by the miniature's head."""
    shutil.copytree(MODELS, folder, dirs_exist_ok=True)
    flame = folder / "flame.safetensors"
    if not flame.exists():
        save_flame(flame, vars(head()), "the miniature's procedural head")
    return find_models(folder)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A pipeline, and with how many steps and how much guidance it draws well."""

    pipe: Any
    steps: int
    scale: float  # of classifier-free guidance; 1: none


def base_sampler() -> Sampler:
    """The miniature's SDXL itself."""
    return many_steps(load_sdxl())


def few_step_sampler() -> Sampler:
    """The miniature's SDXL with its distilled LoRA: the counterpart of the turbo checkpoint that the paper uses."""
    pipe = load_sdxl()
    lora = {"weight_name": LIGHTNING.name, "prefix": "unet", "local_files_only": True}
    pipe.unet.load_lora_adapter(str(LIGHTNING.parent), **lora)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    return few_steps(pipe)


def load_sdxl() -> Any:
    """diffusers' pipeline of the miniature's SDXL, in single precision on the CPU."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(SDXL, torch_dtype=torch.float32, local_files_only=True)


def many_steps(pipe: Any) -> Sampler:
    """The pipeline with the sampler for the miniature's SDXL or one trained like it."""
    from diffusers import DPMSolverMultistepScheduler

    return _with_scheduler(
        pipe, DPMSolverMultistepScheduler, STEPS, algorithm_type="dpmsolver++", use_karras_sigmas=True
    )


def few_steps(pipe: Any) -> Sampler:
    """The pipeline, whose UNet is distilled, with the sampler for that."""
    from diffusers import EulerDiscreteScheduler

    return _with_scheduler(
        pipe, EulerDiscreteScheduler, FEW_STEPS, use_karras_sigmas=False, timestep_spacing="trailing"
    )


def _with_scheduler(pipe: Any, scheduler: Any, steps: int, **settings: Any) -> Sampler:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe, steps, SCALE)
