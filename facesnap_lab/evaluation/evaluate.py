"""Draw a list's pictures with FaceSnap, measure them and those of other methods, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.evaluation.draw import EvaluationPipeline, check_faces, draw_cases, processes
from facesnap_lab.evaluation.judges import Judges
from facesnap_lab.evaluation.measure import embed_real_photos, measure
from facesnap_lab.evaluation.protocol import Protocol, find_images
from facesnap_lab.evaluation.report import write_report

FACESNAP = "FaceSnap"


def evaluate(
    protocol: Protocol, judges: Judges, others: dict[str, Path], out: Path, pipeline: EvaluationPipeline | None = None
) -> dict[str, Any] | None:
    """Draw, measure, and write results.json, table.md, sheet.png and plot.png into `out`.

    Args:
        others: folders of other methods' pictures by the methods' names.
        pipeline: draws FaceSnap's pictures into `out`/FaceSnap; None measures the others alone.

    Returns:
        The results; None in processes other than accelerate's first.

    Raises:
        FaceSnapError: nothing to measure or to measure with, a picture is missing, or a photo has no face.
    """
    from tqdm import tqdm

    if judges.clip is None and judges.embed is None and judges.extractor is None:
        raise FaceSnapError("There is no network to measure with; give --clip, --facenet or --inception.")
    if pipeline is None and not others:
        raise FaceSnapError("There are no pictures to measure; give --base to draw FaceSnap's, or --pictures.")
    if FACESNAP in others and pipeline is not None:
        raise FaceSnapError(f"--pictures has a method {FACESNAP}, which is drawn here; give it another name.")
    cases = protocol.cases()
    for folder in others.values():
        find_images(cases, folder)  # what is missing is said before hours of drawing
    state = processes()
    real = None
    if state.is_main_process:
        with tqdm(total=len(protocol.identities), desc="real photos") as bar:
            real = embed_real_photos(protocol, judges, bar.update)
    costs = {}
    folders = dict(others)
    if pipeline is not None:
        check_faces(pipeline, cases)
        costs[FACESNAP] = draw_cases(pipeline, cases, out / FACESNAP)
        folders = {FACESNAP: out / FACESNAP} | folders
    if not state.is_main_process:
        return None
    methods = []
    for name, folder in folders.items():
        with tqdm(total=len(cases), desc=f"measuring {name}") as bar:
            methods.append(measure(name, folder, protocol, judges, real, bar.update))
    return write_report(out, protocol, judges.names, methods, costs)


def named_folders(values: Sequence[str]) -> dict[str, Path]:
    """`NAME=DIR` or `DIR`, which is then named as its last folder.

    Raises:
        FaceSnapError: two have one name.
    """
    folders: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals:
            name, folder = Path(value).resolve().name, value
        if not name or not folder or name in folders:
            raise FaceSnapError(f"--pictures {value} gives no name of its own; write NAME=DIR with another name.")
        folders[name] = Path(folder)
    return folders
