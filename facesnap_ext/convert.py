"""Convert the published files of DECA, FLAME, MediaPipe, ControlNets and InstantID to files that FaceSnap reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import user_write
from facesnap_ext.landmarks.deca import convert_deca
from facesnap_ext.landmarks.flame import convert_flame
from facesnap_ext.weights.controlnet import controlnet_config, from_controlnet
from facesnap_ext.weights.instantid import pack
from facesnap_ext.weights.mediapipe import CONVERTED_FILE, TASK_FILE, convert_mediapipe
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.tensors import read_index

CONTROLNET_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def convert(source: Path, out: Path | None = None) -> Path:
    """Convert a file, recognised by its tensors, or the folder of a ControlNet in diffusers' layout.

    Args:
        out: by default a `.safetensors` file next to the source, or an `.onnx` file for MediaPipe's detector.

    Returns:
        The path of the new file.

    Raises:
        FaceSnapError: the file is of a different kind or cannot be read, or `out` cannot be written.
    """
    folder = source if source.is_dir() else source.parent
    file = _weights_in(source) if source.is_dir() else source
    kind = recognise(file)
    if kind is Kind.SDXL_CONTROLNET:
        out = out or folder.with_name(f"{folder.name}-facesnap.safetensors")
        from_controlnet(file, out, controlnet_config(folder, read_index(file).shapes))
    elif kind is Kind.DECA_ORIGINAL:
        out = out or source.with_name("deca.safetensors")
        with user_write(out) as part:
            convert_deca(file, part)
    elif kind is Kind.MEDIAPIPE:
        out = out or source.with_name(CONVERTED_FILE)
        convert_mediapipe(file, out)
    elif kind is Kind.PICKLE:
        out = out or source.with_suffix(".safetensors")
        with user_write(out) as part:
            convert_flame(file, part)
    else:
        raise FaceSnapError(
            f"{source.name} is {kind.value}; FaceSnap can convert DECA's deca_model.tar, FLAME's generic_model.pkl, "
            f"MediaPipe's {TASK_FILE} and SDXL ControlNets in diffusers' layout."
        )
    return out


def convert_instantid(controlnet: Path, adapter: Path, out: Path) -> Path:
    """Pack InstantID's two files into one FaceSnap file, which produces bit-identical results.

    Args:
        controlnet: the ControlNet's file or its folder.
        adapter: `ip-adapter.bin`.
        out: may be an existing FaceSnap file, which is overwritten.

    Returns:
        The path of the new file.

    Raises:
        FaceSnapError: a file is missing, of the wrong kind or incomplete, the two do not match, or `out` is an existing
            file of a different kind.
    """
    controlnet = _weights_in(controlnet) if controlnet.is_dir() else controlnet
    if out.is_file() and (out.resolve() in (controlnet.resolve(), adapter.resolve()) or not _is_facesnap(out)):
        raise FaceSnapError(f"{out} already exists and is not a FaceSnap file; choose a different name.")
    pack(controlnet, adapter, out)
    return out


def convert_originals(files: ModelFiles, progress: Callable[[str], None]) -> None:
    """Convert the original files of DECA and FLAME, unless they have been converted before.

    A converted file is written next to its original, or to FaceSnap's model folder if the original is in another
    program's folder. If there are several originals, the first that can be converted is used. If there is none, the
    part counts as missing and `files.unconverted` states why, because not every job needs it.

    Args:
        progress: called with a message before each conversion.
    """
    for part in ("deca", "flame"):
        setattr(files, part, None)
        for found in files.usable(part):
            path = found.path
            try:
                if path.suffix != ".safetensors":
                    progress(f"converting {path.name} (only once)")
                    own = found.folder == files.folder
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
    raise FaceSnapError(
        f"The folder {folder} has no {CONTROLNET_FILES[0]}; enter the folder of a ControlNet in diffusers' layout."
    )
