"""What photos show, in numbers: faces and their embeddings, CLIP's tokens, DECA's codes, the face's own points.

Each network is loaded at its first use and each photo is looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from facesnap_ext.cache import Cache, signature_of
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import sha256
from facesnap_ext.identity import faces
from facesnap_ext.identity.clip import load_image_encoder, weight_file
from facesnap_ext.identity.faces import Face, NoFaceError
from facesnap_ext.landmarks.hints import POINTS5
from facesnap_ext.landmarks.points72 import Landmarks, from_68
from facesnap_ext.landmarks.predictor import FaceCodes, LandmarkPredictor, load_predictor
from facesnap_ext.photos import Photo
from facesnap_ext.weights.places import ModelFiles
from facesnap_ext.weights.tensors import fingerprint


class Encoders:
    """Face pack, CLIP and DECA, on the CPU. What they see is remembered by their files and by the photo's pixels."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def face(self, files: ModelFiles, photo: Photo, which: int = 0) -> Face:
        """A face of a photo, by size from the largest.

        Raises:
            NoFaceError: there is none.
        """
        found = self.faces(files, photo)
        if not found:
            raise faces.no_face_in(photo)
        return faces.choose(found, which)

    def faces(self, files: ModelFiles, photo: Photo) -> list[Face]:
        """All faces of a photo, by size from the largest; none where there is none."""
        folder = files.require("face_pack")

        def find() -> list[Face]:
            try:
                found = faces.find_faces(self.cache.load("face_pack", folder, faces.load_pack), photo)
            except NoFaceError:
                found = []
            return [replace(face, photo=None) for face in found]  # pixels are large: they stay with the job

        found = self.cache.remember(("faces", signature_of(folder), photo.digest), find)
        return [replace(face, photo=photo) for face in found]

    def require_faces(
        self,
        files: ModelFiles,
        photos: Sequence[Photo],
        which: int = 0,
        progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        """See that each photo has a face number `which`.

        Raises:
            FaceSnapError: there is no face pack, or some photos have no such face; it names all of these.
        """
        without = []
        for number, photo in enumerate(photos, 1):
            progress(f"photo {number} of {len(photos)}: looking for the face")
            if which >= len(self.faces(files, photo)):
                without.append(photo.name)
        if without:
            face = f"face number {which}, counted from 0, the largest" if which else "face that can be found"
            *others, last = without
            names = f"{', '.join(others)} and {last} have" if others else f"{last} has"
            raise FaceSnapError(f"{names} no {face}: leave out what shows nobody, or take other photos.")

    def clip_tokens(self, files: ModelFiles, references: Sequence[Face]) -> list[Tensor]:
        """CLIP tokens [T, width] of each face's crop.

        The encoder is large and rarely wanted: it is loaded once for those that are not remembered, and not kept.
        """
        if not references:
            return []
        path = files.require("clip")
        networks = (signature_of(path), signature_of(files.require("face_pack")))
        encoder = cache(lambda: load_image_encoder(path))
        return [
            self.cache.remember(
                ("clip", *networks, face.photo.digest, *face.box), lambda face=face: encoder()([face.crop])[0]
            )
            for face in references
        ]

    def codes(self, files: ModelFiles, face: Face) -> FaceCodes:
        """What DECA sees in a face."""
        key = ("codes", signature_of(files.require("deca")), face.photo.digest, *face.box)
        return self.cache.remember(key, lambda: self.predictor(files).encode(face.photo.pixels, face.box))

    def detected(self, files: ModelFiles, face: Face, hint: str) -> Landmarks:
        """A face's own points in its photo's pixels, as the face pack finds them: the paper's "drive landmark".

        Args:
            hint: what they are drawn as, of `HINTS`. Five are the detector's, 72 are made of the pack's 68.

        Raises:
            FaceSnapError: 72 are wanted and the pack has no model of 68, so that DECA and FLAME are missing.
        """
        folder = files.require("face_pack")
        key = ("detected", signature_of(folder), face.photo.digest, *face.box)
        height, width = face.photo.pixels.shape[:2]
        if hint == POINTS5:
            return Landmarks(face.keypoints.astype(np.float32), width, height)
        model = self.cache.load("landmarks68", folder, faces.load_landmarks68)
        if model is None:
            files.require("deca")
            files.require("flame")

        def find() -> Landmarks:
            return Landmarks(from_68(faces.points68(model, face) + 0.5), width, height)  # a pixel's centre is at 0.5

        return self.cache.remember(key, find)

    def predictor(self, files: ModelFiles) -> LandmarkPredictor:
        """DECA and FLAME."""
        paths = (files.require("deca"), files.require("flame"))
        return self.cache.load("predictor", paths, lambda both: load_predictor(*both))

    def recognition(self, files: ModelFiles) -> Path:
        """The file of the face pack's recognition model."""
        pack = self.cache.load("face_pack", files.require("face_pack"), faces.load_pack)
        return Path(pack.recognition.model_file)

    def network(self, files: ModelFiles, part: str) -> str:
        """The content hash of a network that makes features, by its name in `identity_file.NETWORKS`."""
        path = files.require(part)
        if part == "face_pack":
            path = self.recognition(files)
        elif part == "clip":
            path = weight_file(path)
        compute = sha256 if path.suffix == ".onnx" else fingerprint
        return self.cache.load(f"hash of {part}", path, compute)
