"""Generate an evaluation's images with the weights that the authors of the rivals have published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from facesnap_ext import photos
from facesnap_ext.cache import Cache
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.settings.strength import Strength
from facesnap_ext.weights.instantid import NAME as INSTANTID
from facesnap_ext.weights.instantid import RECOGNITION
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.search import find_models
from facesnap_lab.evaluation.draw import Base, EvaluationPipeline, Generator, check_faces, digest
from facesnap_lab.evaluation.protocol import Case
from facesnap_lab.rivals.published.ip_adapter import IPAdapterFile
from facesnap_lab.rivals.published.method import Prepare, PublishedMethod, Sampling
from facesnap_lab.rivals.published.photomaker import PhotoMakerFile

METHODS = ("ip-adapter", "instantid", "photomaker")
MISSING_NETWORKS = {  # methods whose published weights need a network that the project does not have
    "pulid": "EVA-CLIP and a face parser",
    "consistentid": "a face parser",
}
INSTANTID_STRENGTH = Strength(weight=0.8, adapter_weight=0.8)  # of the examples in InstantID's repository


@dataclass(frozen=True, eq=False)
class RivalPipeline:
    """A rival's published weights and a base model.

    prepare: encodes references and prompts; None until the weights are installed.
    """

    base: Base
    method: PublishedMethod
    encoders: Encoders
    prepare: Prepare | None = None

    @contextmanager
    def installed(self) -> Iterator[RivalPipeline]:
        with self.method.installed(self.base.pipe, self.encoders.files) as prepare:
            yield replace(self, prepare=prepare)

    def check(self, cases: Sequence[Case]) -> None:
        """Detect the faces of all references, and check the prompts and the model folder.

        Raises:
            FaceSnapError: the method cannot use one of them.
        """
        for part in self.method.parts:
            self.encoders.files.require(part)
        self.encoders.check_recognition(self.method.recognition, self.method.title)
        for prompt in dict.fromkeys(case.prompt.text for case in cases):
            self.method.check_prompt(self.base.pipe, prompt)
        check_faces(self.encoders, cases, driving=False)

    def draw(self, case: Case) -> np.ndarray:
        """Generate a case's image, [height,width,3] uint8; the driving photo is not used.

        Raises:
            FaceSnapError: a photo has no face, or a model file is missing or does not fit.
        """
        assert self.prepare is not None, "the weights are installed first"
        faces = [self.encoders.face(photos.from_path(path)) for path in case.identity.references]
        sampling = Sampling(self.base.steps, guided=self.base.scale > 1)
        return self.base.draw(case.seed, **self.prepare(faces, case.prompt.text, sampling))

    def recipe(self, case: Case) -> dict[str, Any]:
        """Return everything that determines a case's image, ready for JSON; see `EvaluationPipeline.recipe`."""
        path = self.method.path
        return self.base.recipe(case) | {"method": [self.method.title, path.name, digest(path)]}


def open_rivals(values: Sequence[str], base: Base, models: Path) -> dict[str, Generator]:
    """Recognise published weights.

    Args:
        values: `METHOD=PATH`, with a name in `METHODS` and the path of its file, or of InstantID's folder.
        models: folder with the face model packs and CLIP.

    Returns:
        The generators by the methods' titles.

    Raises:
        FaceSnapError: a method is unknown or cannot be run, or a file is not one of the method's.
    """
    generators: dict[str, Generator] = {}
    for value in values:
        name, _, path = value.partition("=")
        title, generator = _open(name, Path(path), base, models, value)
        if title in generators:
            raise FaceSnapError(f"--method {value} is a second file of {title}; evaluate it in a separate run.")
        generators[title] = generator
    return generators


def _open(name: str, path: Path, base: Base, models: Path, value: str) -> tuple[str, Generator]:
    if name in MISSING_NETWORKS:
        raise FaceSnapError(
            f"--method {value} cannot be run, because {name} needs {MISSING_NETWORKS[name]}, which FaceSnap does not "
            "include; generate the images with the method's own code and add them with --pictures."
        )
    if name not in METHODS or path == Path():
        raise FaceSnapError(f"--method {value} is not a known method; write METHOD=PATH with {', '.join(METHODS)}.")
    files = find_models(models)
    if name == "instantid":
        return INSTANTID, _instantid(path, base, files)
    recognise = IPAdapterFile.recognise if name == "ip-adapter" else PhotoMakerFile.recognise
    method: PublishedMethod = recognise(path, base.pipe.unet)
    files.match_pack(method.recognition)
    return method.title, RivalPipeline(base, method, Encoders(Cache(), files))


def _instantid(folder: Path, base: Base, files: ModelFiles) -> EvaluationPipeline:
    """Return a pipeline with InstantID's published pair, which the extension itself runs."""
    found = find_models(folder).facesnap if folder.is_dir() else {}
    pairs = [source for source in found.values() if isinstance(source, tuple)]
    if len(pairs) != 1:
        raise FaceSnapError(
            f"{folder} must contain one pair of InstantID's files, ControlNetModel/diffusion_pytorch_model.safetensors "
            f"and ip-adapter.bin, but contains {len(pairs) or 'none'}; correct the folder."
        )
    files.facesnap = {INSTANTID: pairs[0]}
    files.match_pack(RECOGNITION)
    return EvaluationPipeline(base, Engine(lambda: files), files, INSTANTID, INSTANTID_STRENGTH)
