"""Drawing a list's cases with FaceSnap, on as many processes as accelerate was started with.

Each picture is written whole or not at all and carries what it was drawn with and what it cost, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from facesnap_ext import photos
from facesnap_ext.convert import convert_originals
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write, sha256
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.source import paths_of
from facesnap_lab.evaluation.protocol import Case

NOTE = "facesnap evaluate"  # the PNG text under which a picture says what it is


@dataclass(frozen=True, eq=False)
class Studio:
    """FaceSnap and a base model, ready to draw. scale: of classifier-free guidance."""

    pipe: Any
    engine: Engine
    files: ModelFiles
    base: str  # the base model's name
    model: str = ""  # the FaceSnap file's name, where there are several
    width: int = 1024
    height: int = 1024
    steps: int = 8
    scale: float = 2.0

    def draw(self, case: Case) -> np.ndarray:
        """[height,width,3] uint8.

        Raises:
            FaceSnapError: a photo has no face, or a model file is missing or unfit.
        """
        unit = Unit(
            enabled=True,
            references=tuple(map(photos.from_path, case.identity.references)),
            driving=photos.from_path(case.pose.photo),
            model=self.model,
        )
        with conditioned(self.pipe, self.engine.prepare(unit, self.width, self.height).conditioning):
            drawn = self.pipe(
                case.prompt.text,
                width=self.width,
                height=self.height,
                num_inference_steps=self.steps,
                guidance_scale=self.scale,
                generator=torch.Generator().manual_seed(case.seed),
            )
        return np.asarray(drawn.images[0])

    def recipe(self, case: Case) -> dict[str, Any]:
        """What decides how a case's picture looks, ready for JSON: photos and the FaceSnap file by their hashes, the
        base by its name; encoders are taken for what the FaceSnap file wants."""
        facesnap = self.files.choose_facesnap(self.model)
        paths = paths_of(facesnap)
        return {
            "base": self.base,
            "sampler": type(self.pipe.scheduler).__name__,
            "facesnap": [paths[0].name, *map(_digest, paths)],
            "references": [_digest(path) for path in case.identity.references],
            "driving": _digest(case.pose.photo),
            "prompt": case.prompt.text,
            "seed": case.seed,
            "size": [self.width, self.height],
            "steps": self.steps,
            "scale": self.scale,
        }


@dataclass(frozen=True)
class Cost:
    """What pictures cost: the median of seconds, and the most memory of all, in bytes.

    memory_kind: "GPU", what torch had allocated, or "process", the whole process's resident memory on the CPU.
    """

    seconds: float
    memory: int | None
    memory_kind: str
    device: str


def load_studio(
    base: Path,
    base_config: Path | None,
    find_models: Callable[[], ModelFiles],
    device: torch.device,
    dtype: torch.dtype,
    **settings: Any,
) -> Studio:
    """Load an SDXL model with the paper's sampler, DPM++ SDE.

    Args:
        base, base_config: as `training.frozen.load_base` takes them. settings: further fields of `Studio`.

    Raises:
        FaceSnapError: the base is missing or not SDXL, or there is no FaceSnap file.
    """
    from diffusers import DPMSolverSinglestepScheduler

    from facesnap_lab.training.frozen import load_base

    files = find_models()
    files.choose_facesnap(settings.get("model", ""))
    convert_originals(files, lambda message: print(message, file=sys.stderr))
    pipe = load_base(base, base_config, dtype)
    pipe.scheduler = DPMSolverSinglestepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, lower_order_final=True
    )
    pipe.set_progress_bar_config(disable=True)
    return Studio(pipe.to(device), Engine(find_models), find_models(), base.name, **settings)


def check_faces(studio: Studio, cases: Sequence[Case]) -> None:
    """Look for the faces of all references and driving photos, so that none is found missing hours later.

    Raises:
        FaceSnapError: a photo cannot be read or has no face.
    """
    for path in dict.fromkeys(path for case in cases for path in (*case.identity.references, case.pose.photo)):
        studio.engine.encoders(studio.files).face(photos.from_path(path))


def processes() -> Any:
    """accelerate's `PartialState`: the processes that share the work, and this one's device."""
    from accelerate import PartialState
    from accelerate.utils import is_cuda_available, is_mps_available, is_npu_available, is_xpu_available

    found = (known() for known in (is_cuda_available, is_mps_available, is_npu_available, is_xpu_available))
    return PartialState(
        cpu=not any(found),  # unless it is told so, each of several processes on a CPU thinks itself alone
        timeout=timedelta(hours=12),  # one looks at all real photos while the others wait
    )


def draw_cases(studio: Studio, cases: Sequence[Case], out: Path) -> Cost:
    """Draw the cases that `out` does not have yet, each in one of accelerate's processes.

    Args:
        studio: with `draw` and `recipe`.

    Raises:
        FaceSnapError: `out` has pictures that were drawn otherwise, a photo has no face, or the disk is full.
    """
    from tqdm import tqdm

    state = processes()
    left = [case for case in cases if not _is_drawn(out / case.file, studio.recipe(case))]
    state.wait_for_everyone()  # else one could take for drawn before what another has begun to draw
    done = len(cases) - len(left)
    with state.split_between_processes(left) as own:
        share = max(1, state.num_processes)
        with tqdm(total=len(cases), initial=done, desc="drawing", disable=not state.is_main_process) as bar:
            for case in own:
                _draw_case(studio, case, out / case.file, state.device)
                bar.update(min(share, len(cases) - bar.n))
    state.wait_for_everyone()
    return cost(cases, out)


def cost(cases: Sequence[Case], out: Path) -> Cost:
    """What the pictures say of themselves. Of two kinds of device the first picture's counts."""
    notes = [_note(out / case.file, whole=False) for case in cases]
    notes = [note for note in notes if note["device"] == notes[0]["device"]]
    memory = [note["memory"] for note in notes if note["memory"]]
    return Cost(
        statistics.median(note["seconds"] for note in notes),
        max(memory, default=None),
        notes[0]["memory_kind"],
        notes[0]["device"],
    )


def _draw_case(studio: Studio, case: Case, path: Path, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    picture = studio.draw(case)
    seconds = time.perf_counter() - began  # the picture is on the CPU: the GPU is done
    note = studio.recipe(case) | {
        "seconds": round(seconds, 4),
        "memory": torch.cuda.max_memory_allocated(device) if on_gpu else _peak_of_process(),
        "memory_kind": "GPU" if on_gpu else "process",
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
    }
    information = PngInfo()
    information.add_text(NOTE, json.dumps(note))
    try:
        with atomic_write(path) as part:
            Image.fromarray(picture).save(part, format="PNG", pnginfo=information)
    except OSError as error:
        raise FaceSnapError(f"{path} cannot be written ({error.strerror}); make room and run this again.") from error


def _is_drawn(path: Path, recipe: dict[str, Any]) -> bool:
    """Whether a picture is there and whole; one of another recipe is an error, since a table must not mix them."""
    note = _note(path)
    if note is None:
        return False
    if others := [name for name, value in recipe.items() if note.get(name) != value]:
        raise FaceSnapError(
            f"{path} was drawn with another {others[0]} than this run's; choose another --out or remove its pictures."
        )
    return True


def _note(path: Path, whole: bool = True) -> dict[str, Any] | None:
    """What a picture says of itself; None where there is none, or, if it has to be whole, where it is not."""
    try:
        with Image.open(path) as image:
            if whole:
                image.load()
            return json.loads(image.info[NOTE])
    except FileNotFoundError:
        return None
    except KeyError:
        raise FaceSnapError(f"{path} was not drawn by this command; choose another --out.") from None
    except (OSError, SyntaxError, ValueError):  # Pillow's words for what is cut off or damaged
        return None


def _peak_of_process() -> int | None:
    """Bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _digest(path: Path) -> str:
    return _digest_of(path, path.stat().st_mtime_ns)


@cache
def _digest_of(path: Path, changed: int) -> str:
    return sha256(path)[:16]
