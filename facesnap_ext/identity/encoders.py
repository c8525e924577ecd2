"""Features that networks extract from photos: faces with ArcFace embeddings, CLIP tokens, DECA codes, and
landmarks.

An `Encoders` object belongs to the model files of one job. Each network is loaded when it is first used, and each photo
is encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.cache import Cache, face_key, signature_of
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import face_mesh, faces
from facesnap_ext.identity.clip import load_image_encoder
from facesnap_ext.identity.faces import Face, FacePack, NoFaceError
from facesnap_ext.landmarks.flame import Flame
from facesnap_ext.landmarks.open_face import Basis, load_basis
from facesnap_ext.landmarks.points72 import Landmarks, from_68
from facesnap_ext.landmarks.poses import Rig
from facesnap_ext.landmarks.predictor import FaceCodes, LandmarkPredictor, load_head, load_predictor
from facesnap_ext.landmarks.rigs import flame_rig
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
        """The state of a part's files, recorded at the first call for this part.

        Raises:
            FaceSnapError: the part is missing.
        """
        path = self.files.require(part)
        if part not in self._signatures:
            self._signatures[part] = signature_of(path)
        return self._signatures[part]

    def face(self, photo: Photo, face_index: int = 0) -> Face:
        """One face of a photo; the faces are ordered by size, largest first.

        Raises:
            NoFaceError: the photo has no face, or no face with this index.
        """
        detected = self.faces(photo)
        if not detected:
            raise faces.no_face_error(photo)
        return faces.select_face(detected, face_index)

    def faces(self, photo: Photo) -> list[Face]:
        """All faces of a photo, ordered by size, largest first; empty if none is found."""

        def find() -> list[Face]:
            try:
                detected = faces.find_faces(self._face_pack(), photo)
            except NoFaceError:
                detected = []
            # photos are large, so they are kept only for this job
            return [replace(face, photo=NO_PIXELS) for face in detected]

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

    def source_shape(self, references: Sequence[Face], saved_shapes: Tensor | None) -> Tensor | None:
        """DECA's shape code [S] of a person: the mean of the codes of all photos and of the saved identity.

        Args:
            saved_shapes: [R, S] of a saved identity; None without one.

        Returns:
            The code; None with neither photos nor saved codes.

        Raises:
            FaceSnapError: the saved codes do not match this DECA.
        """
        shapes = [self.codes(face).shape for face in references]
        if saved_shapes is not None:
            deca, size = self.files.require("deca"), self.predictor().deca.code_sizes["shape"]
            if len(saved_shapes[0]) != size:
                raise FaceSnapError(
                    f"The face shape in the saved identity has {len(saved_shapes[0])} values, but {deca.name} returns "
                    f"{size}; save the identity again from photos."
                )
            shapes += list(saved_shapes)
        return torch.stack(shapes).mean(dim=0) if shapes else None

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

    def keypoints(self, face: Face) -> Landmarks:
        """A face's own five points as the face detector returns them, in its photo's pixels."""
        height, width = face.photo.pixels.shape[:2]
        return Landmarks(face.keypoints.astype(np.float32), width, height)

    @cached_property
    def landmark_part(self) -> str:
        """The part that detects 68 landmarks, by its name in `ModelFiles`: the face model pack if it has a model for
        them, otherwise MediaPipe's landmark detector; empty if there is neither. It does not change during a job."""
        if self.files.face_pack is not None and faces.landmarks68_file(self.files.face_pack) is not None:
            return "face_pack"
        return "" if self.files.mediapipe is None else "mediapipe"

    @property
    def basis(self) -> Basis:
        """The open face model with the mean face of the points that are detected."""
        return load_basis("mediapipe" if self.landmark_part == "mediapipe" else "1k3d68")

    def detected_landmarks(self, face: Face) -> Landmarks | None:
        """A face's own 72 landmarks in its photo's pixels, derived from 68 detected ones; None without a detector."""
        part = self.landmark_part
        model = {"face_pack": self._landmarks68, "mediapipe": self._face_mesh, "": lambda: None}[part]()
        if model is None:
            return None
        key = face_key("detected", (self.signature("face_pack"), self.signature(part)), face.photo, face.box)
        height, width = face.photo.pixels.shape[:2]

        def detect() -> Landmarks:
            if part == "mediapipe":
                points = face_mesh.mesh_points68(model, face)
            else:
                points = faces.detect_landmarks68(model, face) + 0.5  # pixel centres are at 0.5
            return Landmarks(from_68(points), width, height)

        return self.cache.get_or_compute(key, detect)

    def rig(self, shape: Tensor | None) -> Rig:
        """FLAME's face as templates and sliders pose it: of DECA's shape code [S], or the mean face for None."""
        key = ("rig", self.signature("flame"), None if shape is None else shape.numpy().tobytes())
        return self.cache.get_or_compute(key, lambda: flame_rig(self._flame(), shape))

    def _flame(self) -> Flame:
        if self.files.has_deca_and_flame:
            return self.predictor().flame
        return self.cache.load("flame", self.files.require("flame"), load_head)

    def predictor(self) -> LandmarkPredictor:
        """DECA and FLAME."""
        paths = (self.files.require("deca"), self.files.require("flame"))
        return self.cache.load("predictor", paths, lambda both: load_predictor(*both))

    def check_recognition(self, expected: str, name: str = "InstantID") -> list[str]:
        """Check by file name that embeddings come from the recognition model that a FaceSnap file was made for.
        Embeddings from a different model would show a different person.

        Args:
            expected: from `recognition_of`; empty if any model can be used.
            name: name of the FaceSnap file, for messages.

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
                f"a different person's face; put {advice} into {self.files.folder}."
            )
        if is_instantids and self.network_hash("face_pack") != RECOGNITION_SHA256:
            return [f"{path} is not the antelopev2 file that {name} is made for; the face may not be recognisable."]
        return []

    def check_networks(self, source: WeightSource) -> list[str]:
        """Check by content hashes that the installed networks are the ones that a FaceSnap file was trained with. If
        the file has no hash of its recognition model, that model is checked by file name.

        Returns:
            Notes about differences that do not change the person's identity.

        Raises:
            FaceSnapError: the recognition model or CLIP is a different one, or there is no face model pack.
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
                    f"{name} was trained with a {title}{hint} other than {path}, which would produce a different "
                    f"person's face; put the one it was trained with into {self.files.folder}."
                )
            notes.append(f"{name} was trained with a {title} other than {path.name}; the pose may be less accurate.")
        return notes

    def network_hash(self, part: str) -> str:
        """The content hash of an installed network, by its name in `ModelFiles`."""
        return network_hash(part, self.files.require(part))

    def _landmarks68(self) -> Any:
        return self.cache.load("landmarks68", self.files.require("face_pack"), faces.load_landmarks68)

    def _face_mesh(self) -> face_mesh.FaceMesh:
        return self.cache.load("mediapipe", self.files.require("mediapipe"), face_mesh.load_face_mesh)

    def _face_pack(self) -> FacePack:
        return self.cache.load("face_pack", self.files.require("face_pack"), faces.load_pack)
