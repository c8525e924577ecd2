"""Distil the miniature's SDXL to four steps as a LoRA: the few-step model that L_id samples with.

    python -m facesnap_lab.miniature.distil --data DIR --base DIR --out FILE

One step of the student learns several guided steps of the base (Salimans and Ho, 2022; Lin et al., 2024), starting from
noised images of the world. The student then needs neither guidance nor many steps.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_lab.miniature import dataset
from facesnap_lab.miniature.base_model import encode_all

STEPS = 4
TEACHER_STEPS = 3  # steps of the base per step of the student
GUIDANCE_SCALE = 2.0
RANK = 8
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


def distil(data: Path, base: Path, out: Path, steps: int, batch: int = 16, rate: float = 5e-4, seed: int = 0) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float32, local_files_only=True)
    world = dataset.load(data / "train")
    latents = encode_all(pipe.vae, world.pictures[: 64 * 200])
    torch.manual_seed(seed)
    distillation = Distillation(pipe, latents, world.captions, dataset.SIDE)
    optimizer = torch.optim.AdamW(distillation.trained, rate, weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    total = 0.0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 20, (steps - step + 1) / (0.5 * steps))
        loss = distillation.loss(batch, random)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(distillation.trained, 1.0)
        optimizer.step()
        total = 0.95 * total + 0.05 * loss.item() if step > 1 else loss.item()
        if step % 25 == 0 or step == steps:
            print(f"step {step} loss {total:.4f}", flush=True)
    distillation.save(out)


class Distillation:
    """The teacher, the student, which is the pipeline's UNet with a LoRA, and what they learn from.

    Args:
        pipe: on the device that is used.
        latents: of the world's images, scaled, [N,C,H,W].
        captions: of the same images.
        side: of the images in pixels.
        rank: of the LoRA.
        bf16: whether the UNets compute in bfloat16.
    """

    def __init__(
        self,
        pipe: Any,
        latents: Tensor,
        captions: Sequence[str],
        side: int,
        rank: int = RANK,
        bf16: bool = False,
    ) -> None:
        from peft import LoraConfig

        self.pipe, self.latents, self.captions, self.side, self.bf16 = pipe, latents, captions, side, bf16
        self.device = pipe.unet.device
        alphas_cumprod = pipe.scheduler.alphas_cumprod
        self.sigmas = torch.cat([((1 - alphas_cumprod) / alphas_cumprod).sqrt(), torch.zeros(1)])  # last: timestep -1
        # trailing timesteps, then -1
        self.edges = torch.linspace(1000, 0, STEPS * TEACHER_STEPS + 1).round().long() - 1
        self.teacher = copy.deepcopy(pipe.unet).eval().requires_grad_(False)
        self.student = pipe.unet.requires_grad_(False)
        self.student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
        self.trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}

    def loss(self, batch: int, random: torch.Generator) -> Tensor:
        """Return the error of one step of the student against `TEACHER_STEPS` guided steps of the teacher."""
        rows = torch.randint(len(self.latents), (batch,), generator=random)
        context, pooled = _text(self.pipe, [self.captions[row] for row in rows.tolist()], self.texts)
        stage = torch.randint(STEPS, (batch,), generator=random)
        start = self.latents[rows].float().to(self.device)
        noise = torch.randn(start.shape, generator=random).to(self.device)
        first = self.edges[stage * TEACHER_STEPS]
        x = start + noise * self._column(self.sigmas[first])
        goal = x
        with torch.no_grad():
            for part in range(TEACHER_STEPS):
                here, there = (self.edges[stage * TEACHER_STEPS + part + i] for i in (0, 1))
                epsilon = self._guided(goal, here, context, pooled)
                goal = goal + self._column(self.sigmas[there] - self.sigmas[here]) * epsilon
        last = self.edges[(stage + 1) * TEACHER_STEPS]
        stride = self._column(self.sigmas[last] - self.sigmas[first])
        predicted = self._predict(self.student, x, first, context, pooled)
        target = (goal - x) / stride
        # weight errors by their effect on the image, bounded for early steps
        weight = (stride**2).clamp(max=16.0) + 0.1
        return (weight * (predicted - target) ** 2).mean()

    def _column(self, values: Tensor) -> Tensor:
        """Return values [N] as [N,1,1,1] on the device of the networks."""
        return values[:, None, None, None].to(self.device)

    def save(self, out: Path) -> None:
        """Write the LoRA."""
        from diffusers import StableDiffusionXLPipeline
        from peft import get_peft_model_state_dict

        out.parent.mkdir(parents=True, exist_ok=True)
        lora = {key: tensor.half().cpu() for key, tensor in get_peft_model_state_dict(self.student).items()}
        StableDiffusionXLPipeline.save_lora_weights(out.parent, unet_lora_layers=lora, weight_name=out.name)

    def _guided(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        both = self._predict(
            self.teacher,
            torch.cat([x, x]),
            torch.cat([t, t]),
            torch.cat([0 * context, context]),
            torch.cat([0 * pooled, pooled]),
        )
        without, with_text = both.chunk(2)
        return without + GUIDANCE_SCALE * (with_text - without)

    def _predict(self, unet: Any, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Predict epsilon at x = x_0 + sigma × epsilon."""
        scaled = x / self._column((self.sigmas[t] ** 2 + 1).sqrt())
        sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]] * len(x)).float().to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return unet(
                scaled, t.to(self.device), context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
            ).sample.float()


def _text(pipe: Any, captions: list[str], cache: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    for caption in captions:
        if caption not in cache:
            with torch.no_grad():
                context, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
            cache[caption] = (context, pooled)
    context, pooled = (torch.cat(parts) for parts in zip(*(cache[caption] for caption in captions)))
    return context, pooled


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Distil the miniature's SDXL to four steps.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    distil(options.data, options.base, options.out, options.steps)
