"""From a unit's settings and photos to `Conditioning`, in four stages: faces, tokens, landmarks, conditioning."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock

from torch import Tensor

from facesnap_ext.cache import Cache, signature_of
from facesnap_ext.conditioning import Conditioning, Placement
from facesnap_ext.convert import convert_originals
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.init_part import WHOLE_IMAGE, InitPart
from facesnap_ext.identity.job_faces import POSED, Faces, Progress, find_faces, no_progress
from facesnap_ext.identity.job_landmarks import in_output, pose_as_sliders, predict_landmarks
from facesnap_ext.identity.likeness import likeness, match_faces
from facesnap_ext.identity.predictors import NoLandmarksError, Preview, choose_predictor
from facesnap_ext.identity.references import ReferenceReport, examine
from facesnap_ext.identity.saved import choose_networks, load_identity
from facesnap_ext.identity.tokens import embeddings_of, mix, null_tokens, token_signatures
from facesnap_ext.landmarks.hints import POINTS72
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.landmarks.poses import Pose
from facesnap_ext.networks.ffrnet import KeysValues
from facesnap_ext.photos import Photo
from facesnap_ext.regions import region_of
from facesnap_ext.settings.pose import pose_from_unit
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_ext.weights.image_classifier import ImageClassifier, load_classifier
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.source import WeightSource, load_any, load_any_adapter

ADAPTERS = 4  # maximum number of people whose adapter results are cached: as many as the page allows in one image


@dataclass(frozen=True)
class Tokens:
    """A person's identity tokens [1, queries, dim], and what a FaceSnap file derives from them.

    Attributes:
        uncond: tokens for unconditional rows; None if they are the same.
        adapter: see `Conditioning.adapter`.
    """

    cond: Tensor
    uncond: Tensor | None = None
    adapter: Callable[[], tuple[KeysValues, ...]] | None = None


@dataclass(frozen=True)
class Prepared:
    """A person's conditioning, and information about it for the user.

    Attributes:
        references, driving, in_init_image, absent: see `Faces`.
        notes: sentences that tell the user where the result deviates from the request.
        embeddings: see `Faces.embeddings`.
        face_pack: the pack that the embeddings come from.
        predictor: name of the Landmark Predictor: "DECA and FLAME" or "open face model".
    """

    conditioning: Conditioning
    references: tuple[Face, ...]
    driving: Face | None
    in_init_image: bool
    notes: tuple[str, ...]
    embeddings: Tensor | None = None
    face_pack: Path | None = None
    absent: bool = False
    predictor: str = ""


class Engine:
    """Keeps loaded networks and computed features between jobs, keyed by content: path, size and time for files, and
    pixels for photos. Only FFRNet is ever moved to the GPU, and the host does that."""

    def __init__(self, find_models: Callable[[], ModelFiles]):
        self._find_models = find_models
        self._cache = Cache()
        self._converting = Lock()

    def files(self, progress: Progress = no_progress) -> ModelFiles:
        """The installed model files. The original files of DECA and FLAME are converted first, if this has not been
        done yet."""
        files = self._find_models()
        with self._converting:
            convert_originals(files, progress)
        return files

    def encoders(self, files: ModelFiles | None = None) -> Encoders:
        """Encoders for these model files; by default for the files that are installed now, without converting any."""
        return Encoders(self._cache, files or self._find_models())

    def prepare(
        self,
        unit: Unit,
        width: int,
        height: int,
        init_image: Photo | None = None,
        progress: Progress = no_progress,
        files_kept: int = 1,
        init_part: InitPart = WHOLE_IMAGE,
    ) -> Prepared:
        """Prepare one person of a job.

        Args:
            width, height: size of the output image in pixels, in which the landmarks are placed.
            init_image: the image that img2img starts from; the default driving photo, if it has a face.
            progress: receives a short description of each step.
            files_kept: number of FaceSnap files that stay loaded, including this one. A job needs as many as its people
                use.
            init_part: the part of the init image that the job changes.

        Raises:
            FaceSnapError: a photo or a model file is missing or unusable.
        """
        if not unit.references and not unit.identity:
            raise FaceSnapError("FaceSnap is enabled without a reference photo; add one or disable FaceSnap.")
        if unit.reference_mode == "batch" and len(unit.references) > 1:
            raise ValueError("photos in batch mode are prepared one by one; see batches_by_photo")
        if init_part.tile:
            unit = _in_tile(unit, init_part)
        files = self.files(progress)
        if unit.pose in POSED:
            pose_from_unit(unit, width, height, files.folder)  # report an unknown template before anything is loaded
        source = files.choose_facesnap(unit.model)
        choose_networks(files, source, unit.identity)
        encoders = self.encoders(files)
        signatures = token_signatures(encoders, source)
        notes = encoders.check_networks(source)

        progress("detecting the face")
        # Load the file meanwhile. The thread ends with this block, also after an error, because hosts replace layers of
        # torch.nn while they load their own models.
        with ThreadPoolExecutor(1, "facesnap") as thread:
            loading = thread.submit(self._cache.load_variant, "facesnap", source, load_any, files_kept)
            faces = find_faces(encoders, unit, init_image, progress, init_part)
            progress("loading the FaceSnap file")
            weights = loading.result()
        progress("encoding the face")
        tokens = self.encode(encoders, source, weights, faces, unit, signatures)
        progress("predicting landmarks")
        landmarks: Landmarks | None = None
        landmark_notes: tuple[str, ...] = ()
        title = ""
        if not faces.absent:
            predictor = choose_predictor(encoders, faces.references, faces.saved)
            landmarks, landmark_notes = predict_landmarks(
                predictor, unit, faces, weights.info.hint, width, height, files.folder
            )
            title = predictor.title
        unconverted = [*files.unconverted.get("deca", ()), *files.unconverted.get("flame", ())]
        return Prepared(
            conditioning=condition(unit, weights, tokens, landmarks),
            references=faces.references,
            driving=faces.driving,
            in_init_image=faces.in_init_image,
            notes=(*notes, *faces.notes, *landmark_notes, *unconverted),
            embeddings=faces.embeddings,
            face_pack=files.face_pack,
            absent=faces.absent,
            predictor=title,
        )

    def likenesses_to(self, unit: Unit, image: Photo) -> list[float]:
        """`likeness.likeness` of each face in an image to a unit's person, the largest face first.

        Raises:
            FaceSnapError: a photo, the saved identity or a model file is missing or unusable.
        """
        files = self.files()
        choose_networks(files, files.choose_facesnap(unit.model), unit.identity)
        encoders = self.encoders(files)
        saved = load_identity(encoders, unit.identity) if unit.identity else None
        embeddings = embeddings_of([encoders.face(photo, unit.face_index) for photo in unit.references], saved)
        return [likeness(face, embeddings) for face in encoders.faces(image)]

    def encode(
        self,
        encoders: Encoders,
        source: WeightSource,
        weights: FaceSnapWeights,
        faces: Faces,
        unit: Unit,
        signatures: Hashable,
    ) -> Tokens:
        """Mix a person's features into identity tokens.

        Args:
            signatures: the files' signatures, taken before any file was read; see `token_signatures`.
        """
        average = unit.reference_mode == "averaged"
        people = tuple([(face.photo.digest, *face.box) for face in faces.references])
        key = ("tokens", signatures, people, faces.saved, average)
        cond = self._cache.get_or_compute(key, lambda: mix(encoders, weights, faces.references, faces.saved, average))
        uncond = None
        if weights.info.null_identity:
            noise = unit.uncond_noise
            uncond = self._cache.get_or_compute(("null tokens", signatures, noise), lambda: null_tokens(weights, noise))
        adapter = None
        if weights.info.adapter is not None and unit.strength.adapter_weight > 0:
            adapter = partial(self._adapter, source, cond, cond if uncond is None else uncond)
        return Tokens(cond, uncond, adapter)

    def _adapter(self, source: WeightSource, tokens: Tensor, uncond_tokens: Tensor) -> tuple[KeysValues, ...]:
        """The keys and values that a FaceSnap file's adapter computes from a person's tokens; see `Adapter.forward`.

        The result is large (21 MB per person for InstantID, from 1.4 GB of weights). It is computed when the person's
        image begins, from weights that are loaded only for this, and cached for the people of one image.
        """
        key = ("adapter", signature_of(source), tokens.numpy().tobytes(), uncond_tokens.numpy().tobytes())
        return self._cache.get_or_compute(key, lambda: load_any_adapter(source)(tokens, uncond_tokens), ADAPTERS)

    def examine(self, photos: Sequence[Photo], face_index: int = 0, batch: bool = False) -> ReferenceReport:
        """Report on reference photos before a job.

        Args:
            face_index: `Unit.face_index`.
            batch: whether each photo shows a different person.

        Raises:
            FaceSnapError: there is no face model pack. A photo without a face is a warning in the report.
        """
        encoders = self.encoders()
        return examine([(photo, encoders.faces(photo)) for photo in photos], face_index, batch)

    def image_classifier(self) -> ImageClassifier | None:
        """The installed image classifier; None if no classifier is installed.

        Raises:
            FaceSnapError: it cannot be used; see `load_classifier`.
        """
        path = self._find_models().image_classifier
        return None if path is None else self._cache.load("image_classifier", path, load_classifier)

    def likenesses(self, image: Photo, people: Sequence[Prepared], places: Sequence[Placement]) -> list[float | None]:
        """`likeness.likeness` of each person's face in a finished image; None for people without a face or embeddings.

        Args:
            people: all people in the image. Their embeddings are compared with the pack that they come from.
            places: their landmarks and regions in this image, at any size; see `likeness.match_faces`.
        """
        files = self._find_models()
        installed = files.face_pack
        measured: list[float | None] = []
        for number, person in enumerate(people):
            if person.embeddings is None:
                measured.append(None)
                continue
            files.face_pack = person.face_pack or installed
            face = match_faces(self.encoders(files).faces(image), places)[number]
            measured.append(None if face is None else likeness(face, person.embeddings))
        return measured

    def preview(
        self,
        references: Sequence[Photo] = (),
        driving: Photo | None = None,
        size: tuple[int, int] | None = None,
        face_index: int = 0,
        driving_face_index: int = 0,
        identity: str = "",
        expression: tuple[Photo, int] | None = None,
    ) -> Preview:
        """The rig and the landmarks of a job, before it runs.

        Args:
            references: photos of the person; without any, the saved identity named `identity` is used. Without either,
                the rig is a mean face and the landmarks have the driving face's own shape.
            driving: the photo that provides pose and expression; None uses the first reference's own.
            size: width and height of the output image in which the landmarks are placed; None leaves them in the
                driving photo's pixels, as with an init image.
            face_index, driving_face_index: the face to use in the photos.
            expression: the photo whose expression replaces that of the pose, and the index of its face.

        Raises:
            FaceSnapError: a photo, the saved identity or a model file is missing or unusable.
        """
        encoders = self.encoders(self.files())
        faces = [encoders.face(photo, face_index) for photo in references]
        saved = load_identity(encoders, identity) if identity and not faces else None
        predictor = choose_predictor(encoders, faces, saved)
        rig, notes = predictor.rig()
        if driving is not None:
            driving_face = encoders.face(driving, driving_face_index)
        elif faces:
            driving_face = faces[0]
        else:
            driving_face = None
        landmarks = neutral = field = None
        try:
            if expression is not None:
                field = predictor.expression(encoders.face(*expression))
            if driving_face is not None:
                landmarks, notes = predictor.landmarks(driving_face, POINTS72)
                neutral, _ = predictor.neutral(driving_face)
        except NoLandmarksError as error:
            return Preview(rig, None, (*notes, str(error)), expression=field)
        if driving_face is not None and landmarks is not None and neutral is not None and size is not None:
            place = partial(in_output, face=driving_face, width=size[0], height=size[1])
            landmarks, neutral = place(landmarks), neutral.moved(place)
        return Preview(rig, landmarks, notes, neutral, field)

    def pose_as_sliders(self, unit: Unit, width: int, height: int, init_image: Photo | None = None) -> Pose:
        """The pose and the expression of a person in a job as parameters of a pose, for saving; see
        `job_landmarks.pose_as_sliders`. Arguments and errors as for `prepare`."""
        files = self.files()
        encoders = self.encoders(files)
        faces = find_faces(encoders, unit, init_image)
        predictor = choose_predictor(encoders, faces.references, faces.saved)
        return pose_as_sliders(predictor, unit, faces, width, height, files.folder)


def condition(unit: Unit, weights: FaceSnapWeights, tokens: Tokens, landmarks: Landmarks | None) -> Conditioning:
    """Assemble a person's conditioning; without landmarks, it has no region around the face."""
    return Conditioning(
        ffrnet=weights.ffrnet,
        tokens=tokens.cond,
        landmarks=landmarks,
        strength=unit.strength,
        text_free=weights.info.text_free,
        hint=weights.info.hint,
        uncond_tokens=tokens.uncond,
        name=weights.name,
        region=None if landmarks is None else region_of(unit, landmarks),
        adapter=tokens.adapter,
    )


def _in_tile(unit: Unit, part: InitPart) -> Unit:
    """A person's settings for a part of an image that a script chose: the face that is there keeps its expression.

    In a tile, which has no mask, neither the place in the whole image nor the region painted on it can be used.
    """
    unit = replace(unit, expression_source="pose")
    if part.mask is not None:
        return unit
    return replace(unit, x=None, y=None, size=None, region="face" if unit.region == "mask" else unit.region)
