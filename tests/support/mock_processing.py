"""An outline of A1111's `modules/processing.py`: the order in which a job calls the callbacks of scripts, which
attributes it has at each of them, and what scripts must clean up themselves.

Sampling is `world.draw(p, index, people)`, which by default returns one colour per seed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.hosts.errors import Refusal


class Runner:
    """The host's `ScriptRunner`, which swallows the exceptions of scripts."""

    def __init__(self, *scripts: Any):
        self.alwayson_scripts = list(scripts)
        self.callback_map: dict[str, Any] = {}

    def call(self, callback: str, p: Any, *args: Any, **kwargs: Any) -> None:
        for script in self.alwayson_scripts:
            method = getattr(script, callback, lambda *args, **kwargs: None)
            with suppress(Exception):
                method(p, *args, *p.script_args[script.args_from : script.args_to], **kwargs)


@dataclass
class Processing:
    """`StableDiffusionProcessing`. Like the host's, it is compared by value and therefore not hashable."""

    world: Any = None
    prompt: Any = "portrait"
    negative_prompt: Any = ""
    seed: Any = 1
    subseed: Any = 7
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 8
    cfg_scale: float = 2.0
    sampler_name: str = "Euler"
    tiling: bool = False
    is_api: bool = False
    restore_faces: bool | None = None
    width: int = 512
    height: int = 512
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    outpath_samples: str = "samples"
    outpath_grids: str = "grids"
    mask_for_overlay: Any = None
    extra_generation_params: dict[str, Any] = field(default_factory=dict)
    script_args: Any = ()
    scripts: Any = None
    iteration: int = 0
    comments: list[str] = field(default_factory=list)
    closed: bool = False

    sd_model = SimpleNamespace(applied_token_merged_ratio=0.0)

    def comment(self, text: str) -> None:
        self.comments.append(text)

    def init_image(self, index: int) -> Image.Image | None:
        return None

    def save_samples(self) -> bool:
        world = self.world or _worlds[-1]
        opts, state = world.opts, world.state
        complete = getattr(opts, "save_incomplete_images", False) or (not state.interrupted and not state.skipped)
        return getattr(opts, "samples_save", False) and not self.do_not_save_samples and complete

    def close(self) -> None:
        self.closed = True


@dataclass
class Img2Img(Processing):
    """`StableDiffusionProcessingImg2Img`."""

    init_images: Any = None
    denoising_strength: float = 0.75
    resize_mode: int = 0
    paste_to: Any = None

    def init_image(self, index: int) -> Image.Image | None:
        return self.init_images[0]


def process_images(p: Processing) -> SimpleNamespace:
    world = p.world or _worlds[-1]
    state = world.state
    p.scripts.call("before_process", p)
    prompts = p.prompt if isinstance(p.prompt, list) else [p.prompt] * (p.n_iter * p.batch_size)
    p.all_prompts = prompts
    p.all_negative_prompts = [p.negative_prompt] * len(prompts)
    p.all_seeds = p.seed if isinstance(p.seed, list) else [p.seed + i for i in range(len(prompts))]
    p.all_subseeds = p.subseed if isinstance(p.subseed, list) else [p.subseed + i for i in range(len(prompts))]
    p.scripts.call("process", p)
    if state.job_count == -1:
        state.job_count = p.n_iter
    images, infotexts = [], []
    for n in range(p.n_iter):
        p.iteration = n
        state.skipped = False
        if state.interrupted:
            break
        batch = slice(n * p.batch_size, (n + 1) * p.batch_size)
        p.prompts, p.negative_prompts = p.all_prompts[batch], p.all_negative_prompts[batch]
        p.seeds, p.subseeds = p.all_seeds[batch], p.all_subseeds[batch]
        if not p.prompts:
            break
        p.scripts.call("process_batch", p, batch_number=n, prompts=p.prompts, seeds=p.seeds, subseeds=p.subseeds)
        if n == 0 and not world.cmd_opts.no_prompt_history:
            world.history.append(p.prompts[0])
        p.scripts.call("process_before_every_sampling", p, x=None, noise=None, c=None, uc=None)
        people = world.in_force()
        if isinstance(people, Refusal):
            raise people.error()
        drawn = [world.draw(p, i, people) for i in range(len(p.prompts))]
        p.scripts.call("post_sample", p, None)
        state.job_no += 1
        for i, image in enumerate(drawn):
            p.batch_index = i
            result = SimpleNamespace(image=image)
            p.scripts.call("postprocess_image", p, result)
            result = SimpleNamespace(image=world.overlay(result.image))
            p.scripts.call("postprocess_image_after_composite", p, result)
            infotext = {"Seed": p.seeds[i], **p.extra_generation_params}
            finish_image(p, world, result.image, infotext, i, images)
            infotexts.append(infotext)
    world.sd_model.applied_token_merged_ratio = 0.0  # as in the host after every job, nested ones included
    processed = make_processed(p, world, images, infotexts)
    p.scripts.call("postprocess", p, processed)
    return processed


def finish_image(p: Processing, world: Any, image: Image.Image, infotext: Any, i: int, images: list[Any]) -> None:
    """The host's lines after `postprocess_image_after_composite` (modules/processing.py, 1083 to 1109 in 1.10.1)."""
    opts = world.opts
    save = p.save_samples()
    if save:
        world.save_image(
            image, p.outpath_samples, "", p.seeds[i], p.prompts[i], opts.samples_format, info=infotext, p=p
        )
    if getattr(opts, "enable_pnginfo", False):
        image.info["parameters"] = infotext
    images.append(image)
    if p.mask_for_overlay is not None:
        if opts.return_mask:
            images.append(p.mask_for_overlay.convert("RGB"))
        if opts.return_mask_composite:
            images.append(image.convert("RGBA"))


def make_processed(p: Processing, world: Any, images: list[Any], infotexts: list[Any]) -> SimpleNamespace:
    """The host's grid and its `Processed` (modules/processing.py, 519 to 574 and 1121 to 1145 in 1.10.1)."""
    opts, first = world.opts, 0
    if not infotexts:
        infotexts.append({})
    unwanted = len(images) < 2 and getattr(opts, "grid_only_if_multiple", True)
    return_grid, save_grid = getattr(opts, "return_grid", False), getattr(opts, "grid_save", False)
    if (return_grid or save_grid) and not p.do_not_save_grid and not unwanted:
        grid = world.image_grid(images, p.batch_size)
        if return_grid:
            infotexts.insert(0, dict(infotexts[0]))
            images.insert(0, grid)
            first = 1
        if save_grid:
            world.save_image(
                grid,
                p.outpath_grids,
                "grid",
                p.all_seeds[0],
                p.all_prompts[0],
                opts.grid_format,
                info={},
                p=p,
                grid=True,
            )
    return SimpleNamespace(
        images=images,
        infotexts=infotexts,
        info=infotexts[0],
        index_of_first_image=first,
        comments="".join(f"{comment}\n" for comment in p.comments),
        seed=p.all_seeds[0],
        subseed=p.all_subseeds[0],
        all_prompts=p.all_prompts,
        all_negative_prompts=p.all_negative_prompts,
        all_seeds=p.all_seeds,
        all_subseeds=p.all_subseeds,
        extra_images=[],
    )


def colour(p: Processing, index: int, people: Any) -> Image.Image:
    """An image of one colour, which depends on the seed."""
    shade = np.random.default_rng(p.seeds[index]).integers(0, 256, 3, np.uint8)
    return Image.fromarray(np.broadcast_to(shade, (p.height, p.width, 3)).copy())


_worlds: list[Any] = []  # the current mock host


def install(world: Any) -> None:
    """Add what jobs need to the mock host of `mock_webui.install`."""
    _worlds[:] = [world]
    world.draw, world.history, world.calls = colour, [], []
    world.overlay = lambda image: image
    world.sd_model = Processing.sd_model
    world.in_force = lambda: world.calls[-1][1] if world.calls and isinstance(world.calls[-1], tuple) else None
