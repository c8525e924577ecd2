"""Make the page of a study: a self-contained folder that opens in any browser, without a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write
from facesnap_lab.evaluation.protocol import Case, Protocol, find_images

SIDE = 512  # longer side of the images in pixels
PAGE = Path(__file__).with_name("page.html")
PLACEHOLDER = "/*STUDY*/ null"
QUESTIONS = {"realism": "Which image looks most like a real photo?", "identity": "Which image shows this person best?"}


def make(protocol: Protocol, methods: Mapping[str, Path], out: Path, count: int, seed: int = 0) -> None:
    """Write the page, its images and the key.

    Each item shows a reference photo and one image of each method in a random order, encoded alike, so that neither
    names nor files say which method made them. People are used evenly.

    Args:
        methods: folders with the images of the protocol's cases, by name of the method.
        out: folder of the page, which must not exist.
        count: number of items; at most the number of cases.

    Raises:
        FaceSnapError: there are fewer than two methods, images are missing, or the folder exists.
    """
    key = key_file(out)
    if out.exists() or key.exists():
        raise FaceSnapError(f"{out if out.exists() else key} already exists; choose another folder for the study.")
    if len(methods) < 2:
        raise FaceSnapError("A study compares at least two methods; add --pictures NAME=DIR for each.")
    random = np.random.default_rng(seed)
    cases = choose(protocol, count, random)
    images = {name: find_images(cases, folder) for name, folder in methods.items()}
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    items, shown = [], []
    for case in cases:
        order = [list(methods)[i] for i in random.permutation(len(methods))]
        names = []
        for source in (case.identity.references[0], *(images[method][case.file] for method in order)):
            names.append(f"images/{random.bytes(8).hex()}.png")
            _save(source, part / names[-1])
        items.append({"file": case.file, "methods": order})
        shown.append({"reference": names[0], "images": names[1:]})
    identifier = random.bytes(8).hex()
    content = json.dumps({"study": identifier, "questions": QUESTIONS, "items": shown}).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(PLACEHOLDER) == 1
    (part / "index.html").write_text(page.replace(PLACEHOLDER, content), encoding="utf-8")
    with atomic_write(key) as file:
        values = {"study": identifier, "methods": list(methods), "questions": list(QUESTIONS), "items": items}
        file.write_text(json.dumps(values, indent=2), encoding="utf-8")
    part.rename(out)


def key_file(out: Path) -> Path:
    return out.with_name(f"{out.name}-key.json")


def choose(protocol: Protocol, count: int, random: np.random.Generator) -> list[Case]:
    """Choose cases at random, as many of each person as possible, and shuffle them.

    Raises:
        FaceSnapError: there are not so many cases.
    """
    cases = protocol.cases()
    if not 1 <= count <= len(cases):
        raise FaceSnapError(f"The list has {len(cases)} images per method; ask for 1 to {len(cases)} items.")
    by_person: dict[str, list[Case]] = {}
    for index in random.permutation(len(cases)):
        by_person.setdefault(cases[index].identity.name, []).append(cases[index])
    rounds = [case for cases_of_all in zip_longest(*by_person.values()) for case in cases_of_all if case is not None]
    return [rounds[i] for i in random.permutation(count)]


def _save(source: Path, target: Path) -> None:
    """Encode an image anew, without metadata, and with the same longer side as all others."""
    picture = Image.fromarray(photos.from_path(source).pixels)
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture.resize(size, Image.Resampling.LANCZOS).save(target, "PNG")
