"""Train the miniature's SDXL: the UNet and both text encoders, on latents of the miniature's VAE.

    python -m facesnap_lab.miniature.base_model --data DIR --vae DIR --out DIR --steps 20000

As in SDXL, the UNet predicts epsilon on the scaled-linear schedule. It receives the hidden states of two text encoders
side by side, the second one's pooled text and the image size. The null text is all zeros. Unlike in SDXL, the text
encoders are also trained, since there are no pretrained ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from facesnap_lab.miniature import dataset
from facesnap_lab.miniature.perception import to_tensor
from facesnap_lab.miniature.words import BEGIN, END, LENGTH, padded_ids, vocabulary, vocabulary_ids, write_tokenizer

WIDTHS = (64, 128, 128)
DEPTHS = (1, 1, 1)  # the first level has no attention and ignores its value
HEAD_WIDTH = 32
TEXT_WIDTHS = (48, 48)
SIZE_DIM = 32
NULL_TEXT = 0.1  # share of captions that training drops


def new_unet(
    sample_size: int = dataset.SIDE // 4, widths: tuple[int, ...] = WIDTHS, depths: tuple[int, ...] = DEPTHS
) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depths,
        attention_head_dim=tuple(width // HEAD_WIDTH for width in widths),
        cross_attention_dim=sum(TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_DIM,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * SIZE_DIM,
        use_linear_projection=True,
    )


def new_text_encoders() -> tuple[Any, Any]:
    """Create two text encoders with two layers each; like SDXL, only the penultimate hidden states are used."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = vocabulary_ids()
    configs = [
        CLIPTextConfig(
            vocab_size=len(vocabulary()[0]),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            bos_token_id=ids[BEGIN],
            eos_token_id=ids[END],
            pad_token_id=ids[END],
        )
        for width in TEXT_WIDTHS
    ]
    return CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])


def new_scheduler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


class BaseModel(nn.Module):
    """The UNet and the text encoders, trained together."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder, self.text_encoder_2 = new_text_encoders()

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ids [N,77] as SDXL's context [N,77,C] and pooled text [N,P]."""
        one = self.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        two = self.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([one, two.hidden_states[-2]], -1), two.text_embeds

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, null: Tensor, sizes: Tensor) -> Tensor:
        # captions repeat within a batch
        unique, place = torch.unique(ids, dim=0, return_inverse=True)
        context, pooled = (part[place] for part in self.text(unique))
        context, pooled = context * ~null[:, None, None], pooled * ~null[:, None]
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample


@torch.no_grad()
def encode_all(vae: Any, pictures: np.ndarray) -> Tensor:
    """Return the scaled latents [N,C,h,w] of images [N,S,S,3] uint8, on the CPU."""
    batches = (to_tensor(pictures[i : i + 64]).to(vae.device) for i in range(0, len(pictures), 64))
    return torch.cat([vae.encode(batch).latent_dist.mean.cpu() for batch in batches]) * vae.config.scaling_factor


def train(
    data: Path,
    vae_folder: Path,
    out: Path,
    steps: int,
    *,
    decay: float = 0.2,
    batch: int = 32,
    rate: float = 1e-3,
    bf16: bool = False,
    seed: int = 0,
) -> None:
    """Train, or resume from the state in `out`.

    Over the last part of the steps, the learning rate decays linearly to zero. Several processes
    (`python -m torch.distributed.run`) share each batch.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from diffusers import AutoencoderKL

    # the last layers of the text encoders are unused
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no", kwargs_handlers=[unused])
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    world = dataset.load(data / "train")
    cache = out / "latents.pt"
    if not cache.exists():
        torch.save(encode_all(vae, world.pictures), cache)
    latents = torch.load(cache, weights_only=True)
    ids = torch.tensor(padded_ids(world.captions))
    model = BaseModel(new_unet())
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    step = 0
    if (state := out / "state.pt").exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    alphas_cumprod = new_scheduler().alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)
    began, first, losses = time.time(), step, []
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    while step < steps:
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        left = (steps - step) / max(1, decay * steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 300, left)
        rows = torch.randint(len(latents), (batch,), generator=random)
        timesteps = torch.randint(1000, (batch,), generator=random)
        noise = torch.randn((batch, *latents.shape[1:]), generator=random)
        null = torch.rand(batch, generator=random) < NULL_TEXT
        side = torch.randint(64, 129, (batch, 1), generator=random).float()
        sizes = torch.cat([side, side, 0 * side, 0 * side, side, side], 1)
        rows, timesteps, noise, null, sizes = (part[mine] for part in (rows, timesteps, noise, null, sizes))
        a = alphas_cumprod[timesteps, None, None, None]
        noisy = a.sqrt() * latents[rows] + (1 - a).sqrt() * noise
        predicted = wrapped(noisy, timesteps, ids[rows], null, sizes).float()
        weight = snr[timesteps].clamp(max=5) / snr[timesteps]  # min-SNR (Hang et al., 2023)
        loss = ((predicted - noise).pow(2).mean((1, 2, 3)) * weight).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        keep = min(0.999, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        losses.append(loss.item())
        if step % 100 == 0 and accelerator.is_main_process:
            speed = (step - first) / (time.time() - began)
            print(f"step {step} loss {np.mean(losses[-300:]):.4f} {speed:.2f}/s", flush=True)
        if (step % 500 == 0 or step == steps) and accelerator.is_main_process:
            now = {"model": model.state_dict(), "average": average.state_dict(), "step": step}
            torch.save(now | {"optimizer": optimizer.state_dict()}, out / "state.new")
            (out / "state.new").replace(state)
            save_pipeline(average, vae, out / "pipeline")


def save_pipeline(model: BaseModel, vae: Any, folder: Path) -> None:
    """Write an SDXL folder in diffusers' layout, in half precision."""
    from diffusers import StableDiffusionXLPipeline

    tokenizer = write_tokenizer(folder / "tokenizer")
    parts = [copy.deepcopy(part).half() for part in (vae, model.text_encoder, model.text_encoder_2, model.unet)]
    StableDiffusionXLPipeline(
        vae=parts[0],
        text_encoder=parts[1],
        text_encoder_2=parts[2],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=parts[3],
        scheduler=new_scheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    for config in folder.rglob("*.json"):  # do not record local paths
        content = json.loads(config.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name / "tokenizer.json").unlink(missing_ok=True)  # its content depends on transformers' version
        write_tokenizer(folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the miniature's SDXL.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--decay", type=float, default=0.2)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    train(options.data, options.vae, options.out, options.steps, decay=options.decay, bf16=options.bf16)
