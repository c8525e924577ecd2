"""Features that networks extract from photos: faces with ArcFace embeddings, CLIP tokens, DECA codes, and
landmarks.

`Encoders` belong to the model files of one job. Each network is loaded at its first use and each photo is encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
from torch import Tensor

from facesnap_ext.cache import Cache, face_key, signature_of
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import faces
from facesnap_ext.identity.clip import load_image_encoder
from facesnap_ext.identity.faces import Face, FacePack, NoFaceError
from facesnap_ext.landmarks.hints import POINTS5
from facesnap_ext.landmarks.points72 import Landmarks, from_68
from facesnap_ext.landmarks.poses import Rig, make_rig
from facesnap_ext.landmarks.predictor import FaceCodes, LandmarkPredictor, load_predictor
from facesnap_ext.photos import Photo
from facesnap_ext.weights.face_pack import pack_files
from facesnap_ext.weights.instantid import RECOGNITION, RECOGNITION_SHA256
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.network_names import TITLES
from facesnap_ext.weights.networks import network_hash
from facesnap_ext.weights.source import WeightSource, networks_of, recognition_of
from facesnap_ext.weights.tensors import is_finite

NO_PIXELS = Photo(np.zeros((1, 1, 3), np.uint8), "")


class Encoders:
    """Face model pack, CLIP and DECA of one job, on the CPU.

    Results are cached by the networks' files and by the photo's pixels. The files' signatures are taken once: if a file
    is replaced while the job runs, later jobs never use the results that this job caches.
    """

    def __init__(self, cache: Cache, files: ModelFiles):
        self.cache = cache
        self.files = files
        self._signatures: dict[str, Hashable] = {}

    def signature(self, part: str) -> Hashable:
        """The state of a part's files when this job first asked for it.

        Raises:
            FaceSnapError: the part is missing.
        """
        path = self.files.require(part)
        if part not in self._signatures:
            self._signatures[part] = signature_of(path)
        return self._signatures[part]

    def face(self, photo: Photo, face_index: int = 0) -> Face:
        """One face of a photo, by size from the largest.

        Raises:
            NoFaceError: the photo has no face, or no face with this index.
        """
        detected = self.faces(photo)
        if not detected:
            raise faces.no_face_error(photo)
        return faces.select_face(detected, face_index)

    def faces(self, photo: Photo) -> list[Face]:
        """All faces of a photo, by size from the largest; empty if none is found."""

        def find() -> list[Face]:
            try:
                detected = faces.find_faces(self._face_pack(), photo)
            except NoFaceError:
                detected = []
            return [replace(face, photo=NO_PIXELS) for face in detected]  # large, so they are kept only for this job

        cached = self.cache.get_or_compute(("faces", self.signature("face_pack"), photo.digest), find)
        return [replace(face, photo=photo) for face in cached]

    def require_faces(
        self,
        photos: Sequence[Photo],
        face_index: int = 0,
        progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Check that every photo has a face with this index.

        Raises:
            FaceSnapError: there is no face model pack, or some photos have no such face; the message names all of them.
        """
        without = []
        for number, photo in enumerate(photos, 1):
            progress(f"photo {number} of {len(photos)}: detecting the face")
            if face_index >= len(self.faces(photo)):
                without.append(photo.name)
        if without:
            face = f"face with index {face_index} (0 is the largest)" if face_index else "detectable face"
            *others, last = without
            names = f"{', '.join(others)} and {last} have" if others else f"{last} has"
            raise FaceSnapError(f"{names} no {face}; remove or replace these photos.")

    def clip_tokens(self, references: Sequence[Face]) -> list[Tensor]:
        """CLIP tokens [T, width] of each face's crop.

        The image encoder is large and rarely needed, so it is loaded once for all faces that are not cached, and is not
        kept.
        """
        if not references:
            return []
        path = self.files.require("clip")
        networks = (self.signature("clip"), self.signature("face_pack"))
        encoder = cache(lambda: load_image_encoder(path))

        def encode(face: Face) -> Tensor:
            tokens = encoder()([face.crop])[0]
            if not is_finite(tokens):
                raise FaceSnapError(
                    f"{path.name} computes CLIP features that are not finite, so it is damaged; download it again."
                )
            return tokens

        return [
            self.cache.get_or_compute(face_key("clip", networks, face.photo, face.box), partial(encode, face))
            for face in references
        ]

    def codes(self, face: Face) -> FaceCodes:
        """DECA's codes of a face."""
        key = face_key("codes", (self.signature("deca"),), face.photo, face.box)
        angle = face.turn + face.tilt
        return self.cache.get_or_compute(key, lambda: self.predictor().encode(face.photo.pixels, face.box, angle))

    def source_shape(self, references: Sequence[Face], saved_shapes: Tensor | None) -> Tensor:
        """The shape code [S] that landmarks are predicted from: the first photo's, or else the saved identity's.

        Args:
            saved_shapes: [R, S] of a saved identity; None if it was saved without.

        Raises:
            FaceSnapError: neither exists, or the saved code does not match this DECA.
        """
        if references:
            return self.codes(references[0]).shape
        if saved_shapes is None:
            if not self.files.can_predict_landmarks:
                raise FaceSnapError(
                    "Without DECA and FLAME, a saved identity can only take the pose of a driving photo; add one with "
                    "a face, and set Pose to driving photo."
                )
            raise FaceSnapError(
                "The identity was saved without the shape of the face, because DECA or FLAME was missing; save it "
                "again from photos, or use a reference photo instead of it."
            )
        deca, size = self.files.require("deca"), self.predictor().deca.code_sizes["shape"]
        if len(saved_shapes[0]) != size:
            raise FaceSnapError(
                f"The face shape in the saved identity has {len(saved_shapes[0])} values but {deca.name} returns "
                f"{size}; save the identity again from photos."
            )
        return saved_shapes[0]

    def landmarks(self, shape: Tensor, driving: Face) -> Landmarks:
        """The 72 landmarks of a face of this shape in the driving face's pose and expression, in the driving photo's
        pixels.

        Args:
            shape: [S], as in `FaceCodes`.
        """

        def predict() -> Landmarks:
            predictor = self.predictor()
            return predictor.predict(predictor.neutral(shape), self.codes(driving))

        networks = (self.signature("deca"), self.signature("flame"), shape.numpy().tobytes())
        return self.cache.get_or_compute(face_key("landmarks", networks, driving.photo, driving.box), predict)

    def detected_landmarks(self, face: Face, hint: str) -> Landmarks:
        """A face's own landmarks as the face model pack detects them, in its photo's pixels: the paper's "drive
        landmark".

        Args:
            hint: how they are drawn, a key of `HINTS`. Five points are the detector's; 72 are derived from the pack's
                68.

        Raises:
            FaceSnapError: 72 landmarks are needed and the pack has no model with 68, so DECA and FLAME are missing.
        """
        key = face_key("detected", (self.signature("face_pack"),), face.photo, face.box)
        height, width = face.photo.pixels.shape[:2]
        if hint == POINTS5:
            return Landmarks(face.keypoints.astype(np.float32), width, height)
        model = self.cache.load("landmarks68", self.files.require("face_pack"), faces.load_landmarks68)
        if model is None:
            self.files.require("deca")
            self.files.require("flame")

        def detect() -> Landmarks:
            points = faces.detect_landmarks68(model, face) + 0.5  # pixel centres are at 0.5
            return Landmarks(from_68(points), width, height)

        return self.cache.get_or_compute(key, detect)

    def rig(self, shape: Tensor | None) -> Rig:
        """The face that templates and sliders pose: of this shape [S], or FLAME's mean face for None."""
        key = (
            "rig",
            self.signature("deca"),
            self.signature("flame"),
            None if shape is None else shape.numpy().tobytes(),
        )
        return self.cache.get_or_compute(key, lambda: make_rig(self.predictor().flame, shape))

    def predictor(self) -> LandmarkPredictor:
        """DECA and FLAME."""
        paths = (self.files.require("deca"), self.files.require("flame"))
        return self.cache.load("predictor", paths, lambda both: load_predictor(*both))

    def check_recognition(self, expected: str, name: str = "InstantID") -> list[str]:
        """Check that embeddings come from the recognition model that a FaceSnap file was made for, by its file name.
        Those of another model would show another person.

        Args:
            expected: from `recognition_of`; empty if any model will do.
            name: of the FaceSnap file, for messages.

        Returns:
            A note if the model has the right name but is a different file.

        Raises:
            FaceSnapError: there is no face model pack, or its recognition model is not the expected one.
        """
        if not expected:
            return []
        is_instantids = expected.lower() == RECOGNITION
        path = pack_files(self.files.require("face_pack")).recognition
        if path is None or path.name.lower() != expected.lower():
            pack, contains = self.files.face_pack, "none" if path is None else path.name
            model, advice = (f"{expected} of antelopev2", "antelopev2") if is_instantids else (expected, "its pack")
            raise FaceSnapError(
                f"{name} is made for {model}, but the face model pack {pack} contains {contains}, which would produce "
                f"another person's face; put {advice} into {self.files.folder}."
            )
        if is_instantids and self.network_hash("face_pack") != RECOGNITION_SHA256:
            return [f"{path} is not the file of antelopev2 that {name} is made for; the face may not be recognisable."]
        return []

    def check_networks(self, source: WeightSource) -> list[str]:
        """Check that the installed networks are those that a FaceSnap file was trained with, by their content. If it
        does not name its recognition model so, that is checked by its file name.

        Returns:
            Notes: what differs without showing another person.

        Raises:
            FaceSnapError: the recognition model or CLIP is another one, or there is no face model pack.
        """
        networks, recognition = networks_of(source), recognition_of(source)
        name = "InstantID" if isinstance(source, tuple) else source.name
        notes = [] if "face_pack" in networks else self.check_recognition(recognition, name)
        for part, expected in networks.items():
            if getattr(self.files, part) is None or self.network_hash(part) == expected:
                continue
            title, path = TITLES[part], getattr(self.files, part)
            if part in ("face_pack", "clip"):
                hint = f" ({recognition})" if part == "face_pack" and recognition else ""
                raise FaceSnapError(
                    f"{name} was trained with another {title}{hint} than {path}, which would produce another person's "
                    f"face; put the one it was trained with into {self.files.folder}."
                )
            notes.append(f"{name} was trained with another {title} than {path.name}; the pose may be less accurate.")
        return notes

    def network_hash(self, part: str) -> str:
        """The content hash of an installed network, by its name in `ModelFiles`."""
        return network_hash(part, self.files.require(part))

    def _face_pack(self) -> FacePack:
        return self.cache.load("face_pack", self.files.require("face_pack"), faces.load_pack)
