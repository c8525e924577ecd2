"""Generate the images of an evaluation's cases with one method, on all processes that accelerate started.

Each image is written atomically and stores its recipe and cost as metadata, so an interrupted run resumes where it
stopped.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Protocol

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
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.settings.strength import Strength
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.source import paths_of
from facesnap_lab.evaluation.protocol import Case

NOTE = "facesnap evaluate"  # PNG text key of the recipe and cost


@dataclass(frozen=True, eq=False)
class Base:
    """SDXL and the sampling settings that all methods share. scale: classifier-free guidance scale."""

    pipe: Any
    name: str
    width: int = 1024
    height: int = 1024
    steps: int = 8
    scale: float = 2.0

    def draw(self, seed: int, **arguments: Any) -> np.ndarray:
        """Generate an image, [height,width,3] uint8.

        Args:
            arguments: further arguments of the pipeline, such as the prompt.
        """
        drawn = self.pipe(
            **arguments,
            width=self.width,
            height=self.height,
            num_inference_steps=self.steps,
            guidance_scale=self.scale,
            generator=torch.Generator().manual_seed(seed),
        )
        return np.asarray(drawn.images[0])

    def recipe(self, case: Case) -> dict[str, Any]:
        """Return the part of a case's recipe that does not depend on the method."""
        return {
            "base": self.name,
            "sampler": type(self.pipe.scheduler).__name__,
            "references": [digest(path) for path in case.identity.references],
            "prompt": case.prompt.text,
            "seed": case.seed,
            "size": [self.width, self.height],
            "steps": self.steps,
            "scale": self.scale,
        }


class Generator(Protocol):
    """Generates the images of one method."""

    def check(self, cases: Sequence[Case]) -> None:
        """Report photos or prompts that the method cannot use, before hours of generating."""

    def installed(self) -> AbstractContextManager[Generator]:
        """Return the generator that `draw` is called on, inside a `with` block."""

    def draw(self, case: Case) -> np.ndarray: ...

    def recipe(self, case: Case) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class EvaluationPipeline:
    """FaceSnap, or InstantID's published files, which the extension runs too.

    model: name of the FaceSnap file, if there are several.
    """

    base: Base
    engine: Engine
    files: ModelFiles
    model: str = ""
    strength: Strength = field(default_factory=Strength)

    def check(self, cases: Sequence[Case]) -> None:
        """Detect the faces of all references and driving photos.

        Raises:
            FaceSnapError: a photo cannot be read or has no face.
        """
        check_faces(self.engine.encoders(self.files), cases)

    @contextmanager
    def installed(self) -> Iterator[EvaluationPipeline]:
        yield replace(self, engine=Engine(self.engine.files))  # whose networks leave the GPU before the next method

    def draw(self, case: Case) -> np.ndarray:
        """Generate a case's image, [height,width,3] uint8.

        Raises:
            FaceSnapError: a photo has no face, or a model file is missing or does not fit.
        """
        unit = Unit(
            enabled=True,
            references=tuple(map(photos.from_path, case.identity.references)),
            driving=photos.from_path(case.pose.photo),
            model=self.model,
            strength=self.strength,
        )
        with conditioned(self.base.pipe, self.engine.prepare(unit, self.base.width, self.base.height).conditioning):
            return self.base.draw(case.seed, prompt=case.prompt.text)

    def recipe(self, case: Case) -> dict[str, Any]:
        """Return everything that determines a case's image, ready for JSON.

        Photos and the FaceSnap file are identified by their hashes, the base model by its name. The encoders are
        assumed to be the ones that the FaceSnap file requires.
        """
        paths = paths_of(self.files.choose_facesnap(self.model))
        recipe = self.base.recipe(case) | {
            "facesnap": [paths[0].name, *map(digest, paths)],
            "driving": digest(case.pose.photo),
        }
        if self.strength != Strength():
            recipe["strength"] = [self.strength.weight, self.strength.adapter_weight]
        return recipe


@dataclass(frozen=True)
class Cost:
    """The cost of images: median time in seconds, and peak memory in bytes.

    memory_kind: "GPU" (memory allocated by torch) or "process" (resident memory of the process, on the CPU).
    """

    seconds: float
    memory: int | None
    memory_kind: str
    device: str


def check_faces(encoders: Encoders, cases: Sequence[Case], driving: bool = True) -> None:
    """Detect the faces of all references and, if they are used, of all driving photos.

    Raises:
        FaceSnapError: a photo cannot be read or has no face.
    """
    used = [(*case.identity.references, *([case.pose.photo] if driving else [])) for case in cases]
    for path in dict.fromkeys(itertools.chain.from_iterable(used)):
        encoders.face(photos.from_path(path))


def facesnap_pipeline(base: Base, find_models: Callable[[], ModelFiles], model: str = "") -> EvaluationPipeline:
    """Return a pipeline with FaceSnap.

    Raises:
        FaceSnapError: no FaceSnap file was found.
    """
    files = find_models()
    files.choose_facesnap(model)
    convert_originals(files, lambda message: print(message, file=sys.stderr))
    return EvaluationPipeline(base, Engine(find_models), find_models(), model)


def load_base_sampler(
    base: Path, base_config: Path | None, device: torch.device, dtype: torch.dtype, **settings: Any
) -> Base:
    """Load an SDXL model with the paper's sampler (DPM++ SDE).

    Args:
        base, base_config: see `training.frozen.load_base`. settings: further fields of `Base`.

    Raises:
        FaceSnapError: the base is missing or not SDXL.
    """
    from diffusers import DPMSolverSinglestepScheduler

    from facesnap_lab.training.frozen import load_base

    pipe = load_base(base, base_config, dtype)
    pipe.scheduler = DPMSolverSinglestepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, lower_order_final=True
    )
    pipe.set_progress_bar_config(disable=True)
    return Base(pipe.to(device), base.name, **settings)


def processes() -> Any:
    """Return accelerate's `PartialState`: the processes that share the work, and this one's device."""
    from accelerate import PartialState
    from accelerate.utils import is_cuda_available, is_mps_available, is_npu_available, is_xpu_available

    checks = (is_cuda_available, is_mps_available, is_npu_available, is_xpu_available)
    return PartialState(
        cpu=not any(check() for check in checks),  # otherwise each CPU process assumes that it is the only one
        timeout=timedelta(hours=12),  # the main process embeds all real photos while the others wait
    )


def draw_cases(pipeline: Generator, cases: Sequence[Case], out: Path) -> Cost:
    """Generate the images that `out` does not have yet, shared among accelerate's processes.

    Raises:
        FaceSnapError: `out` has images with a different recipe, a photo has no face, or the disk is full.
    """
    from tqdm import tqdm

    state = processes()
    left = [case for case in cases if not _is_generated(out / case.file, pipeline.recipe(case))]
    state.wait_for_everyone()  # otherwise another process might see images that this one has only begun to write
    done = len(cases) - len(left)
    with state.split_between_processes(left) as own:
        share = max(1, state.num_processes)
        with tqdm(total=len(cases), initial=done, desc="generating", disable=not state.is_main_process) as bar:
            for case in own:
                _generate_case(pipeline, case, out / case.file, state.device)
                bar.update(min(share, len(cases) - bar.n))
    state.wait_for_everyone()
    return cost(cases, out)


def cost(cases: Sequence[Case], out: Path) -> Cost:
    """Read the cost from the images' metadata; only images that were generated on the first image's device count."""
    notes = [_note(out / case.file, complete=False) for case in cases]
    notes = [note for note in notes if note["device"] == notes[0]["device"]]
    memory = [note["memory"] for note in notes if note["memory"]]
    return Cost(
        statistics.median(note["seconds"] for note in notes),
        max(memory, default=None),
        notes[0]["memory_kind"],
        notes[0]["device"],
    )


def _generate_case(pipeline: Generator, case: Case, path: Path, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    image = pipeline.draw(case)
    seconds = time.perf_counter() - began  # the image is on the CPU, so the GPU has finished
    note = pipeline.recipe(case) | {
        "seconds": round(seconds, 4),
        "memory": torch.cuda.max_memory_allocated(device) if on_gpu else _peak_of_process(),
        "memory_kind": "GPU" if on_gpu else "process",
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
    }
    information = PngInfo()
    information.add_text(NOTE, json.dumps(note))
    try:
        with atomic_write(path) as part:
            Image.fromarray(image).save(part, format="PNG", pnginfo=information)
    except OSError as error:
        raise FaceSnapError(
            f"{path} could not be written ({error.strerror}); free some disk space and try again."
        ) from error


def _is_generated(path: Path, recipe: dict[str, Any]) -> bool:
    """Return whether a complete image exists; one with a different recipe is an error, since a table must not mix
    recipes."""
    note = _note(path)
    if note is None:
        return False
    if others := [name for name, value in recipe.items() if note.get(name) != value]:
        raise FaceSnapError(
            f"{path} was generated with a different {others[0]}; choose another --out or remove the images in it."
        )
    return True


def _note(path: Path, complete: bool = True) -> dict[str, Any] | None:
    """Read an image's metadata; None if it does not exist, or if it must be complete and is not."""
    try:
        with Image.open(path) as image:
            if complete:
                image.load()
            return json.loads(image.info[NOTE])
    except FileNotFoundError:
        return None
    except KeyError:
        raise FaceSnapError(f"{path} was not generated by this command; choose another --out.") from None
    except (OSError, SyntaxError, ValueError):  # raised by Pillow for truncated or damaged files
        return None


def _peak_of_process() -> int | None:
    """Return the peak resident memory in bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def digest(path: Path) -> str:
    """Return the first half of a file's SHA-256 in hexadecimal, which is cached until the file changes."""
    return _digest_of(path, path.stat().st_mtime_ns)


@cache
def _digest_of(path: Path, changed: int) -> str:
    return sha256(path)[:16]
