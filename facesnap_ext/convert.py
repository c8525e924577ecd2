"""Turn the published files of DECA, FLAME, ControlNets and InstantID into those that FaceSnap reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import user_write
from facesnap_ext.landmarks.deca import convert_deca
from facesnap_ext.landmarks.flame import convert_flame
from facesnap_ext.weights.initialise import controlnet_config, from_controlnet
from facesnap_ext.weights.instantid import pack
from facesnap_ext.weights.places import ModelFiles
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.tensors import read_index

CONTROLNET_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def convert(source: Path, out: Path | None = None) -> Path:
    """Convert a file, recognised by its tensors, or a diffusers ControlNet folder.

    Args:
        out: by default beside the source, its name ending in `.safetensors`.

    Returns:
        The path written.

    Raises:
        FaceSnapError: it is something else, which is named, or cannot be read, or `out` cannot be written.
    """
    folder = source if source.is_dir() else source.parent
    file = _weights_in(source) if source.is_dir() else source
    kind = recognise(file)
    if kind is Kind.SDXL_CONTROLNET:
        out = out or folder.with_name(f"{folder.name}-facesnap.safetensors")
        from_controlnet(file, out, **controlnet_config(folder, read_index(file).shapes))
    elif kind is Kind.DECA_ORIGINAL:
        out = out or source.with_name("deca.safetensors")
        with user_write(out) as part:
            convert_deca(file, part)
    elif kind is Kind.PICKLE:
        out = out or source.with_suffix(".safetensors")
        with user_write(out) as part:
            convert_flame(file, part)
    else:
        raise FaceSnapError(
            f"{source.name} is {kind.value}; what can be converted is DECA's deca_model.tar, FLAME's generic_model.pkl "
            "and an SDXL ControlNet in diffusers' layout."
        )
    return out


def convert_instantid(controlnet: Path, adapter: Path, out: Path) -> Path:
    """Pack InstantID's ControlNet (the file, or its folder) and `ip-adapter.bin` into one FaceSnap file, which gives
    the same bits as the two.

    Returns:
        The path written.

    Raises:
        FaceSnapError: a file is missing, of another kind, not whole, or does not fit the other; or `out` is a file of
            another kind, which is not overwritten.
    """
    controlnet = _weights_in(controlnet) if controlnet.is_dir() else controlnet
    if out.is_file() and (out.resolve() in (controlnet.resolve(), adapter.resolve()) or not _is_facesnap(out)):
        raise FaceSnapError(f"{out} is there already and no FaceSnap file: give another name.")
    pack(controlnet, adapter, out)
    return out


def convert_originals(files: ModelFiles, progress: Callable[[str], None]) -> None:
    """Convert DECA's and FLAME's own files where there are no converted ones, once and for all; what comes of a file in
    another program's folder goes into FaceSnap's. Of several the first serves that can be converted; where none can,
    the part is missing, and `files.unconverted` says why: not every job needs it."""
    for part in ("deca", "flame"):
        setattr(files, part, None)
        for found in files.candidates(part):
            path = found.path
            try:
                if path.suffix != ".safetensors":
                    progress(f"converting {path.name}, once")
                    own = found.place == files.folder
                    path = convert(path, None if own else files.folder / f"{part}.safetensors")
                setattr(files, part, path)
                break
            except FaceSnapError as error:
                files.unconverted.setdefault(part, []).append(str(error))


def _is_facesnap(path: Path) -> bool:
    try:
        return recognise(path) is Kind.FACESNAP
    except FaceSnapError:
        return False


def _weights_in(folder: Path) -> Path:
    for name in CONTROLNET_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FaceSnapError(f"The folder {folder} has no {CONTROLNET_FILES[0]}; give a diffusers ControlNet folder.")
