"""Search the model folder, and other programs' folders, for model files (`find_models`)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from facesnap_ext.errors import FaceSnapError, printable
from facesnap_ext.files import State, state_of
from facesnap_ext.weights import face_pack, identity_folder, mediapipe
from facesnap_ext.weights.clip_file import WEIGHT_FILES
from facesnap_ext.weights.flame_release import unfit_for_deca
from facesnap_ext.weights.image_classifier import WEIGHTS, is_classifier_folder
from facesnap_ext.weights.instantid_pair import pair_instantid
from facesnap_ext.weights.model_files import FoundModel, ModelFiles
from facesnap_ext.weights.networks import choose_fitting
from facesnap_ext.weights.recognise import Kind, recognise_cached
from facesnap_ext.weights.source import networks_of, recognition_of
from facesnap_ext.weights.tensors import read_index
from facesnap_ext.weights.unpickle import is_old_torch_file

WEIGHT_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".tar", ".pkl", ".task"}
FLAME_NAMES = ("generic_model", "flame2020", "flame2023", "flame2023_open")  # names of .pkl files, in lower case
MAX_DEPTH = 4  # levels of subfolders: …/insightface/models/antelopev2/antelopev2
MAX_FOLDERS = 256  # maximum number of folders per search
NOT_SEARCHED = "the others were not searched, so move what FaceSnap does not need elsewhere."
MAX_FILES = 512  # maximum number of weight files per search
MAX_OLD_TORCH_BYTES = 64 * 2**20  # files of torch before 1.6 must be read completely to be recognised
# other programs' folders with large files that FaceSnap cannot use
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


def find_models(folder: Path, elsewhere: Sequence[Path] = ()) -> ModelFiles:
    """Search the model folder and then other folders. Weight files are recognised by their tensors, not their names.

    Args:
        folder: FaceSnap's own model folder, with weight files and the folders of face model packs or CLIP models.
        elsewhere: other programs' folders. The contents of `folder` take precedence, and only unmistakable files in
            `elsewhere` are used: pickles with FLAME's file names, CLIP-ViT-H, and packs with insightface's file names.
    """
    files = ModelFiles(folder)
    halves: list[FoundModel] = []  # InstantID's adapters, and SDXL ControlNets, one of which may be its IdentityNet
    for path in _walk(folder, files.passed_over):
        _register(files, path, folder, halves)
    seen = {resolved(model.path) for model in (*files.found, *halves)}
    for other in elsewhere:
        if not other.is_dir() or resolved(other) == resolved(folder):
            continue
        files.elsewhere += (other,)
        for path in _walk(other, files.passed_over, own_folder=folder):
            if resolved(path) not in seen:
                seen.add(resolved(path))
                _register(files, path, other, halves)
    pair_instantid(files, halves)
    for role in ("face_pack", "clip", "deca", "flame", "mediapipe", "image_classifier"):
        if usable := files.usable(role):
            setattr(files, role, usable[0].path)
    _match_pack(files)
    return files


def _walk(root: Path, warnings: list[str], own_folder: Path | None = None) -> Iterator[Path]:
    """Yield weight files and folders with .onnx files below a folder, breadth first and sorted by name.

    A folder that is reached again through a link is not searched again.

    Args:
        warnings: receives a sentence if the search ends early or skips a name.
        own_folder: FaceSnap's own folder if `root` is a different folder.
    """
    queue = deque([(root, 0)])
    visited: set[Path] = set()
    folders = files = 0
    while queue:
        folder, depth = queue.popleft()
        if (place := resolved(folder)) in visited:
            continue
        visited.add(place)
        folders += 1
        entries = _entries(folder, warnings if own_folder is None else [])
        if face_pack.onnx_files(folder):
            yield folder
        for entry in entries:
            if entry.suffix.lower() in WEIGHT_SUFFIXES and _is_true(entry.is_file):
                files += 1
                if files > MAX_FILES:
                    warnings.append(f"{root} has more than {MAX_FILES} weight files; {NOT_SEARCHED}")
                    return
                yield entry
            elif depth < MAX_DEPTH and _is_true(entry.is_dir) and not _is_skipped(entry, own_folder):
                queue.append((entry, depth + 1))
        if queue and folders == MAX_FOLDERS:
            warnings.append(f"{root} has more than {MAX_FOLDERS} folders; {NOT_SEARCHED}")
            return


def _entries(folder: Path, warnings: list[str]) -> list[Path]:
    """Return the entries of a folder that may be weight files or folders, and whose names are UTF-8, sorted.

    There are none if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entry_iterator:
            names = sorted(
                entry.name
                for entry in entry_iterator
                if entry.name[0] != "."
                and (entry.name.lower().endswith(tuple(WEIGHT_SUFFIXES)) or not _is_plain(entry))
            )
    except OSError:
        return []
    entries = [folder / name for name in names]
    if invalid := [entry for entry in entries if printable(entry.name) != entry.name]:
        warnings.append(
            printable(f"{folder} has names that are not UTF-8 and cannot be shown on a page; rename {invalid[0].name}.")
        )
    return [entry for entry in entries if entry not in invalid]


def resolved(path: Path) -> Path:
    """Return a path without links; itself if they form a loop, for which Python before 3.13 raises `RuntimeError`."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()


def _is_plain(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file and not a link, which is known from the folder's listing."""
    return _is_true(partial(entry.is_file, follow_symlinks=False))


def _is_true(query: Callable[[], bool]) -> bool:
    """Return the result of a query such as `path.is_file`; False in a folder that can be listed but not entered."""
    try:
        return query()
    except OSError:
        return False


def _is_skipped(entry: Path, own_folder: Path | None) -> bool:
    if own_folder is None:
        return entry.name == identity_folder.FOLDER_NAME
    return entry.name.lower() in SKIPPED or (entry.name == own_folder.name and resolved(entry) == resolved(own_folder))


def _register(files: ModelFiles, path: Path, folder: Path, halves: list[FoundModel]) -> None:
    """Recognise a file, or a folder with .onnx files, and add it to the found models or to `halves`.

    An unusable file is reported if it is in FaceSnap's own folder, and ignored in other programs' folders.
    """
    own = folder == files.folder
    if path.is_dir():
        _register_onnx(files, path, folder)
        return
    try:
        if not own and path.stat().st_size > MAX_OLD_TORCH_BYTES and is_old_torch_file(path):
            return
        kind = recognise_cached(path, state_of(path))
    except OSError as error:
        kind = FaceSnapError(f"{path.name} cannot be read ({error.strerror}); check its permissions.")
    if own and (classifier := _classifier(path, kind, folder)):
        _add(files, classifier)
    elif isinstance(kind, FaceSnapError):
        if own:
            files.passed_over.append(str(kind))
    elif kind is Kind.FACESNAP:
        files.facesnap.setdefault(path.name, path)
        files.found.append(FoundModel("facesnap", path, kind.value, folder))
    elif kind in (Kind.INSTANTID_ADAPTER, Kind.SDXL_CONTROLNET):
        halves.append(FoundModel("instantid", path, kind.value, folder))
    elif model := _encoder_or_head(path, kind, folder, own):
        _add(files, model)
    elif own and kind is Kind.IDENTITY:
        target = identity_folder.identity_folder(files.folder)
        files.passed_over.append(f"{path.name} is a saved identity; move it to {target}.")
    elif own:
        files.passed_over.append(f"{path.name} is {kind.value}.")


def _register_onnx(files: ModelFiles, path: Path, folder: Path) -> None:
    """Add the face model pack in a folder with .onnx files, and in FaceSnap's own folder also MediaPipe's detector.

    The searched folder itself is not a pack: its packs are in subfolders.
    """
    own = folder == files.folder
    detectors = [one for one in face_pack.onnx_files(path) if own and mediapipe.is_converted(one)]
    for detector in detectors:
        _add(files, FoundModel("mediapipe", detector, "MediaPipe's landmark detector, converted", folder))
    is_pack = path != folder and len(face_pack.onnx_files(path)) > len(detectors)
    if is_pack and (own or face_pack.has_insightface_names(path)):
        rank = 0 if face_pack.pack_files(path).is_complete else 1
        _add(files, FoundModel("face_pack", path, "a face model pack", folder, rank))


def _encoder_or_head(path: Path, kind: Kind, folder: Path, own: bool) -> FoundModel | None:
    """Return a file of CLIP, DECA, FLAME or MediaPipe as a found model; None if it is of a different kind or cannot be
    identified with certainty."""
    if kind is Kind.CLIP_VISION and ((is_vit_h := _is_vit_h(path, state_of(path))) or own):
        in_folder = path.name in WEIGHT_FILES and path.parent != folder and (path.parent / "config.json").is_file()
        return FoundModel("clip", path.parent if in_folder else path, kind.value, folder, 0 if is_vit_h else 1)
    if kind in (Kind.DECA, Kind.DECA_ORIGINAL):
        return FoundModel("deca", path, kind.value, folder, 0 if kind is Kind.DECA else 1)
    if kind is Kind.FLAME:
        return FoundModel("flame", path, kind.value, folder, unfit=_unfit_flame(path))
    if kind is Kind.PICKLE and path.stem.lower() in FLAME_NAMES:
        return FoundModel("flame", path, kind.value, folder, 1, _unfit_flame(path))
    if kind is Kind.PICKLE and own:  # FLAME's archives also hold male and female heads, and masks
        return FoundModel("flame", path, kind.value, folder, 2, _unfit_flame(path))
    if kind is Kind.MEDIAPIPE and own:
        advice = (
            f"{path.name} must be converted: run python -m facesnap_ext convert {path.name} in the extension's folder."
        )
        return FoundModel("mediapipe", path, f"{kind.value}, which must be converted", folder, 1, advice)
    return None


def _classifier(path: Path, kind: Kind | FaceSnapError, folder: Path) -> FoundModel | None:
    """Return the weights of an image classifier as a found model; None if they are of a different kind.

    Damaged files and unknown architectures are included if there is the config.json of a classifier: the user expects
    that classifier to check images, so jobs must not continue without it.
    """
    complete = path.name == WEIGHTS and path.parent != folder and is_classifier_folder(path.parent)
    if kind is not Kind.IMAGE_CLASSIFIER and not (complete and (kind is Kind.UNKNOWN or isinstance(kind, Exception))):
        return None
    rank = 0 if complete and kind is Kind.IMAGE_CLASSIFIER else 1
    return FoundModel("image_classifier", path.parent if complete else path, Kind.IMAGE_CLASSIFIER.value, folder, rank)


def _unfit_flame(path: Path) -> str:
    """Return why a FLAME model does not fit DECA; empty if no reason is known."""
    try:
        return unfit_for_deca(path)
    except FaceSnapError:  # a damaged file is reported when it is loaded or converted
        return ""


def _add(files: ModelFiles, model: FoundModel) -> None:
    """Add a found model; a folder with several copies of its network is added once."""
    if not any((known.role, known.path) == (model.role, model.path) for known in files.found):
        files.found.append(model)


def _match_pack(files: ModelFiles) -> None:
    """If all FaceSnap files are made for one recognition model, use the face model pack that contains it."""
    models = {(recognition_of(source), networks_of(source).get("face_pack")) for source in files.facesnap.values()}
    if len(models) == 1:
        name, digest = models.pop()
        files.match_pack(name)
        choose_fitting(files, {} if digest is None else {"face_pack": digest})


@lru_cache(maxsize=256)
def _is_vit_h(path: Path, state: State) -> bool:
    """Return whether a CLIP has the patch embedding of ViT-H/14: 1280 channels, 14 × 14 pixels."""
    ends = ("patch_embedding.weight", "visual.conv1.weight")
    return any(key.endswith(ends) and shape == (1280, 3, 14, 14) for key, shape in read_index(path).shapes.items())
