"""Run or resume a stage of the second edition's training.

    python -m facesnap_lab.miniature.second.train STAGE --out DIR --minutes N --device cpu

`data` renders the images, all splits in turn. The other stages train a network on the images that exist so far, and
write its figures and gate to `DIR/quality.json`: a VAE (`vae16`, `vae4`, `vae8`), a recognition network (`identity`,
`judge`, `judge_inner`, `details`), `clip`, the face detector (`detector`, into the pack `DIR/identity`), `deca`, and
`base`, the UNet and the text encoders. `clip` needs the figures of `identity`, `detector` its network, and `base` the
VAE `vae4`, and the detector for its gate. `lightning` distils `base` to few steps. `host_vae` is the base's VAE in the
layout of WebUIs. `inputs` writes the shards, the start file and the settings of `facesnap`, once all of these are
complete. `facesnap` trains with them, as `facesnap train DIR/facesnap/train.yaml --resume` does, and `measure` measures
it. `everything` runs all stages.

Every stage stops when time is up and resumes when it is called again. With `--minutes 0`, it is not trained, only
exported and measured again. On a CPU, each stage uses one thread, so two stages can run in parallel on two cores.
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
    measure,
    vae,
)
from facesnap_lab.miniature.second.loop import Compute
from facesnap_lab.miniature.shipped import load_sdxl, with_base_scheduler


def run_data(out: Path, minutes: float, compute: Compute) -> None:
    end = time.monotonic() + 60 * minutes
    for tenth in range(1, 11):
        for split, people in dataset.PEOPLE.items():
            left = (end - time.monotonic()) / 60
            if left <= 0 and tenth > 1:  # every split gets at least one person
                return
            part = people * tenth // 10
            done = dataset.build(out / "data" / split, split, people, left, until=part, workers=compute.workers)
            print(f"{split}: {done} of {people} people", flush=True)


def run_vae(name: str, out: Path, minutes: float, compute: Compute) -> None:
    from PIL import Image

    train_pictures = dataset.load(out / "data" / "train").pictures
    test_pictures = dataset.load(out / "data" / "test").pictures
    trained, steps = vae.train_vae(name, train_pictures, test_pictures, out / name, minutes=minutes, compute=compute)
    pairs = gates.cached_trait_pairs(out / "data" / "trait_pairs.npz")
    Image.fromarray(gates.sheet(trained, np.array(test_pictures[::37][:8]))).save(out / name / "sheet.png")
    finished = steps >= vae.RECIPES[name].steps
    figures = {"steps": steps, "finished": finished, **gates.measure(trained, test_pictures, pairs)}
    write_figures(out, name, figures)


def run_identity(name: str, out: Path, minutes: float, compute: Compute) -> None:
    world = {split: dataset.load(out / "data" / split) for split in dataset.PEOPLE}
    recipe = identity.RECIPES[name]
    network, steps = identity.train(name, world[recipe.split], out / name, minutes=minutes, compute=compute)
    identity.export(
        name, network, world[recipe.split], out / name
    )  # first, so that what is measured is the exported one
    network.to(compute.device)
    unseen = "judge" if recipe.split == "train" else "train"
    pairs = gates.cached_trait_pairs(out / "data" / "trait_pairs.npz")
    points = gates.trait_pair_points(len(pairs["original"]))
    measured = gates_identity.measure(name, network, (unseen, world[unseen]), ("test", world["test"]), pairs, points)
    write_figures(out, name, {"steps": steps, "finished": steps >= recipe.steps, **measured})


def run_clip(out: Path, minutes: float, compute: Compute) -> None:
    world = {split: dataset.load(out / "data" / split) for split in dataset.PEOPLE}
    clip, steps = clip_pair.train(world["train"], out / "clip", minutes=minutes, compute=compute)
    clip.save_pretrained(out / "clip" / "model")
    clip.to(compute.device)
    identity_figures = json.loads((out / "quality.json").read_text(encoding="utf-8"))["identity"]
    measured = clip_pair.measure(clip, ("judge", world["judge"]), ("test", world["test"]), identity_figures)
    write_figures(out, "clip", {"steps": steps, "finished": steps >= clip_pair.STEPS, **measured})


def run_detector(out: Path, minutes: float, compute: Compute) -> None:
    trained, steps = detector.train(
        dataset.load(out / "data" / "train"), out / "detector", minutes=minutes, compute=compute
    )
    measured = detector.measure(trained, out / "identity", dataset.load(out / "data" / "test"))
    write_figures(out, "detector", {"steps": steps, "finished": steps >= detector.STEPS, **measured})


def run_deca(out: Path, minutes: float, compute: Compute) -> None:
    trained, steps = deca.train(dataset.load(out / "data" / "train"), out / "deca", minutes=minutes, compute=compute)
    measured = deca.measure(trained, out / "deca", dataset.load(out / "data" / "test"))
    write_figures(out, "deca", {"steps": steps, "finished": steps >= deca.STEPS, **measured})


def run_host_vae(out: Path, minutes: float, compute: Compute) -> None:
    teacher = load_sdxl(out / "base" / "pipeline").vae.vae
    pictures = dataset.load(out / "data" / "train").pictures
    student, steps = host_vae.train(teacher, pictures, out / "host_vae", minutes=minutes, compute=compute)
    measured = host_vae.measure(student, teacher, np.array(dataset.load(out / "data" / "test").pictures[:480:4]))
    write_figures(out, "host_vae", {"steps": steps, "finished": steps >= host_vae.STEPS, **measured})


def run_base(out: Path, minutes: float, compute: Compute) -> None:
    vae = autoencoder.from_file(out / "vae4" / "vae.safetensors")
    _, steps = base.train(dataset.load(out / "data" / "train"), vae, out / "base", minutes=minutes, compute=compute)
    sampler = with_base_scheduler(load_sdxl(out / "base" / "pipeline").to(compute.device))
    measured = base.measure(sampler, _detector(out), out / "base" / "sheet.png")
    write_figures(out, "base", {"steps": steps, "finished": steps >= base.STEPS, **measured})


def run_lightning(out: Path, minutes: float, compute: Compute) -> None:
    folder, pipeline = out / "lightning", out / "base" / "pipeline"
    loaded = load_sdxl(pipeline).to(compute.device)
    latents = base.cached_latents(
        loaded.vae, dataset.load(out / "data" / "train").pictures, out / "base" / "latents.pt"
    )
    steps = lightning.train(loaded, latents, folder, minutes=minutes, compute=compute)
    measured = base.measure(lightning.load_few_step(out, compute.device), _detector(out), folder / "sheet.png")
    write_figures(out, "lightning", {"steps": steps, "finished": steps >= lightning.STEPS, **measured})


def run_inputs(out: Path, minutes: float, compute: Compute) -> None:
    print(facesnap.write_inputs(out, compute.workers))


def run_facesnap(out: Path, minutes: float, compute: Compute) -> None:
    steps, planned = facesnap.train(out, minutes=minutes, compute=compute)
    write_figures(out, "facesnap", {"steps": steps, "finished": steps >= planned})


def run_measure(out: Path, minutes: float, compute: Compute, seeds: int = measure.SEEDS) -> None:
    measure.measure_files(out, out / "facesnap" / facesnap.FILE, measure.PEOPLE, seeds, compute.device)


def _detector(out: Path) -> Any:
    """Return the detector of the pack, or None if it has not been trained yet."""
    from facesnap_ext.identity.faces import load_pack
    from facesnap_ext.weights.face_pack import pack_files

    pack = out / "identity"
    return load_pack(pack).detector if pack.is_dir() and pack_files(pack).detector else None


RunStage = Callable[[Path, float, Compute], None]
"""Runs or resumes a stage: the folder of all stages, the minutes, and how it is trained."""

STAGES: dict[str, RunStage] = {
    "data": run_data,
    **{name: partial(run_vae, name) for name in vae.RECIPES},
    **{name: partial(run_identity, name) for name in identity.RECIPES},
    "clip": run_clip,
    "detector": run_detector,
    "deca": run_deca,
    "host_vae": run_host_vae,
    "base": run_base,
    "lightning": run_lightning,
    "inputs": run_inputs,
    "facesnap": run_facesnap,
    "measure": run_measure,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run or resume a stage of the second edition's training.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="number of rendering processes")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    compute = Compute(options.device, workers=options.workers)
    STAGES[options.stage](options.out, options.minutes, compute)
