"""Images of the second edition's people: folders of arrays that grow person by person, so that rendering can resume."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facesnap_ext.files import atomic_write
from facesnap_lab.miniature.captions import scene_caption
from facesnap_lab.miniature.second.render import SIDE, render
from facesnap_lab.miniature.second.world import SHOTS_PER_LOOK, person, scene, subject
from facesnap_lab.miniature.world import EXPRESSION_CODES, SHAPE_CODES, SPLITS

SHOTS = 4 * SHOTS_PER_LOOK
PEOPLE = {"test": 400, "train": 3000, "judge": 1500}  # 58,800 images
FLUSH_EVERY = 60.0  # seconds


@dataclass(frozen=True, eq=False)
class World:
    """The N images rendered so far, grouped by person and then by look. The arrays are memory-mapped."""

    pictures: np.ndarray  # [N,S,S,3] uint8 RGB
    masks: np.ndarray  # [N,S,S] uint8, 255 on the head
    points: np.ndarray  # [N,72,2] float32 pixels
    boxes: np.ndarray  # [N,4] float32 pixels
    codes: np.ndarray  # [N,SHAPE_CODES+EXPRESSION_CODES+6+3] float32: shape, expression, pose, camera of the image
    people: np.ndarray  # [N] int64, index of the person
    looks: np.ndarray  # [N] int64, number of the person's look


def build(
    folder: Path,
    split: str,
    people: int,
    minutes: float,
    *,
    until: int | None = None,
    shots: int = SHOTS,
    side: int = SIDE,
    workers: int = 1,
) -> int:
    """Render the split's first people, or resume where an earlier call stopped.

    Args:
        until: number of people after which this call stops; by default, it renders all of them.

    Returns:
        The number of people that are complete.
    """
    until = people if until is None else until
    saved = time.monotonic()
    end = saved + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"split": split, "people": people, "shots": shots, "side": side}
    done = progress(folder, plan)
    if done >= until:
        return done
    arrays = _arrays(folder, people * shots, side, new=done == 0)
    with _renderer(workers) as imap:
        for rows in imap(_render_person, ((split, index, shots, side) for index in range(done, until))):
            for name, values in rows.items():
                arrays[name][done * shots : (done + 1) * shots] = values
            done += 1
            now = time.monotonic()
            if now >= saved + FLUSH_EVERY or now >= end or done == until:
                saved = now
                for array in arrays.values():
                    array.flush()
                with atomic_write(folder / "progress.json") as part:
                    part.write_text(json.dumps({**plan, "done": done}), encoding="utf-8")
            if now >= end:
                break
    return done


def progress(folder: Path, plan: dict[str, object]) -> int:
    """Return how many people in the folder are complete.

    Raises:
        ValueError: the folder was started with a different plan.
    """
    file = folder / "progress.json"
    if not file.exists():
        return 0
    state = json.loads(file.read_text(encoding="utf-8"))
    done = state.pop("done")
    if state != plan:
        raise ValueError(f"{folder} was started with {state}, not {plan}; choose another folder.")
    return done


def load(folder: Path) -> World:
    """Load the people that are complete.

    Raises:
        FileNotFoundError: no person is complete yet.
    """
    file = folder / "progress.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} contains no images yet; run the stage `data` first.")
    state = json.loads(file.read_text(encoding="utf-8"))
    count, shots = state["done"] * state["shots"], state["shots"]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r")[:count] for name in _columns(state["side"])}
    shot = np.tile(np.arange(shots), state["done"])
    return World(**arrays, people=np.arange(count) // shots, looks=shot // SHOTS_PER_LOOK)


def caption(split: str, index: int, shot: int) -> str:
    """Return the caption of a shot, which describes the scene only and sometimes omits parts of it."""
    what = scene(person(split, index), shot)
    random = np.random.default_rng([2, SPLITS[split], index, shot, 8])
    return scene_caption(what.expression, what.clothes, what.background, what.light, random)


def _columns(side: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    return {
        "pictures": (np.uint8, (side, side, 3)),
        "masks": (np.uint8, (side, side)),
        "points": (np.float32, (72, 2)),
        "boxes": (np.float32, (4,)),
        "codes": (np.float32, (SHAPE_CODES + EXPRESSION_CODES + 6 + 3,)),
    }


def _arrays(folder: Path, count: int, side: int, new: bool) -> dict[str, np.memmap]:
    if new:  # the files are sparse, so they take up disk space only as they are filled
        return {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (count, *shape))
            for name, (kind, shape) in _columns(side).items()
        }
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _columns(side)}


@contextmanager
def _renderer(workers: int) -> Iterator:
    if workers == 1:
        yield map
        return
    with multiprocessing.Pool(workers) as pool:
        yield pool.imap


def _render_person(job: tuple[str, int, int, int]) -> dict[str, np.ndarray]:
    split, index, shots, side = job
    import torch

    torch.set_num_threads(1)
    scenes = [scene(person(split, index), shot) for shot in range(shots)]
    subjects = [subject(split, index, shot) for shot in range(shots)]
    drawn = render(subjects, scenes, side)
    return {
        "pictures": np.stack([r.picture for r in drawn]),
        "masks": np.stack([r.mask for r in drawn]),
        "points": np.stack([r.points for r in drawn]),
        "boxes": np.stack([r.box for r in drawn]),
        "codes": np.stack([np.concatenate([w.shape, s.codes, s.pose, s.cam]) for w, s in zip(subjects, scenes)]),
    }
