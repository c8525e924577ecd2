"""Run or resume a stage of the second edition's training.

    python -m facesnap_lab.miniature.second.train STAGE --out DIR --minutes N --device cpu

`data` renders the images, all splits in turn. The other stages train a network on the images that exist so far, and
write its figures and gate to `DIR/quality.json`: a VAE (`vae16`, `vae4`, `vae8`), a recognition network (`identity`,
`judge`, `judge_inner`, `details`), `clip`, the face detector (`detector`, into the pack `DIR/identity`), `deca`, and
`base`, the UNet and the text encoders. `clip` needs the figures of `identity`, `detector` its network, and `base` the
VAE `vae4`, and the detector for its gate. `lightning` distils `base` to few steps. `host_vae` is `vae4` in the layout
of WebUIs. `inputs` writes what `facesnap train DIR/facesnap/train.yaml` needs, once all of these are complete.

Every stage stops when the minutes are over and resumes when it is called again. With `--minutes 0`, it is only
measured. On a CPU, each stage uses one thread, so two stages can run in parallel on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facesnap_lab.miniature.perception import write_figures
from facesnap_lab.miniature.second import (
    autoencoder,
    base,
    clip_pair,
    dataset,
    deca,
    detector,
    facesnap,
    gates,
    gates_identity,
    host_vae,
    identity,
    lightning,
    vae,
)
from facesnap_lab.miniature.shipped import load_sdxl, with_base_scheduler, with_lora


def run_data(out: Path, minutes: float, workers: int) -> None:
    end = time.monotonic() + 60 * minutes
    for tenth in range(1, 11):
        for split, people in dataset.PEOPLE.items():
            left = (end - time.monotonic()) / 60
            if left <= 0:
                return
            part = people * tenth // 10
            done = dataset.build(out / "data" / split, split, people, left, until=part, workers=workers)
            print(f"{split}: {done} of {people} people", flush=True)


def run_vae(name: str, out: Path, minutes: float, device: str) -> None:
    from PIL import Image

    train_pictures = dataset.load(out / "data" / "train").pictures
    test_pictures = dataset.load(out / "data" / "test").pictures
    trained, steps = vae.train_vae(name, train_pictures, test_pictures, out / name, minutes=minutes, device=device)
    pairs = gates.cached_trait_pairs(out / "data" / "trait_pairs.npz")
    Image.fromarray(gates.sheet(trained, np.array(test_pictures[::37][:8]))).save(out / name / "sheet.png")
    finished = steps >= vae.RECIPES[name].steps
    figures = {"steps": steps, "finished": finished, **gates.measure(trained, test_pictures, pairs)}
    write_figures(out, name, figures)


def run_identity(name: str, out: Path, minutes: float, device: str) -> None:
    world = {split: dataset.load(out / "data" / split) for split in dataset.PEOPLE}
    recipe = identity.RECIPES[name]
    network, steps = identity.train(name, world[recipe.split], out / name, minutes=minutes, device=device)
    identity.export(
        name, network, world[recipe.split], out / name
    )  # first, so that what is measured is the exported one
    unseen = "judge" if recipe.split == "train" else "train"
    pairs = gates.cached_trait_pairs(out / "data" / "trait_pairs.npz")
    points = gates.trait_pair_points(len(pairs["original"]))
    measured = gates_identity.measure(name, network, (unseen, world[unseen]), ("test", world["test"]), pairs, points)
    write_figures(out, name, {"steps": steps, "finished": steps >= recipe.steps, **measured})


def run_clip(out: Path, minutes: float, device: str) -> None:
    world = {split: dataset.load(out / "data" / split) for split in dataset.PEOPLE}
    clip, steps = clip_pair.train(world["train"], out / "clip", minutes=minutes, device=device)
    clip.save_pretrained(out / "clip" / "model")
    identity_figures = json.loads((out / "quality.json").read_text(encoding="utf-8"))["identity"]
    measured = clip_pair.measure(clip, ("judge", world["judge"]), ("test", world["test"]), identity_figures)
    write_figures(out, "clip", {"steps": steps, "finished": steps >= clip_pair.STEPS, **measured})


def run_detector(out: Path, minutes: float, device: str) -> None:
    trained, steps = detector.train(dataset.load(out / "data" / "train"), out / "detector", minutes=minutes)
    measured = detector.measure(trained, out / "identity", dataset.load(out / "data" / "test"))
    write_figures(out, "detector", {"steps": steps, "finished": steps >= detector.STEPS, **measured})


def run_deca(out: Path, minutes: float, device: str) -> None:
    trained, steps = deca.train(dataset.load(out / "data" / "train"), out / "deca", minutes=minutes)
    measured = deca.measure(trained, out / "deca", dataset.load(out / "data" / "test"))
    write_figures(out, "deca", {"steps": steps, "finished": steps >= deca.STEPS, **measured})


def run_host_vae(out: Path, minutes: float, device: str) -> None:
    teacher = vae.load_vae(out / "vae4" / "vae.safetensors")
    pictures = dataset.load(out / "data" / "train").pictures
    student, steps = host_vae.train(teacher, pictures, out / "host_vae", minutes=minutes)
    measured = host_vae.measure(student, teacher, np.array(dataset.load(out / "data" / "test").pictures[:480:4]))
    write_figures(out, "host_vae", {"steps": steps, "finished": steps >= host_vae.STEPS, **measured})


def run_base(out: Path, minutes: float, device: str) -> None:
    vae = autoencoder.from_file(out / "vae4" / "vae.safetensors")
    _, steps = base.train(dataset.load(out / "data" / "train"), vae, out / "base", minutes=minutes, device=device)
    sampler = with_base_scheduler(load_sdxl(out / "base" / "pipeline"))
    measured = base.measure(sampler, _detector(out), out / "base" / "sheet.png")
    write_figures(out, "base", {"steps": steps, "finished": steps >= base.STEPS, **measured})


def run_lightning(out: Path, minutes: float, device: str) -> None:
    folder, pipeline = out / "lightning", out / "base" / "pipeline"
    latents = torch.load(out / "base" / "latents.pt", weights_only=True)
    steps = lightning.train(load_sdxl(pipeline), latents, folder, minutes=minutes)
    sampler = with_lora(load_sdxl(pipeline), folder / lightning.FILE)
    measured = base.measure(sampler, _detector(out), folder / "sheet.png")
    write_figures(out, "lightning", {"steps": steps, "finished": steps >= lightning.STEPS, **measured})


def run_inputs(out: Path, minutes: float, device: str) -> None:
    print(facesnap.write_inputs(dataset.load(out / "data" / "train"), out))


def _detector(out: Path) -> Any:
    """Return the detector of the pack, or None if it has not been trained yet."""
    from facesnap_ext.identity.faces import load_pack
    from facesnap_ext.weights.face_pack import pack_files

    pack = out / "identity"
    return load_pack(pack).detector if pack.is_dir() and pack_files(pack).detector else None


STAGES: dict[str, Callable[[Path, float, str], None]] = {
    **{name: partial(run_vae, name) for name in vae.RECIPES},
    **{name: partial(run_identity, name) for name in identity.RECIPES},
    "clip": run_clip,
    "detector": run_detector,
    "deca": run_deca,
    "host_vae": run_host_vae,
    "base": run_base,
    "lightning": run_lightning,
    "inputs": run_inputs,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run or resume a stage of the second edition's training.")
    parser.add_argument("stage", choices=("data", *STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="number of rendering processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage == "data":
        run_data(options.out, options.minutes, options.workers)
    else:
        STAGES[options.stage](options.out, options.minutes, options.device)
