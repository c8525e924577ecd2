"""References and a pose go in, guidance comes out: loading, running and remembering the networks before sampling."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from facesnap_ext.cache import Cache, signature_of
from facesnap_ext.conditioning import Conditioning
from facesnap_ext.convert import convert_originals
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import Face, NoFaceError
from facesnap_ext.identity.likeness import face_at, likeness
from facesnap_ext.identity.references import ReferenceReport, examine, padded_note
from facesnap_ext.identity.saved import load_identity
from facesnap_ext.landmarks.points72 import Landmarks, place
from facesnap_ext.landmarks.poses import Rig, make_rig, moved, pose_landmarks, pose_of
from facesnap_ext.networks.ffrnet import KeysValues
from facesnap_ext.photos import Photo
from facesnap_ext.regions import region_of
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.identity_file import Identity
from facesnap_ext.weights.instantid import RECOGNITION_SHA256, load_any, load_any_adapter, recognition_of
from facesnap_ext.weights.places import ModelFiles, WeightSource


@dataclass(frozen=True)
class Prepared:
    """Guidance, and what people may want to know of how it came about."""

    conditioning: Conditioning
    references: tuple[Face, ...]
    driving: Face | None  # whose pose it is: in the driving photo, the init picture or the first reference, or nobody's
    in_init_picture: bool  # the landmarks are in pixels of the init picture, for the host to crop as it crops that
    notes: tuple[str, ...]  # what was done otherwise than asked, in sentences
    embeddings: Tensor | None = None  # ArcFace's [R, E] of all references, those of a saved identity last
    recognition: str = ""  # the recognition model that they have to be of, see `FaceSnapInfo.recognition`


ADAPTERS = 4  # people whose adapter's keys and values are kept, as many as the page can have in one picture


class Engine:
    """Holds what was loaded and what was computed, all keyed by content: files by their place, size and time, photos
    by their pixels. Only FFRNet ever goes to the GPU, and that is the host's business."""

    def __init__(self, find_models: Callable[[], ModelFiles]):
        self._find_models = find_models
        self._cache = Cache()
        self.encoders = Encoders(self._cache)

    def prepare(
        self,
        unit: Unit,
        width: int,
        height: int,
        init_picture: Photo | None = None,
        progress: Callable[[str], None] = lambda message: None,
        files_kept: int = 1,
    ) -> Prepared:
        """Prepare one person of a job.

        Args:
            width, height: of the output picture in pixels; the landmarks are placed in it.
            init_picture: what img2img starts from; the default driving photo, if it has a face.
            progress: told what is being done, in a few words.
            files_kept: FaceSnap files that stay loaded, this one and those last used before it; a job whose people
                have different files wants as many as these are.

        Raises:
            FaceSnapError: a photo or a model file is missing or unfit.
        """
        if not unit.references and not unit.identity:
            raise FaceSnapError("FaceSnap is enabled without a reference photo; add one or disable FaceSnap.")
        if unit.several == "apart" and len(unit.references) > 1:
            raise ValueError("photos of a person each are prepared one by one, see settings.sittings")
        pose = pose_of(unit, width, height) if unit.pose in ("template", "sliders") else None
        files = self.files(progress)
        facesnap = files.choose_facesnap(unit.model)
        recognition = recognition_of(facesnap)
        files.match_pack(recognition)
        signatures = self.signatures(files, facesnap)
        notes = self.check_recognition(files, recognition)

        progress("looking for the face")
        references = tuple(self.encoders.face(files, photo, unit.face) for photo in unit.references)
        notes += [padded_note(face) for face in references if face.padded]
        saved = load_identity(self.encoders, files, unit.identity, progress) if unit.identity else None
        driving, in_init_picture = references[0] if references else None, False
        if pose is not None:
            driving = None
        elif unit.pose == "photo" and unit.driving is not None:
            driving = self.encoders.face(files, unit.driving, unit.driving_face)
        elif unit.pose == "photo" and init_picture is not None:
            try:
                driving, in_init_picture = self.encoders.face(files, init_picture, unit.driving_face), True
            except NoFaceError:
                if references:
                    notes.append("The init picture has no face; the pose is the reference's own.")
        if driving is None and pose is None:
            raise FaceSnapError(
                f"The saved identity {unit.identity} has no pose of its own; add a driving photo with a face, or "
                "choose a template or the sliders."
            )

        progress("loading the FaceSnap file")
        weights = self._cache.load_one_of("facesnap", facesnap, load_any, files_kept)
        progress("encoding the face")
        tokens = self.tokens(files, weights, references, unit.several == "averaged", saved, signatures)
        uncond_tokens = self.null_tokens(weights, signatures) if weights.info.null_identity else None
        adapter = None
        if weights.info.adapter is not None and unit.adapter > 0:
            adapter = partial(self.adapter, facesnap, tokens, tokens if uncond_tokens is None else uncond_tokens)
        progress("predicting landmarks")
        if pose is not None:
            shape = self.source_shape(files, references, saved)
            landmarks = pose_landmarks(self.rig(files, shape), pose, width, height)
        else:
            if files.predicts:
                landmarks = self.landmarks(files, self.source_shape(files, references, saved), driving)
            else:
                landmarks = self.encoders.detected(files, driving, weights.info.hint)
                why = [*files.unconverted.get("deca", ()), *files.unconverted.get("flame", ())]
                notes.append(" ".join((UNPREDICTED.format(driving.photo.name), *why)))
            if not in_init_picture:
                landmarks = place(landmarks, width, height, driving.box)
            landmarks = moved(landmarks, unit.x, unit.y, unit.size)
        conditioning = Conditioning(
            ffrnet=weights.ffrnet,
            tokens=tokens,
            landmarks=landmarks,
            weight=unit.weight,
            start=unit.start,
            end=unit.end,
            every=unit.every,
            cond_only=unit.cond_only,
            text_free=weights.info.text_free,
            hint=weights.info.hint,
            uncond_tokens=uncond_tokens,
            name=weights.name,
            blocks=unit.blocks,
            hires=unit.hires,
            region=region_of(unit, landmarks),
            adapter=adapter,
            adapter_weight=0.0 if adapter is None else unit.adapter,
        )
        embeddings = _embeddings(references, saved)
        return Prepared(conditioning, references, driving, in_init_picture, tuple(notes), embeddings, recognition)

    def files(self, progress: Callable[[str], None] = lambda message: None) -> ModelFiles:
        """The model files that are there; DECA's and FLAME's own are converted first, once."""
        files = self._find_models()
        with self._cache.lock:
            convert_originals(files, progress)
        return files

    def check_recognition(self, files: ModelFiles, wanted: str) -> list[str]:
        """See that embeddings are of the recognition model that a FaceSnap file is made for; with those of another the
        picture would show somebody else.

        Args:
            wanted: from `recognition_of`; empty where any will do.

        Returns:
            A note where the model has the right name and is another file.

        Raises:
            FaceSnapError: there is no face pack, or its recognition model is another one.
        """
        if not wanted:
            return []
        found = self.encoders.recognition(files)
        if found.name.lower() != wanted:
            raise FaceSnapError(
                f"InstantID is made for antelopev2's {wanted}, and the face pack {found.parent} has {found.name}, with "
                f"which the picture would show somebody else: put antelopev2 into {files.folder}."
            )
        if self.encoders.network(files, "face_pack") != RECOGNITION_SHA256:
            return [f"{found} is not antelopev2's, which InstantID is made for: the face may become somebody else's."]
        return []

    def examine(self, photos: Sequence[Photo], which: int = 0, apart: bool = False) -> ReferenceReport:
        """What there is to know of reference photos before a job; `which` is `Unit.face`, `apart` whether they are of
        a person each.

        Raises:
            FaceSnapError: there is no face pack. A photo without a face is a warning in the report.
        """
        files = self._find_models()
        return examine([(photo, self.encoders.faces(files, photo)) for photo in photos], which, apart)

    def tokens(
        self,
        files: ModelFiles,
        weights: facesnap_file.FaceSnapWeights,
        references: Sequence[Face],
        average: bool,
        saved: Identity | None,
        signatures: Hashable,
    ) -> Tensor:
        """Identity tokens [1, queries, dim] of one person's faces, and of what was saved of the same person.

        Args:
            signatures: of the files as they were before the faces were looked at and the weights were loaded.
        """
        needs_clip = weights.info.mixer.clip_dim > 0

        def mix() -> Tensor:
            embeddings, clip_tokens = _embeddings(references, saved)[None], None
            if needs_clip:
                if saved is not None and saved.clip_tokens is None:
                    raise FaceSnapError(
                        f"The identity {saved.name} was saved without CLIP's features, which {weights.name} wants; put "
                        "CLIP-ViT-H into the model folder and save it anew from photos."
                    )
                found = self.encoders.clip_tokens(files, references)
                clip_tokens = torch.stack(found + ([] if saved is None else [*saved.clip_tokens]))[None]
            if average:
                embeddings, clip_tokens = weights.mixer.average(embeddings, clip_tokens)
            check_features(embeddings, clip_tokens, weights)
            with torch.no_grad():
                return weights.mixer.float()(embeddings, clip_tokens)

        people = tuple((face.photo.digest, *face.box) for face in references)
        key = ("tokens", signatures, people, saved, average)
        return self._cache.remember(key, mix)

    def signatures(self, files: ModelFiles, facesnap: WeightSource) -> Hashable:
        """Of all files that identity tokens are made with. What is remembered of a job is kept under those that were
        there before it read any: a file that is exchanged meanwhile must not leave its predecessor's results behind."""
        return tuple(signature_of(path) for path in (facesnap, files.face_pack, files.clip) if path is not None)

    def null_tokens(self, weights: facesnap_file.FaceSnapWeights, signatures: Hashable) -> Tensor:
        """Identity tokens [1, queries, dim] of nobody: of an embedding of zeros, for weights that were trained so."""

        def mix() -> Tensor:
            with torch.no_grad():
                return weights.mixer.float()(torch.zeros(1, 1, weights.info.mixer.id_dim))

        return self._cache.remember(("null tokens", signatures), mix)

    def adapter(self, facesnap: WeightSource, tokens: Tensor, uncond_tokens: Tensor) -> tuple[KeysValues, ...]:
        """What the adapter of a FaceSnap file that has one makes of a person's tokens, see `Adapter.forward`. It is
        large (InstantID's 21 MB a person, of 1.4 GB of weights): made when the person's picture begins, of weights that
        are read for it, and kept for the people of one picture."""
        key = ("adapter", signature_of(facesnap), tokens.numpy().tobytes())
        return self._cache.remember(key, lambda: load_any_adapter(facesnap)(tokens, uncond_tokens), ADAPTERS)

    def landmarks(self, files: ModelFiles, shape: Tensor, driving: Face) -> Landmarks:
        """The 72 points of a face of this shape, [S] from `codes`, in the pose and expression of the driving face, in
        the driving photo's pixels."""

        def predict() -> Landmarks:
            predictor = self.encoders.predictor(files)
            return predictor.predict(predictor.neutral(shape), self.encoders.codes(files, driving))

        networks = (signature_of(files.require("deca")), signature_of(files.require("flame")))
        key = ("landmarks", *networks, shape.numpy().tobytes(), driving.photo.digest, *driving.box)
        return self._cache.remember(key, predict)

    def source_shape(self, files: ModelFiles, references: Sequence[Face], saved: Identity | None) -> Tensor:
        """The shape code [S] that landmarks are predicted of: of the first photo, else of the saved identity."""
        if references:
            return self.encoders.codes(files, references[0]).shape
        if saved is None or saved.shapes is None:
            raise FaceSnapError(
                "The identity was saved without the shape of the face, because DECA or FLAME was missing; save it anew "
                "from photos and with both."
            )
        shape, deca = saved.shapes[0], files.require("deca")
        if len(shape) != (wanted := self.encoders.predictor(files).deca.code_sizes["shape"]):
            raise FaceSnapError(
                f"The face's shape in the saved identity has {len(shape)} numbers where {deca.name} gives {wanted}; "
                "save the identity anew from photos."
            )
        return shape

    def likeness(
        self, picture: Photo, embeddings: Tensor, landmarks: Landmarks | None, recognition: str = ""
    ) -> float | None:
        """`likeness.likeness` of the face in a finished picture that is nearest to the landmarks; None without a face.

        Args:
            embeddings, recognition: as in `Prepared`. landmarks: for this picture, of any size.
        """
        files = self._find_models()
        files.match_pack(recognition)
        found = self.encoders.faces(files, picture)
        return likeness(face_at(found, landmarks), embeddings) if found else None

    def rig(self, files: ModelFiles, shape: Tensor | None) -> Rig:
        """What templates and sliders pose: a face of this shape, [S] from `codes`, or with None FLAME's mean face."""
        networks = (signature_of(files.require("deca")), signature_of(files.require("flame")))
        key = ("rig", *networks, None if shape is None else shape.numpy().tobytes())
        return self._cache.remember(key, lambda: make_rig(self.encoders.predictor(files).flame, shape))

    def preview(
        self,
        reference: Photo | None = None,
        driving: Photo | None = None,
        size: tuple[int, int] | None = None,
        face: int = 0,
        driving_face: int = 0,
        identity: str = "",
    ) -> tuple[Rig, Landmarks | None]:
        """What a job will pose, before it runs.

        Args:
            reference: whose face; None: that of the saved person named `identity`, and with neither FLAME's mean face,
                for the landmarks that of the driving photo.
            driving: whose pose and expression; None: the reference's own.
            size: width and height of the output picture that the landmarks are placed in; None leaves them in the
                driving photo's pixels, as where an init picture drives.
            face, driving_face: which face of either photo.

        Returns:
            The rig for templates and sliders, and the landmarks for poses "photo" and "own"; None without a photo.

        Raises:
            FaceSnapError: a photo, the saved person or a model file is missing or unfit.
        """
        files = self.files()
        references = [] if reference is None else [self.encoders.face(files, reference, face)]
        saved = load_identity(self.encoders, files, identity) if identity and not references else None
        shape = self.source_shape(files, references, saved) if references or saved else None
        rig = self.rig(files, shape)
        if driving is not None:
            drives = self.encoders.face(files, driving, driving_face)
        elif references:
            drives = references[0]
        else:
            return rig, None
        landmarks = self.landmarks(files, self.encoders.codes(files, drives).shape if shape is None else shape, drives)
        return rig, landmarks if size is None else place(landmarks, *size, drives.box)


UNPREDICTED = (
    "Without DECA and FLAME the face's points are those of {0} as they are, with the shape of the face there, which "
    "need not be the reference's; models/README.md says where to get both."
)


def _embeddings(references: Sequence[Face], saved: Identity | None = None) -> Tensor:
    """ArcFace's [R, E] of faces, then of what was saved."""
    found = [torch.from_numpy(face.embedding) for face in references]
    return torch.stack(found + ([] if saved is None else [*saved.embeddings]))


def check_features(embeddings: Tensor, clip_tokens: Tensor | None, weights: facesnap_file.FaceSnapWeights) -> None:
    """Raise `FaceSnapError` when the features are not as wide as the Mixer wants them; `clip_tokens` is None for one
    that takes none."""
    mixer = weights.info.mixer
    for what, features, wanted in (
        ("face recognition pack", embeddings, mixer.id_dim),
        ("CLIP image encoder", clip_tokens, mixer.clip_dim),
    ):
        if features is not None and features.shape[-1] != wanted:
            raise FaceSnapError(
                f"{weights.name} wants features of {wanted} numbers from the {what}, and the one found gives "
                f"{features.shape[-1]}; use the {what} that models/README.md names for this file."
            )
