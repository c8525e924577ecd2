"""Recognise weight files by their tensors, never by their names."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from pathlib import Path

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import State
from facesnap_ext.weights.mediapipe import is_mediapipe
from facesnap_ext.weights.tensors import read_index
from facesnap_ext.weights.unpickle import is_torch_file

Shapes = Mapping[str, tuple[int, ...]]


class Kind(Enum):
    """A kind of weight file. The value completes the sentence "this is …"."""

    FACESNAP = "a FaceSnap file"
    SDXL_CONTROLNET = "an SDXL ControlNet"
    SDXL_CONTROLNET_LDM = "an SDXL ControlNet in the original (LDM) layout"
    SD15_CONTROLNET = "an SD1.5 ControlNet"
    SD2_CONTROLNET = "an SD2 ControlNet"
    CONTROL_LORA = "a Control-LoRA"
    SDXL = "an SDXL checkpoint"
    SDXL_REFINER = "an SDXL refiner checkpoint"
    SD15 = "an SD1.5 checkpoint"
    SD2 = "an SD2 checkpoint"
    SDXL_UNET = "an SDXL UNet in diffusers' layout"
    OTHER_UNET = "a UNet that is not SDXL's"
    LORA = "a LoRA"
    INSTANTID_ADAPTER = "InstantID's adapter (ip-adapter.bin)"
    IP_ADAPTER = "an IP-Adapter"
    CLIP_VISION = "a CLIP image encoder"
    CLIP_TEXT = "a CLIP text encoder"
    VAE = "a VAE"
    FLAME = "a converted FLAME model"
    DECA = "a converted DECA encoder"
    DECA_ORIGINAL = "DECA's original file (deca_model.tar)"
    IDENTITY = "a saved identity"
    MEDIAPIPE = "MediaPipe's landmark detector"
    IMAGE_CLASSIFIER = "an image classifier"
    PICKLE = "a Python pickle"
    UNKNOWN = "a kind of file that FaceSnap does not know"


def recognise(path: Path) -> Kind:
    """Return the kind of a weight file from the names and shapes of its tensors, without reading their values.

    Raises:
        FaceSnapError: the file is missing, or not a readable weight file.
    """
    if not path.is_file():
        raise FaceSnapError(f"There is no file {path}; check its name and folder.")
    if _is_pickle(path):
        return Kind.PICKLE
    if is_mediapipe(path):
        return Kind.MEDIAPIPE
    index = read_index(path)
    by_format = {
        "facesnap": Kind.FACESNAP,
        "facesnap-flame": Kind.FLAME,
        "facesnap-deca": Kind.DECA,
        "facesnap-identity": Kind.IDENTITY,
    }
    return by_format.get(index.metadata.get("format", "")) or recognise_tensors(index.shapes)


@lru_cache(maxsize=4096)
def recognise_cached(path: Path, state: State) -> Kind | FaceSnapError:
    """Return the kind of a file, or the error that prevented its recognition; both are cached.

    Args:
        state: `files.state_of(path)`; a changed file is read again.
    """
    try:
        return recognise(path)
    except FaceSnapError as error:
        return FaceSnapError(str(error))  # drops the traceback
    except Exception as error:  # one unreadable file among hundreds must not break the page
        return FaceSnapError(f"{path.name} cannot be read ({reason_of(error, 200)}); download it again.")


def require(path: Path, expected: Kind, advice: str) -> None:
    """Raise an error if a file is not of the expected kind.

    Args:
        advice: the end of the message, which says what to do instead.
    """
    if (kind := recognise(path)) is not expected:
        raise FaceSnapError(f"{path.name} is {kind.value}, not {expected.value}; {advice}")


def _is_pickle(path: Path) -> bool:
    """Return whether the file begins like a pickle and was not written by torch, as is the case for FLAME's file.

    A safetensors file, which begins with the length of its JSON header, may begin with the same two bytes.
    """
    with path.open("rb") as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
    begins_like_one = len(start) > 1 and start[0] == 0x80 and start[1] in range(2, 6)
    return begins_like_one and not is_safetensors and not is_torch_file(path)


def recognise_tensors(shapes: Shapes) -> Kind:
    """Return the kind of file that tensors of these names and shapes belong to."""
    if not shapes:
        return Kind.UNKNOWN
    if any(key.startswith("ffrnet.") for key in shapes):
        return Kind.FACESNAP
    if "lora_controlnet" in shapes:
        return Kind.CONTROL_LORA
    if "image_proj.latents" in shapes and any(key.startswith("ip_adapter.") for key in shapes):
        return Kind.INSTANTID_ADAPTER if shapes.get("image_proj.proj_in.weight", ())[1:] == (512,) else Kind.IP_ADAPTER
    if any(key.startswith(("image_proj.", "ip_adapter.")) for key in shapes):
        return Kind.IP_ADAPTER
    if "controlnet_cond_embedding.conv_in.weight" in shapes:
        return _controlnet(shapes, Kind.SDXL_CONTROLNET)
    if any(key.endswith("input_hint_block.0.weight") for key in shapes):
        return _controlnet(shapes, Kind.SDXL_CONTROLNET_LDM)
    if "model.diffusion_model.input_blocks.0.0.weight" in shapes:
        return _checkpoint(shapes)
    if "down_blocks.0.resnets.0.conv1.weight" in shapes and "conv_norm_out.weight" in shapes:
        return Kind.SDXL_UNET if "add_embedding.linear_1.weight" in shapes else Kind.OTHER_UNET
    if any(key.startswith("E_flame.") for key in shapes):
        return Kind.DECA_ORIGINAL
    return _encoder(shapes) or _part(shapes)


def _encoder(shapes: Shapes) -> Kind | None:
    """Return the kind of encoder or classifier that tensors belong to; None if it is a different kind of file."""
    if any(key.endswith(("embeddings.patch_embedding.weight", "visual.conv1.weight")) for key in shapes):
        return Kind.CLIP_VISION
    if "classifier.weight" in shapes and "vit.embeddings.cls_token" in shapes:
        return Kind.IMAGE_CLASSIFIER
    if any(key.endswith(("text_model.embeddings.token_embedding.weight", "token_embedding.weight")) for key in shapes):
        return Kind.CLIP_TEXT
    return None


def _part(shapes: Shapes) -> Kind:
    """Return the kind of file that tensors of a part of a model, or of changes to one, belong to."""
    # checked this late, because a stray LoRA key must not hide the kinds above
    if any(".lora_down." in key or ".lora_A." in key for key in shapes):
        return Kind.LORA
    if any(key.startswith(("decoder.", "first_stage_model.decoder.")) for key in shapes):
        return Kind.VAE
    return Kind.UNKNOWN


def _context_width(shapes: Shapes) -> int:
    """Return the width of the text embeddings for cross-attention: 768 (SD1), 1024 (SD2), 2048 (SDXL); 0 if unknown."""
    widths = (shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and shape)
    return next(widths, 0)


def _controlnet(shapes: Shapes, sdxl: Kind) -> Kind:
    if any("add_embedding." in key or "label_emb." in key for key in shapes):
        return sdxl
    return Kind.SD2_CONTROLNET if _context_width(shapes) == 1024 else Kind.SD15_CONTROLNET


def _checkpoint(shapes: Shapes) -> Kind:
    if "model.diffusion_model.label_emb.0.0.weight" in shapes:
        # the refiner's UNet takes one text encoder's tokens, 1280 wide; a checkpoint may come without text encoders
        return Kind.SDXL_REFINER if _context_width(shapes) == 1280 else Kind.SDXL
    return Kind.SD2 if _context_width(shapes) == 1024 else Kind.SD15
