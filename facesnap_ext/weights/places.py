"""Where model files live, and what is there."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from facesnap_ext.errors import FaceSnapError, printable, reason_of
from facesnap_ext.files import State, state_of
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.tensors import read_index
from facesnap_ext.weights.unpickle import is_old_torch_file

WEIGHT_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".tar", ".pkl"}
MISSING_MESSAGES = {
    "facesnap": "no FaceSnap file",
    "face_pack": "no face recognition pack (antelopev2's or buffalo_l's .onnx files in a folder of their own)",
    "clip": "no CLIP-ViT-H image encoder",
    "deca": "no DECA encoder (deca_model.tar)",
    "flame": "no FLAME head model (generic_model.pkl)",
}
IDENTITIES = "identities"  # folder of saved people in the model folder
CLIP_NAMES = ("model.safetensors", "pytorch_model.bin")  # of a transformers folder
FLAME_NAMES = ("generic_model", "flame2020", "flame2023", "flame2023_open")  # .pkl, in small letters
DETECTOR_NAMES = ("scrfd", "det_")  # how insightface's begin
OTHER_NAMES = ("1k3d68", "2d106det", "genderage")  # and those of neither detector nor recognition
MAX_DEPTH = 4  # folders below one that is looked through: …/insightface/models/antelopev2/antelopev2
MAX_FOLDERS = 256  # of one that is looked through
MAX_FILES = 512  # weight files of it
MAX_OLD_TORCH_BYTES = 64 * 2**20  # torch's files before 1.6 cannot be recognised without reading them whole
# folders of other programs that hold large files and nothing for FaceSnap
SKIPPED = {
    "animatediff_models",
    "checkpoints",
    "codeformer",
    "diffusion_models",
    "embeddings",
    "esrgan",
    "gfpgan",
    "hypernetworks",
    "lora",
    "loras",
    "realesrgan",
    "stable-diffusion",
    "text_encoder",
    "text_encoders",
    "unet",
    "upscale_models",
    "vae",
    "vae-approx",
}


WeightSource = Path | tuple[Path, Path]
"""A FaceSnap file, or InstantID's ControlNet and `ip-adapter.bin`."""


def paths_of(source: WeightSource) -> tuple[Path, ...]:
    """The files of which a source is made."""
    return source if isinstance(source, tuple) else (source,)


@dataclass(frozen=True)
class Found:
    """A file, or a folder of a face pack or of a CLIP, that FaceSnap can use."""

    role: str  # a name in `ADVICE`, or "instantid"
    path: Path
    kind: str  # completes the sentence "this is …"
    place: Path  # the folder that was looked through
    rank: int = 0  # of what one folder has for a role, the lowest is used


@dataclass
class ModelFiles:
    """What was found in the model folders; None for what is missing."""

    folder: Path
    facesnap: dict[str, WeightSource] = field(default_factory=dict)  # by file name; InstantID's pairs by its own
    face_pack: Path | None = None
    clip: Path | None = None
    deca: Path | None = None
    flame: Path | None = None
    unreadable: list[str] = field(default_factory=list)  # why a file there was passed over
    unconverted: dict[str, list[str]] = field(default_factory=dict)  # why a part's own files could not be, by part
    elsewhere: tuple[Path, ...] = ()  # folders also looked through that are there
    found: list[Found] = field(default_factory=list)  # everything of use, `folder`'s first, doubles too

    def require(self, part: str) -> Path:
        """The path of a part, or a `FaceSnapError` that says what to put where."""
        path: Path | None = getattr(self, part)
        if path is None:
            raise FaceSnapError(self._is_missing(part))
        return path

    def choose_facesnap(self, name: str = "") -> WeightSource:
        """The FaceSnap file of this name; or the only one of the model folder, or else of the first place with one."""
        if name in self.facesnap:
            return self.facesnap[name]
        names = ", ".join(sorted(self.facesnap))
        if name:
            raise FaceSnapError(f"There is no FaceSnap file {name} in {self.folder}; there is {names or 'none'}.")
        if not names:
            raise FaceSnapError(self._is_missing("facesnap"))
        place = min(map(self._place_of, self.facesnap.values()), key=self._places.index)
        candidates = {name: source for name, source in self.facesnap.items() if self._place_of(source) == place}
        if len(candidates) > 1:
            names = ", ".join(sorted(candidates))
            raise FaceSnapError(f"There are several FaceSnap files in {place} ({names}); choose one by its name.")
        return next(iter(candidates.values()))

    def match_pack(self, recognition: str) -> None:
        """Take the first whole face pack that has this recognition model, if any has; with no name the one taken stays.

        AuraFace's has the name of antelopev2's: one in a folder that is called antelopev2 comes first.
        """
        packs = [pack.path for pack in self.candidates("face_pack") if pack.rank == 0]
        having = [pack for pack in packs if recognition in _onnx_names(pack)]
        called_so = [pack for pack in having if any("antelope" in part.lower() for part in pack.parts[-2:])]
        self.face_pack = (called_so or having or [self.face_pack])[0]

    def candidates(self, role: str) -> list[Found]:
        """Everything that was found for a role, best first."""
        found = [found for found in self.found if found.role == role]
        if role == "face_pack":  # half a pack is of no use, wherever it is
            return sorted(found, key=lambda found: (found.rank, self._places.index(found.place)))
        return sorted(found, key=lambda found: (self._places.index(found.place), found.rank))

    @property
    def predicts(self) -> bool:
        """Whether what the Landmark Predictor needs is there."""
        return self.deca is not None and self.flame is not None

    def missing(self) -> dict[str, str]:
        """For each part that is wanted and not there, by its name, what to put where. InstantID wants no CLIP."""
        absent = [part for part in MISSING_MESSAGES if not getattr(self, part)]
        return {part: self._is_missing(part) for part in absent if part != "clip" or self._wants_clip()}

    def _wants_clip(self) -> bool:
        from facesnap_ext.weights.instantid import takes_clip

        try:
            return not self.facesnap or any(map(takes_clip, self.facesnap.values()))
        except FaceSnapError:  # of a damaged file, which its own job tells
            return True

    @property
    def _places(self) -> list[Path]:
        return [self.folder, *self.elsewhere]

    def _place_of(self, source: WeightSource) -> Path:
        """Where a source was found; FaceSnap's own folder where one of two files is from there, and for a source that a
        caller has put into `facesnap`."""
        places = [found.place for found in self.found if found.path in paths_of(source)]
        return min(places, key=self._places.index, default=self.folder)

    def _is_missing(self, part: str) -> str:
        sentence = (
            f"There is {MISSING_MESSAGES[part]} in {self.folder}; put one there, models/README.md says where to get it."
        )
        passed_over = [*self.unconverted.get(part, ()), *self.unreadable]
        return f"{sentence} Passed over: {' '.join(passed_over)}" if passed_over else sentence


def find_models(folder: Path, elsewhere: Sequence[Path] = ()) -> ModelFiles:
    """Look through the model folder, and then through others; weight files are recognised by their tensors.

    Args:
        folder: FaceSnap's own, under any names: weight files, folders of a face pack or of a CLIP.
        elsewhere: folders of other programs, which hold much that is of no use here. What `folder` has comes first, and
            only what is beyond doubt is taken: no pickle but one of FLAME's name, no CLIP but ViT-H, no pack without
            insightface's names.
    """
    files = ModelFiles(folder)
    halves: list[Found] = []  # adapters of InstantID, and SDXL ControlNets, of which one may be its IdentityNet
    for path in _look_through(folder, files.unreadable):
        _place(files, path, folder, halves)
    seen = {found.path.resolve() for found in (*files.found, *halves)}
    for place in elsewhere:
        if not place.is_dir() or place.resolve() == folder.resolve():
            continue
        files.elsewhere += (place,)
        for path in _look_through(place, files.unreadable, beside=folder):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                _place(files, path, place, halves)
    _pair_instantid(files, halves)
    for role in ("face_pack", "clip", "deca", "flame"):
        if candidates := files.candidates(role):
            setattr(files, role, candidates[0].path)
    _match_pack(files)
    return files


def identity_folder(models: Path) -> Path:
    """Where saved identities live, in the model folder."""
    return models / IDENTITIES


def find_identities(models: Path) -> dict[str, Path]:
    """The identity files of the model folder by their names, which are their file names without `.safetensors`."""
    paths = [
        path for path in sorted(identity_folder(models).glob("*.safetensors")) if printable(path.stem) == path.stem
    ]
    return {path.stem: path for path in paths if _is_identity(path)}


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


def _look_through(place: Path, told: list[str], beside: Path | None = None) -> Iterator[Path]:
    """Weight files and folders with .onnx files below a folder, nearest first, by name; `told` gets to know where it
    ended early. `beside` is FaceSnap's own folder when this is another one."""
    queue = deque([(place, 0)])
    folders = files = 0
    while queue:
        folder, depth = queue.popleft()
        folders += 1
        try:
            entries = sorted(folder.iterdir())
        except OSError:  # not there, or not ours to read
            continue
        if strange := [entry for entry in entries if printable(entry.name) != entry.name]:
            if beside is None:
                told.append(
                    printable(
                        f"{folder} has names that are not UTF-8, which no page can show; rename {strange[0].name}."
                    )
                )
            entries = [entry for entry in entries if entry not in strange]
        if depth and any(entry.suffix == ".onnx" for entry in entries):
            yield folder
        for entry in entries:
            if entry.suffix.lower() in WEIGHT_SUFFIXES and _answers(entry.is_file):
                files += 1
                if files > MAX_FILES:
                    told.append(f"{place} has more than {MAX_FILES} weight files, of which the rest was not looked at.")
                    return
                yield entry
            elif depth < MAX_DEPTH and not _is_skipped(entry, beside) and _answers(entry.is_dir):
                queue.append((entry, depth + 1))
        if queue and folders == MAX_FOLDERS:
            told.append(f"{place} has more than {MAX_FOLDERS} folders, of which the rest was not looked at.")
            return


def _answers(ask: Callable[[], bool]) -> bool:
    """What a question about a path answers; False in a folder that can be listed and not entered."""
    try:
        return ask()
    except OSError:
        return False


def _is_skipped(entry: Path, beside: Path | None) -> bool:
    if beside is None:
        return entry.name == IDENTITIES
    return entry.name.lower() in SKIPPED or (entry.name == beside.name and entry.resolve() == beside.resolve())


def _place(files: ModelFiles, path: Path, place: Path, halves: list[Found]) -> None:
    """Note what a file or a folder with .onnx files is; of another program's folder what is of no use goes unsaid."""
    own = place == files.folder
    if path.is_dir():
        names = _onnx_names(path)
        if own or _has_insightfaces_names(names):
            rank = 0 if _looks_whole(names) else 1
            _note(files, Found("face_pack", path, "a face recognition pack", place, rank))
        return
    try:
        if not own and path.stat().st_size > MAX_OLD_TORCH_BYTES and is_old_torch_file(path):
            return
        kind = _kind(path, state_of(path))
    except OSError as error:
        kind = FaceSnapError(f"{path.name} cannot be read ({error.strerror}).")
    if isinstance(kind, FaceSnapError):
        if own:
            files.unreadable.append(str(kind))
    elif kind is Kind.FACESNAP:
        files.facesnap.setdefault(path.name, path)
        files.found.append(Found("facesnap", path, kind.value, place))
    elif kind is Kind.CLIP_VISION and (own or _is_vit_h(path, state_of(path))):
        in_folder = path.name in CLIP_NAMES and path.parent != place and (path.parent / "config.json").is_file()
        _note(files, Found("clip", path.parent if in_folder else path, kind.value, place))
    elif kind in (Kind.DECA, Kind.DECA_ORIGINAL):
        _note(files, Found("deca", path, kind.value, place, 0 if kind is Kind.DECA else 1))
    elif kind is Kind.FLAME:
        _note(files, Found("flame", path, kind.value, place))
    elif kind is Kind.PICKLE and path.stem.lower() in FLAME_NAMES:
        _note(files, Found("flame", path, kind.value, place, 1))
    elif kind is Kind.PICKLE and own:  # FLAME's archives have heads of men and of women, and masks, beside the one
        _note(files, Found("flame", path, kind.value, place, 2))
    elif kind in (Kind.INSTANTID_ADAPTER, Kind.SDXL_CONTROLNET):
        halves.append(Found("instantid", path, kind.value, place))
    elif own and kind is Kind.IDENTITY:
        files.unreadable.append(f"{path.name} is a saved identity: move it into {identity_folder(files.folder)}.")
    elif own:
        files.unreadable.append(f"{path.name} is {kind.value}.")


def _note(files: ModelFiles, found: Found) -> None:
    """Add what was found, a folder with several copies of its network once."""
    if not any((known.role, known.path) == (found.role, found.path) for known in files.found):
        files.found.append(found)


def _pair_instantid(files: ModelFiles, halves: Sequence[Found]) -> None:
    """Find each InstantID adapter's ControlNet, which together serve as a FaceSnap file, and note the halves.

    No tensor tells IdentityNet from other SDXL ControlNets. It is one of InstantID's name beside the adapter or in a
    folder there; or in FaceSnap's own folder, where people put nothing else, the only one there; or else one of that
    name anywhere.
    """
    from facesnap_ext.weights.instantid import ADAPTER

    adapters = [half for half in halves if half.kind == Kind.INSTANTID_ADAPTER.value]
    nets = [half for half in halves if half.kind == Kind.SDXL_CONTROLNET.value]
    named = [net for net in nets if _is_named_instantid(net)]
    settled = {adapter.path for adapter in adapters} | {net.path for net in named}
    for adapter in adapters:
        folder = adapter.path.parent
        near = [net for net in nets if folder in (net.path.parent, net.path.parent.parent)]
        alone = near if len(near) == 1 and adapter.place == files.folder else []
        candidates = [net for net in named if net in near] or alone or named
        if candidates:
            names = ("InstantID", f"InstantID ({folder.name})", f"InstantID ({adapter.path})")
            files.facesnap[next(name for name in names if name not in files.facesnap)] = (
                candidates[0].path,
                adapter.path,
            )
            settled.add(candidates[0].path)
        else:
            there = ", ".join(str(net.path) for net in near or nets) or "none"
            files.unreadable.append(
                f"{adapter.path} is {adapter.kind} and wants InstantID's ControlNet, whose tensors are those of any "
                f"SDXL ControlNet: give it, or its folder, a name with InstantID in it; there is {there}."
            )
    paired = {net for source in files.facesnap.values() if isinstance(source, tuple) for net in source}
    files.unreadable += [
        f"{net.path} has InstantID's name and wants its {ADAPTER} beside it, without which it makes no face."
        for net in named
        if net.path not in paired and net.place == files.folder
    ]
    files.found += [half for half in halves if half.path in settled]
    for half in halves:
        if half.path not in settled and half.place == files.folder:
            files.unreadable.append(f"{half.path.name} is {half.kind}.")


def _match_pack(files: ModelFiles) -> None:
    """Where all that there is to guide pictures is made for one recognition model, take the pack that has it."""
    from facesnap_ext.weights.instantid import recognition_of

    wanted = {recognition_of(source) for source in files.facesnap.values()}
    if len(wanted) == 1:
        files.match_pack(wanted.pop())


@lru_cache(maxsize=4096)
def _kind(path: Path, state: State) -> Kind | FaceSnapError:
    """What a file is, or why that cannot be told, which is remembered too."""
    try:
        return recognise(path)
    except FaceSnapError as error:
        return FaceSnapError(str(error))  # without its traceback
    except Exception as error:  # one strange file among hundreds must not take the page away
        return FaceSnapError(f"{path.name} cannot be read ({reason_of(error, 200)}).")


@lru_cache(maxsize=256)
def _is_vit_h(path: Path, state: State) -> bool:
    """Whether a CLIP's patches are ViT-H/14's: 1280 channels of 14 by 14 pixels."""
    ends = ("patch_embedding.weight", "visual.conv1.weight")
    return any(key.endswith(ends) and shape == (1280, 3, 14, 14) for key, shape in read_index(path).shapes.items())


def _is_named_instantid(net: Found) -> bool:
    """Whether the file or a folder of it is called InstantID's."""
    parts = [re.sub(r"[\W_]", "", part.lower()) for part in net.path.relative_to(net.place).parts]
    return any("instantid" in part or part == "controlnetmodel" for part in parts)


def _has_insightfaces_names(names: Sequence[str]) -> bool:
    """Whether detector and something else are there under insightface's names."""
    return len(names) > 1 and any(name.startswith(DETECTOR_NAMES) for name in names)


def _looks_whole(names: Sequence[str]) -> bool:
    """Whether there may be a recognition model beside a detector: something that is none of insightface's others."""
    return len(names) > 1 and any(not name.startswith((*DETECTOR_NAMES, *OTHER_NAMES)) for name in names)


def _onnx_names(folder: Path) -> list[str]:
    return [path.name.lower() for path in folder.glob("*") if path.suffix == ".onnx"]  # as insightface looks for them


def _is_identity(path: Path) -> bool:
    try:
        return _kind(path, state_of(path)) is Kind.IDENTITY
    except OSError:  # damaged: whoever asks for it by its name is told
        return False
