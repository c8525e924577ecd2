"""Data sets of the miniature world: folders of arrays, from which its networks are trained.

python -m facesnap_lab.miniature.dataset OUT --split train --people 4500 --shots 8
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facesnap_lab.miniature.captions import person_words, scene_caption
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import EXPRESSION_CODES, SHAPE_CODES, SPLITS, Person, Scene, person, scene

SIDE = 64


@dataclass(frozen=True, eq=False)
class World:
    """N images, grouped by person. The arrays are memory-mapped."""

    pictures: np.ndarray  # [N,S,S,3] uint8 RGB
    masks: np.ndarray  # [N,S,S] uint8, 255 on the head
    points: np.ndarray  # [N,72,2] float32 pixels
    boxes: np.ndarray  # [N,4] float32 pixels
    people: np.ndarray  # [N] int64, index of the person
    codes: np.ndarray  # [N,SHAPE_CODES+EXPRESSION_CODES+6+3] float32: shape, expression, pose, camera of the image
    captions: list[str]  # describe the scene only
    clip_captions: list[str]  # describe hair, beard and glasses, too


def captions_of(who: Person, what: Scene, shot: int) -> tuple[str, str]:
    """Return the caption of the scene, and CLIP's caption."""
    random = np.random.default_rng([SPLITS[who.split], who.index, shot, 8])
    text = scene_caption(what.expression, what.clothes, what.background, what.light, random)
    return text, f"{scene_caption(what.expression, what.clothes, what.background, what.light)}, {words_for(who)}"


def words_for(who: Person) -> str:
    """Return the description of a person in CLIP's captions."""
    return person_words(who.hair, who.hair_colour, who.beard > 0, who.glasses is not None)


def build(out: Path, split: str, people: int, shots: int, workers: int = 2, side: int = SIDE) -> None:
    """Render `shots` images of each of the split's first `people` people."""
    out.mkdir(parents=True, exist_ok=True)
    count = people * shots
    width = SHAPE_CODES + EXPRESSION_CODES + 6 + 3
    for name, kind, shape in (
        ("pictures", np.uint8, (side, side, 3)),
        ("masks", np.uint8, (side, side)),
        ("points", np.float32, (72, 2)),
        ("boxes", np.float32, (4,)),
        ("people", np.int64, ()),
        ("codes", np.float32, (width,)),
    ):
        np.lib.format.open_memmap(out / f"{name}.npy", "w+", kind, (count, *shape)).flush()
    texts: list[tuple[str, str]] = []
    with multiprocessing.Pool(workers) as pool:
        jobs = [(out, split, index, shots, side) for index in range(people)]
        for pairs in pool.imap(_render_person, jobs, chunksize=16):
            texts += pairs
    (out / "captions.json").write_text(json.dumps(texts), encoding="utf-8")


def load(folder: Path) -> World:
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("pictures", "masks", "points", "boxes", "people", "codes")
    }
    texts = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return World(**arrays, captions=[text for text, _ in texts], clip_captions=[text for _, text in texts])


def _render_person(job: tuple[Path, str, int, int, int]) -> list[tuple[str, str]]:
    out, split, index, shots, side = job
    import torch

    torch.set_num_threads(1)
    who = person(split, index)
    scenes = [scene(who, shot) for shot in range(shots)]
    rows = slice(index * shots, (index + 1) * shots)
    arrays = {path.stem: np.load(path, mmap_mode="r+") for path in out.glob("*.npy")}
    drawn = render([who] * shots, scenes, side)
    arrays["pictures"][rows] = [r.picture for r in drawn]
    arrays["masks"][rows] = [r.mask for r in drawn]
    arrays["points"][rows] = [r.points for r in drawn]
    arrays["boxes"][rows] = [r.box for r in drawn]
    arrays["people"][rows] = index
    arrays["codes"][rows] = [np.concatenate([who.shape, s.codes, s.pose, s.cam]) for s in scenes]
    return [captions_of(who, what, shot) for shot, what in enumerate(scenes)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render a data set of the miniature world.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--people", type=int, required=True)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    build(arguments.out, arguments.split, arguments.people, arguments.shots, arguments.workers)
