"""Where model files live, and what is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.recognise import Kind, recognise

WEIGHT_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".tar", ".pkl"}
ADVICE = {
    "facesnap": "no FaceSnap file",
    "face_pack": "no face recognition pack (antelopev2's or buffalo_l's .onnx files in a folder of their own)",
    "clip": "no CLIP-ViT-H image encoder",
    "deca": "no DECA encoder (deca_model.tar)",
    "flame": "no FLAME head model (generic_model.pkl)",
}

WeightSource = Path | tuple[Path, Path]
"""A FaceSnap file, or InstantID's ControlNet and `ip-adapter.bin`."""


@dataclass
class ModelFiles:
    """What was found in the model folders; None for what is missing."""

    folder: Path
    facesnap: dict[str, WeightSource] = field(default_factory=dict)  # by file name; InstantID's pair by its own
    face_pack: Path | None = None
    clip: Path | None = None
    deca: Path | None = None
    flame: Path | None = None
    unreadable: list[str] = field(default_factory=list)  # why a file there was passed over

    def require(self, part: str) -> Path:
        """The path of a part, or a `FaceSnapError` that says what to put where."""
        path: Path | None = getattr(self, part)
        if path is None:
            raise FaceSnapError(self._is_missing(part))
        return path

    def choose_facesnap(self, name: str = "") -> WeightSource:
        """The FaceSnap file of this name, or the only one there is."""
        if name in self.facesnap:
            return self.facesnap[name]
        names = ", ".join(sorted(self.facesnap))
        if name:
            raise FaceSnapError(f"There is no FaceSnap file {name} in {self.folder}; there is {names or 'none'}.")
        if not names:
            raise FaceSnapError(self._is_missing("facesnap"))
        if len(self.facesnap) > 1:
            raise FaceSnapError(f"There are several FaceSnap files in {self.folder} ({names}); choose one by its name.")
        return next(iter(self.facesnap.values()))

    def missing(self) -> dict[str, str]:
        """For each part that is not there, by its name, what to put where."""
        return {part: self._is_missing(part) for part in ADVICE if not getattr(self, part)}

    def _is_missing(self, part: str) -> str:
        sentence = f"There is {ADVICE[part]} in {self.folder}; put one there, models/README.md says where to get it."
        return sentence if not self.unreadable else f"{sentence} Passed over: {' '.join(self.unreadable)}"


def find_models(folder: Path, pack_folders: tuple[Path, ...] = ()) -> ModelFiles:
    """Look through the model folder; weight files are recognised by their tensors.

    Args:
        folder: holds every file, each kind in one piece: files, and folders of a face pack or of a CLIP.
        pack_folders: further folders that hold face packs, such as insightface's own.
    """
    files = ModelFiles(folder)
    paired = _place_instantid(files)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir():
            if _is_pack(path):
                files.face_pack = files.face_pack or path
            elif (path / "config.json").is_file() and not _of_kind(path, Kind.SDXL_CONTROLNET):
                files.clip = files.clip or path
        elif path.suffix in WEIGHT_SUFFIXES and path not in paired:
            _place(files, path)
    for other in pack_folders:
        packs = [path for path in sorted(other.iterdir()) if _is_pack(path)] if other.is_dir() else []
        files.face_pack = files.face_pack or next(iter(packs), None)
    return files


def identity_folder(models: Path) -> Path:
    """Where saved identities live, in the model folder."""
    return models / "identities"


def find_identities(models: Path) -> dict[str, Path]:
    """The identity files of the model folder by their names, which are their file names without `.safetensors`."""
    return {
        path.stem: path for path in sorted(identity_folder(models).glob("*.safetensors")) if _is(path, Kind.IDENTITY)
    }


def choose_identity(models: Path, name: str) -> Path:
    """The identity file of this name.

    Raises:
        FaceSnapError: there is none; names are looked up among those that are there, and never become paths.
    """
    path = {path.stem: path for path in identity_folder(models).glob("*.safetensors")}.get(name)
    if path is None:
        names = ", ".join(find_identities(models)) or "none"
        raise FaceSnapError(f"There is no identity {name!r} in {identity_folder(models)}; there is {names}.")
    return path


def _place(files: ModelFiles, path: Path) -> None:
    try:
        kind = _kind(path, path.stat().st_size, path.stat().st_mtime_ns)
    except FaceSnapError as error:
        files.unreadable.append(str(error))
        return
    if kind is Kind.FACESNAP:
        files.facesnap[path.name] = path
    elif kind is Kind.CLIP_VISION:
        files.clip = files.clip or path
    elif kind in (Kind.DECA, Kind.DECA_ORIGINAL):
        files.deca = path if kind is Kind.DECA else files.deca or path
    elif kind in (Kind.FLAME, Kind.PICKLE):
        files.flame = path if kind is Kind.FLAME else files.flame or path
    elif kind is Kind.IDENTITY:
        files.unreadable.append(f"{path.name} is a saved identity: move it into {identity_folder(files.folder)}.")
    else:
        files.unreadable.append(f"{path.name} is {kind.value}.")


def _place_instantid(files: ModelFiles) -> set[Path]:
    """Find InstantID's adapter, here or one folder down, with its ControlNet beside it or in a folder there.

    An SDXL ControlNet's tensors do not tell what it was trained for: with several of them there is no guessing.

    Returns:
        The files of the pairs, and adapters whose fault is told.
    """
    settled: set[Path] = set()
    for folder in [files.folder, *_folders(files.folder)]:
        for adapter in _of_kind(folder, Kind.INSTANTID_ADAPTER):
            found = [path for place in (folder, *_folders(folder)) for path in _of_kind(place, Kind.SDXL_CONTROLNET)]
            settled.add(adapter)
            if len(found) == 1:
                name = "InstantID" if "InstantID" not in files.facesnap else f"InstantID ({folder.name})"
                files.facesnap[name] = (found[0], adapter)
                settled.add(found[0])
            else:
                names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
                files.unreadable.append(
                    f"{adapter.name} is InstantID's adapter and wants InstantID's ControlNet, and no other, beside it "
                    f"or in a folder there; there is {names}."
                )
    return settled


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _of_kind(folder: Path, kind: Kind) -> list[Path]:
    """The weight files of a kind that lie in the folder itself."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.suffix in WEIGHT_SUFFIXES and _is(path, kind)]


@lru_cache(maxsize=256)
def _kind(path: Path, size: int, changed: int) -> Kind:
    return recognise(path)


def _is(path: Path, kind: Kind) -> bool:
    try:
        return _kind(path, path.stat().st_size, path.stat().st_mtime_ns) is kind
    except (FaceSnapError, OSError):  # damaged: whoever asks for it by its name is told
        return False


def _is_pack(path: Path) -> bool:
    return (path.is_dir() and any(path.glob("*.onnx"))) or any(path.glob("*/*.onnx"))
