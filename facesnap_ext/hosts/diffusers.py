"""diffusers: residuals are added to the inputs of the UNet's up blocks, where the features have their final size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.attention import AdapterHooks, Call
from facesnap_ext.hosts.unet import fitted
from facesnap_ext.residuals import Residuals


@contextmanager
def conditioned(pipe: Any, *people: Conditioning) -> Iterator[None]:
    """Condition every call of an SDXL pipeline inside the `with` block.

    This composes with a ControlNet pipeline: FaceSnap's residuals are added to those that the UNet already receives.

    Args:
        pipe: an SDXL pipeline from diffusers (text to image, image to image, inpainting, with or without ControlNet).
        people: one for each person in the image. Their `strength.hires` is ignored, because only the caller knows the
            passes.

    Raises:
        FaceSnapError: the widths of the pipeline's UNet differ from the widths of a person's FFRNet, or its
            cross-attentions do not match a person's adapter.
    """
    unet: nn.Module = pipe.unet
    widths = tuple(pipe.unet.config.block_out_channels)
    for person in people:
        if widths != person.ffrnet.config.widths:
            raise FaceSnapError(
                f"{person.name} was made for a UNet with channel widths {person.ffrnet.config.widths}, but this "
                f"pipeline's UNet has {widths}; choose a FaceSnap file made for it."
            )
    residuals = Residuals(people)
    adapters = AdapterHooks(residuals)
    # residuals of the current UNet call, including a ControlNet's; empty if no one is active
    current: list[Tensor] = []

    def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        adapters.call = None
        current.clear()
        progress = _progress(pipe)
        acting = [person.strength.acts_at(progress) for person in people]
        if not any(acting):
            return None
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        rows = len(sample)
        uncond = rows // 2 if pipe.do_classifier_free_guidance else 0  # unconditional rows come first
        is_cond = [row >= uncond for row in range(rows)]
        text_free = all(person.text_free for person in people)
        residuals.to(sample.device, sample.dtype)
        y = None if text_free else _pooled_text_and_sizes(pipe.unet, kwargs["added_cond_kwargs"])
        images = [*range(uncond), *range(rows - uncond)]
        announced = rows - uncond in (uncond, rows)  # one call for all copies of each image
        residuals.begin_evaluation()
        blended = residuals.rows(sample, timestep.expand(rows), is_cond, y, acting, images, announced)
        adapters.call = Call(tuple(is_cond), tuple(acting), tuple(images))
        if blended is None:
            return None
        *skips, middle = blended

        others = kwargs.pop("down_block_additional_residuals", None) or [0] * len(skips)
        other = kwargs.pop("mid_block_additional_residual", None)
        current[:] = [own + other for own, other in zip(skips, others)]
        current.append(middle if other is None else middle + other)
        return args, kwargs

    def add_residuals(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not current:
            return None
        hidden, skips = kwargs["hidden_states"], kwargs["res_hidden_states_tuple"]
        if len(current) == residual_count:  # the first up block receives the output of the middle block
            hidden = hidden + fitted(current.pop(), hidden)
        own = current[-len(skips) :]  # the decoder takes the skips from deep to shallow
        del current[-len(skips) :]
        kwargs["hidden_states"] = hidden
        kwargs["res_hidden_states_tuple"] = tuple([skip + fitted(one, skip) for skip, one in zip(skips, own)])
        return args, kwargs

    residual_count = len(people[0].ffrnet.config.skip_widths) + 1
    adapters.hook(unet)
    handles = [block.register_forward_pre_hook(add_residuals, with_kwargs=True) for block in pipe.unet.up_blocks]
    handles.append(unet.register_forward_pre_hook(prepare, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        adapters.remove()


def _progress(pipe: Any) -> float:
    """Progress of the pass, from 0 to 1."""
    scheduler = pipe.scheduler
    return ((scheduler.step_index or 0) - (scheduler.begin_index or 0)) / max(1, pipe.num_timesteps)


def _pooled_text_and_sizes(unet: Any, added: dict[str, Tensor]) -> Tensor:
    text, sizes = added["text_embeds"], added["time_ids"]
    return torch.cat([text, unet.add_time_proj(sizes.flatten()).reshape(len(sizes), -1).to(text.dtype)], dim=-1)
