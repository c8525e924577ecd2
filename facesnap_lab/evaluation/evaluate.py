"""Generate a list's images, measure them and the images of other methods, and write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.evaluation.draw import Generator, draw_cases, processes
from facesnap_lab.evaluation.judges import Judges
from facesnap_lab.evaluation.measure import LoadJudges, embed_real_photos, measure
from facesnap_lab.evaluation.protocol import Protocol, find_images
from facesnap_lab.evaluation.report import write_report
from facesnap_lab.workers import open_workers

FACESNAP = "FaceSnap"  # name of the method, and of its image folder


def evaluate(
    protocol: Protocol,
    judges: Judges,
    others: dict[str, Path],
    out: Path,
    generators: Mapping[str, Generator] | None = None,
    load_judges: LoadJudges | None = None,
    workers: int = 0,
    scheduler: str = "",
) -> dict[str, Any] | None:
    """Generate, measure, and write results.json, table.md, sheet.png and plot.png to `out`.

    Args:
        others: image folders of other methods by name.
        generators: methods by name, whose images are generated into `out`/NAME; by default, `others` are only measured.
        load_judges: returns `judges` in other processes; see `measure.embed_real_photos`.
        workers, scheduler: where to measure, as for `open_workers`.

    Returns:
        The results; None in all processes but accelerate's main one.

    Raises:
        FaceSnapError: there are no images to measure or no networks to measure them with, an image is missing, or a
            photo has no face.
    """
    from tqdm import tqdm

    if judges.clip is None and judges.embed is None and judges.extractor is None:
        raise FaceSnapError("There is no network to measure with; specify --clip, --facenet or --inception.")
    generators = generators or {}
    if not generators and not others:
        raise FaceSnapError(
            "There are no images to measure; specify --base to generate some with FaceSnap, or --pictures."
        )
    if taken := next((name for name in others if name in generators), ""):
        raise FaceSnapError(
            f"--pictures has a method named {taken}, but this run generates images for that name; rename it."
        )
    cases = protocol.cases()
    for folder in others.values():
        find_images(cases, folder)  # reports missing images before hours of generating
    state = processes()
    real = None
    if state.is_main_process:
        with (
            open_workers(workers, scheduler) as run_tasks,
            tqdm(total=len(protocol.identities), desc="real photos") as bar,
        ):
            real = embed_real_photos(protocol, judges, bar.update, run_tasks, load_judges)
    costs = {}
    for generator in generators.values():
        generator.check(cases)  # all of them before the first image
    for name, generator in generators.items():
        with generator.installed() as ready:
            costs[name] = draw_cases(ready, cases, out / name)
    folders = {name: out / name for name in generators} | others
    if not state.is_main_process:
        return None
    methods = []
    with open_workers(workers, scheduler) as run_tasks:
        for name, folder in folders.items():
            with tqdm(total=len(cases), desc=f"measuring {name}") as bar:
                methods.append(measure(name, folder, protocol, judges, real, bar.update, run_tasks, load_judges))
    return write_report(out, protocol, judges.names, methods, costs)


def named_folders(values: Sequence[str]) -> dict[str, Path]:
    """Parse `NAME=DIR` or `DIR`; the latter is named after its last folder.

    Raises:
        FaceSnapError: two folders have the same name.
    """
    folders: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals:
            name, folder = Path(value).resolve().name, value
        if not name or not folder or name in folders:
            raise FaceSnapError(
                f"--pictures {value} does not have a unique name; write NAME=DIR with a different name."
            )
        folders[name] = Path(folder)
    return folders
