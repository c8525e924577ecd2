"""References and a pose go in, guidance comes out: loading, running and remembering the networks before sampling."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor

from facesnap_ext import faces
from facesnap_ext.clip import load_image_encoder
from facesnap_ext.convert import convert_originals
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.faces import Face, NoFaceError
from facesnap_ext.guidance import Guidance
from facesnap_ext.landmarks.points72 import Landmarks, place
from facesnap_ext.landmarks.poses import Rig, make_rig, moved, pose_landmarks, pose_of
from facesnap_ext.landmarks.predictor import FaceCodes, LandmarkPredictor, load_predictor
from facesnap_ext.mixer import average_references
from facesnap_ext.photos import Photo
from facesnap_ext.settings import Unit
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.places import ModelFiles

T = TypeVar("T")
REMEMBERED = 32  # results of each kind; tokens and points are small


@dataclass(frozen=True)
class Prepared:
    """Guidance, and what people may want to know of how it came about."""

    guidance: Guidance
    references: tuple[Face, ...]
    driving: Face | None  # whose pose it is: in the driving photo, the init picture or the first reference, or nobody's
    in_init_picture: bool  # the landmarks are in pixels of the init picture, for the host to crop as it crops that
    notes: tuple[str, ...]  # what was done otherwise than asked, in sentences


class Engine:
    """Holds what was loaded and what was computed, all keyed by content: files by their place, size and time, photos
    by their pixels. Encoders run on the CPU; only FFRNet ever goes to the GPU, and that is the host's business."""

    def __init__(self, find_models: Callable[[], ModelFiles]):
        self._find_models = find_models
        self._loaded: dict[str, tuple[Hashable, Any]] = {}  # one model of each part
        self._remembered: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = RLock()  # jobs and the page's own requests come in threads of their own

    def prepare(
        self,
        unit: Unit,
        width: int,
        height: int,
        init_picture: Photo | None = None,
        progress: Callable[[str], None] = lambda message: None,
    ) -> Prepared:
        """Prepare one job.

        Args:
            width, height: of the output picture in pixels; the landmarks are placed in it.
            init_picture: what img2img starts from; the default driving photo, if it has a face.
            progress: told what is being done, in a few words.

        Raises:
            FaceSnapError: a photo or a model file is missing or unfit.
        """
        if not unit.references:
            raise FaceSnapError("FaceSnap is enabled without a reference photo; add one or disable FaceSnap.")
        pose = pose_of(unit, width, height) if unit.pose in ("template", "sliders") else None
        files = self.files(progress)
        facesnap = files.choose_facesnap(unit.model)

        progress("looking for the face")
        references = tuple(self.face(files, photo, unit.face) for photo in unit.references)
        notes = [
            f"The face in {face.photo.name} fills the picture; it was found with a border added."
            for face in references
            if face.padded
        ]
        driving, in_init_picture = references[0], False
        if pose is not None:
            driving = None
        elif unit.pose == "photo" and unit.driving is not None:
            driving = self.face(files, unit.driving, unit.driving_face)
        elif unit.pose == "photo" and init_picture is not None:
            try:
                driving, in_init_picture = self.face(files, init_picture, unit.driving_face), True
            except NoFaceError:
                notes.append("The init picture has no face; the pose is the reference's own.")

        progress("loading the FaceSnap file")
        weights = self._load("facesnap", facesnap, facesnap_file.load)
        progress("encoding the face")
        tokens = self.tokens(files, weights, facesnap, references, unit.average)
        progress("predicting landmarks")
        if pose is not None:
            landmarks = pose_landmarks(self.rig(files, self.codes(files, references[0]).shape), pose, width, height)
        else:
            landmarks = self.landmarks(files, references[0], driving)
            if not in_init_picture:
                landmarks = place(landmarks, width, height, driving.box)
            landmarks = moved(landmarks, unit.x, unit.y, unit.size)
        guidance = Guidance(
            ffrnet=weights.ffrnet,
            tokens=tokens,
            landmarks=landmarks,
            weight=unit.weight,
            start=unit.start,
            end=unit.end,
            cond_only=unit.cond_only,
            text_free=weights.info.text_free,
            name=weights.name,
        )
        return Prepared(guidance, references, driving, in_init_picture, tuple(notes))

    def files(self, progress: Callable[[str], None] = lambda message: None) -> ModelFiles:
        """The model files that are there; DECA's and FLAME's own are converted first, once."""
        files = self._find_models()
        with self._lock:
            convert_originals(files, progress)
        return files

    def face(self, files: ModelFiles, photo: Photo, which: int = 0) -> Face:
        """A face of a photo, by size from the largest."""
        return faces.choose(self.faces(files, photo), which)

    def faces(self, files: ModelFiles, photo: Photo) -> list[Face]:
        """All faces of a photo, by size from the largest.

        Raises:
            NoFaceError: there is none.
        """
        folder = files.require("face_pack")

        def find() -> list[Face]:
            found = faces.find_faces(self._load("face_pack", folder, faces.load_pack), photo)
            return [replace(face, photo=None) for face in found]  # pixels are large: they stay with the job

        found = self._remember(("faces", _signature(folder), photo.digest), find)
        return [replace(face, photo=photo) for face in found]

    def tokens(
        self,
        files: ModelFiles,
        weights: facesnap_file.FaceSnapWeights,
        facesnap: Path,
        references: tuple[Face, ...],
        average: bool,
    ) -> Tensor:
        """Identity tokens [1, queries, dim] of one person's faces."""

        def mix() -> Tensor:
            embeddings = torch.stack([torch.from_numpy(face.embedding) for face in references])[None]
            clip_tokens = torch.stack([self.clip_tokens(files, face) for face in references])[None]
            if average:
                embeddings, clip_tokens = average_references(embeddings, clip_tokens)
            check_features(embeddings, clip_tokens, weights)
            with torch.no_grad():
                return weights.mixer.float()(embeddings, clip_tokens)

        people = tuple((face.photo.digest, *face.box) for face in references)
        sources = tuple(map(_signature, (facesnap, files.require("face_pack"), files.require("clip"))))
        return self._remember(("tokens", sources, people, average), mix)

    def clip_tokens(self, files: ModelFiles, face: Face) -> Tensor:
        """CLIP tokens [T, width] of a face's crop. The encoder is large and rarely wanted: it is not kept."""
        path = files.require("clip")
        key = ("clip", _signature(path), _signature(files.require("face_pack")), face.photo.digest, *face.box)
        return self._remember(key, lambda: load_image_encoder(path)([face.crop])[0])

    def codes(self, files: ModelFiles, face: Face) -> FaceCodes:
        """What DECA sees in a face."""
        key = ("codes", _signature(files.require("deca")), face.photo.digest, *face.box)
        return self._remember(key, lambda: self.predictor(files).encode(face.photo.pixels, face.box))

    def landmarks(self, files: ModelFiles, source: Face, driving: Face) -> Landmarks:
        """The source's 72 points in the pose and expression of the driving face, in the driving photo's pixels."""
        deca, flame = files.require("deca"), files.require("flame")

        def predict() -> Landmarks:
            return self.predictor(files).predict(self.codes(files, source), self.codes(files, driving))

        key = ("landmarks", _signature(deca), _signature(flame))
        key += tuple((face.photo.digest, *face.box) for face in (source, driving))
        return self._remember(key, predict)

    def rig(self, files: ModelFiles, shape: Tensor | None) -> Rig:
        """What templates and sliders pose: a face of this shape, [S] from `codes`, or with None FLAME's mean face."""
        networks = (_signature(files.require("deca")), _signature(files.require("flame")))
        key = ("rig", *networks, None if shape is None else shape.numpy().tobytes())
        return self._remember(key, lambda: make_rig(self.predictor(files).flame, shape))

    def preview(
        self,
        reference: Photo | None = None,
        driving: Photo | None = None,
        size: tuple[int, int] | None = None,
        face: int = 0,
        driving_face: int = 0,
    ) -> tuple[Rig, Landmarks | None]:
        """What a job will pose, before it runs.

        Args:
            reference: whose face; None: FLAME's mean face, and for the landmarks that of the driving photo.
            driving: whose pose and expression; None: the reference's own.
            size: width and height of the output picture that the landmarks are placed in; None leaves them in the
                driving photo's pixels, as where an init picture drives.
            face, driving_face: which face of either photo.

        Returns:
            The rig for templates and sliders, and the landmarks for poses "photo" and "own"; None without a photo.

        Raises:
            FaceSnapError: a photo or a model file is missing or unfit.
        """
        files = self.files()
        source = None if reference is None else self.face(files, reference, face)
        drives = source if driving is None else self.face(files, driving, driving_face)
        rig = self.rig(files, None if source is None else self.codes(files, source).shape)
        if drives is None:
            return rig, None
        landmarks = self.landmarks(files, source or drives, drives)
        return rig, landmarks if size is None else place(landmarks, *size, drives.box)

    def predictor(self, files: ModelFiles) -> LandmarkPredictor:
        """DECA and FLAME."""
        paths = (files.require("deca"), files.require("flame"))
        return self._load("predictor", paths, lambda both: load_predictor(*both))

    def _load(self, part: str, source: Any, load: Callable[[Any], T]) -> T:
        """The model of a part; loaded anew when its file is another one or has changed."""
        paths = source if isinstance(source, tuple) else (source,)
        signature = tuple(map(_signature, paths))
        with self._lock:
            if self._loaded.get(part, (None,))[0] != signature:
                self._loaded.pop(part, None)  # the old one goes before the new one comes
                self._loaded[part] = (signature, load(source))
            return self._loaded[part][1]

    def _remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._remembered:
                self._remembered[key] = compute()
                while len(self._remembered) > REMEMBERED:
                    self._remembered.popitem(last=False)
            self._remembered.move_to_end(key)
            return self._remembered[key]


def check_features(embeddings: Tensor, clip_tokens: Tensor, weights: facesnap_file.FaceSnapWeights) -> None:
    """Raise `FaceSnapError` when the features are not as wide as the Mixer wants them."""
    mixer = weights.info.mixer
    for what, features, wanted in (
        ("face recognition pack", embeddings, mixer.id_dim),
        ("CLIP image encoder", clip_tokens, mixer.clip_dim),
    ):
        if features.shape[-1] != wanted:
            raise FaceSnapError(
                f"{weights.name} wants features of {wanted} numbers from the {what}, and the one found gives "
                f"{features.shape[-1]}; use the {what} that models/README.md names for this file."
            )


def _signature(path: Path) -> Hashable:
    """Changes when the file, or a file in the folder, does."""
    members = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((str(member), member.stat().st_size, member.stat().st_mtime_ns) for member in members)
