"""Turn the published files of DECA, FLAME, ControlNets and InstantID into those that FaceSnap reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.deca import convert_deca
from facesnap_ext.landmarks.flame import convert_flame
from facesnap_ext.weights.initialise import controlnet_config, from_controlnet
from facesnap_ext.weights.instantid import pack
from facesnap_ext.weights.places import ModelFiles
from facesnap_ext.weights.recognise import Kind, recognise

CONTROLNET_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def convert(source: Path, out: Path | None = None) -> Path:
    """Convert a file, recognised by its tensors, or a diffusers ControlNet folder.

    Args:
        out: by default beside the source, its name ending in `.safetensors`.

    Returns:
        The path written.

    Raises:
        FaceSnapError: it is something else, which is named.
    """
    folder = source if source.is_dir() else source.parent
    file = _weights_in(source) if source.is_dir() else source
    kind = recognise(file)
    if kind is Kind.SDXL_CONTROLNET:
        out = out or folder.with_name(f"{folder.name}-facesnap.safetensors")
        from_controlnet(file, out, **controlnet_config(folder))
    elif kind is Kind.DECA_ORIGINAL:
        out = out or source.with_name("deca.safetensors")
        convert_deca(file, out)
    elif kind is Kind.PICKLE:
        out = out or source.with_suffix(".safetensors")
        convert_flame(file, out)
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
        FaceSnapError: a file is missing, of another kind, not whole, or does not fit the other.
    """
    pack(_weights_in(controlnet) if controlnet.is_dir() else controlnet, adapter, out)
    return out


def convert_originals(files: ModelFiles, progress: Callable[[str], None]) -> None:
    """Convert DECA's and FLAME's own files where there are no converted ones, once and for all; what comes of a file in
    another program's folder goes into FaceSnap's."""
    for part in ("deca", "flame"):
        path = getattr(files, part)
        if path is not None and path.suffix != ".safetensors":
            progress(f"converting {path.name}, once")
            own = path.is_relative_to(files.folder)
            setattr(files, part, convert(path, None if own else files.folder / f"{part}.safetensors"))


def _weights_in(folder: Path) -> Path:
    for name in CONTROLNET_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FaceSnapError(f"The folder {folder} has no {CONTROLNET_FILES[0]}; give a diffusers ControlNet folder.")
