"""The contents of the model folders: which file is used for each part, and which parts are missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.catalogue import STARTER_ADVICE, WHERE_TO_GET
from facesnap_ext.weights.face_pack import pack_files
from facesnap_ext.weights.source import WeightSource, paths_of, takes_clip

MISSING_MESSAGES = {  # by part; each completes the sentence "There is …"
    "facesnap": "neither InstantID nor a FaceSnap file",
    "face_pack": "no face model pack (the .onnx files of insightface's antelopev2 or buffalo_l, in a folder)",
    "clip": "no CLIP-ViT-H image encoder",
    "deca": "no DECA encoder (deca_model.tar)",
    "flame": "no FLAME head model (generic_model.pkl)",
    "mediapipe": "no landmark detector of MediaPipe (face_landmarker.task, converted)",
    "image_classifier": "no image classifier (a folder with model.safetensors, config.json, preprocessor_config.json)",
}


@dataclass(frozen=True)
class FoundModel:
    """A usable file, or a usable folder (a face model pack, or a CLIP in transformers' layout).

    Args:
        role: a name in `catalogue.ROLES`.
        kind: completes the sentence "this is …".
        folder: the folder whose search found it.
        rank: order of preference among the models of one role in one folder; the lowest is used.
        unfit: the reason why it is never used, in one sentence; empty if it can be used.
    """

    role: str
    path: Path
    kind: str
    folder: Path
    rank: int = 0
    unfit: str = ""


@dataclass
class ModelFiles:
    """What was found in the model folders.

    Args:
        folder: FaceSnap's own model folder.
        facesnap: weight sources by file name; InstantID's pairs are named "InstantID".
        face_pack, clip, deca, flame, mediapipe, image_classifier: the path in use; None if the part is missing.
        passed_over: the reasons why files in FaceSnap's own folder were skipped, one sentence each.
        unconverted: by part, the reasons why its original files could not be converted.
        elsewhere: the other folders that exist and were searched.
        found: all usable models, duplicates included; those in FaceSnap's own folder come first.
    """

    folder: Path
    facesnap: dict[str, WeightSource] = field(default_factory=dict)
    face_pack: Path | None = None
    clip: Path | None = None
    deca: Path | None = None
    flame: Path | None = None
    mediapipe: Path | None = None
    image_classifier: Path | None = None
    passed_over: list[str] = field(default_factory=list)
    unconverted: dict[str, list[str]] = field(default_factory=dict)
    elsewhere: tuple[Path, ...] = ()
    found: list[FoundModel] = field(default_factory=list)

    def require(self, part: str) -> Path:
        """Return the path of a part.

        Raises:
            FaceSnapError: it is missing; the message says where to put which file.
        """
        path: Path | None = getattr(self, part)
        if path is None:
            raise FaceSnapError(self._missing_message(part))
        return path

    def choose_facesnap(self, name: str = "") -> WeightSource:
        """Return the FaceSnap file of this name.

        Without a name, it is the only one in FaceSnap's own folder or, if that has none, in the first other folder that
        has any.

        Raises:
            FaceSnapError: no file exists, or there are several to choose from.
        """
        if name in self.facesnap:
            return self.facesnap[name]
        names = ", ".join(sorted(self.facesnap))
        if name:
            advice = f"choose one of {names}" if names else STARTER_ADVICE.rstrip(".")
            raise FaceSnapError(f"There is no FaceSnap file {name} in {self.folder}; {advice}.")
        if not names:
            raise FaceSnapError(self._missing_message("facesnap"))
        folder = min(map(self._folder_of, self.facesnap.values()), key=self._folders.index)
        candidates = {name: source for name, source in self.facesnap.items() if self._folder_of(source) == folder}
        if len(candidates) > 1:
            names = ", ".join(sorted(candidates))
            raise FaceSnapError(
                f"There are several FaceSnap files in {folder} ({names}); choose one in the accordion under Advanced, "
                "FaceSnap file, or in the API as model."
            )
        return next(iter(candidates.values()))

    def match_pack(self, recognition: str) -> None:
        """Use the first complete face model pack whose recognition model has this file name.

        If there is no such pack, or the name is empty, the choice of pack does not change. AuraFace's recognition model
        has the same file name as antelopev2's, so a pack in a folder called antelopev2 is preferred.
        """
        matching = self.packs_with(recognition)
        antelope = [pack for pack in matching if any("antelope" in part.lower() for part in pack.parts[-2:])]
        if preferred := antelope or matching:
            self.face_pack = preferred[0]

    def packs_with(self, recognition: str) -> list[Path]:
        """Return the complete face model packs whose recognition model has this file name, best first."""
        packs = [pack.path for pack in self.candidates("face_pack") if pack.rank == 0]
        names = {pack: path.name.lower() for pack in packs if (path := pack_files(pack).recognition)}
        return [pack for pack, name in names.items() if name == recognition.lower()]

    def candidates(self, role: str) -> list[FoundModel]:
        """Return everything that was found for a role, best first."""
        candidates = [model for model in self.found if model.role == role]
        if role == "face_pack":  # an incomplete pack comes last, wherever it is
            return sorted(candidates, key=lambda model: (model.rank, self._folders.index(model.folder)))
        return sorted(candidates, key=lambda model: (self._folders.index(model.folder), model.rank))

    def usable(self, role: str) -> list[FoundModel]:
        """Return the candidates for a role without those that are never used."""
        return [model for model in self.candidates(role) if not model.unfit]

    @property
    def has_deca_and_flame(self) -> bool:
        """Whether a DECA encoder and a FLAME model that fits it were found."""
        return self.deca is not None and self.flame is not None

    def missing(self) -> dict[str, str]:
        """Return a message for each required part that is missing. InstantID does not require CLIP, and nothing
        requires DECA, FLAME, MediaPipe and an image classifier."""
        required = ["facesnap", "face_pack", *(["clip"] if self._needs_clip() else [])]
        return {part: self._missing_message(part) for part in required if not getattr(self, part)}

    def _needs_clip(self) -> bool:
        try:
            return not self.facesnap or any(map(takes_clip, self.facesnap.values()))
        except FaceSnapError:  # a damaged file is reported when a job loads it
            return True

    @property
    def _folders(self) -> list[Path]:
        return [self.folder, *self.elsewhere]

    def _folder_of(self, source: WeightSource) -> Path:
        """Return the folder in which a source was found.

        It is FaceSnap's own folder if that contains either file of a pair, or if a caller added the source to
        `facesnap`.
        """
        folders = [model.folder for model in self.found if model.path in paths_of(source)]
        return min(folders, key=self._folders.index, default=self.folder)

    def _missing_message(self, part: str) -> str:
        advice = (
            STARTER_ADVICE if part in ("facesnap", "face_pack") else f"put one there ({WHERE_TO_GET.format('it')})."
        )
        message = f"There is {MISSING_MESSAGES[part]} in {self.folder}; {advice}"
        unfit = [model.unfit for model in self.candidates(part) if model.unfit]
        reasons = [*self.unconverted.get(part, ()), *unfit, *self.passed_over]
        return f"{message} Skipped: {' '.join(reasons)}" if reasons else message
