"""Recognise a weight file by its tensors, never by its name."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.tensors import read_index
from facesnap_ext.weights.unpickle import is_torch_file

Shapes = Mapping[str, tuple[int, ...]]


class Kind(Enum):
    """Kinds of weight file; the value completes the sentence "this is …"."""

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
    PICKLE = "a Python pickle"
    UNKNOWN = "a kind of file that FaceSnap does not know"


def recognise(path: Path) -> Kind:
    """Say what a weight file is from the names and shapes in it, before any of its numbers is read.

    Raises:
        FaceSnapError: there is no such file, or it cannot be read as a weight file.
    """
    if not path.is_file():
        raise FaceSnapError(f"There is no file {path}; check the name and the folder.")
    if _is_pickle(path):
        return Kind.PICKLE
    index = read_index(path)
    by_format = {
        "facesnap": Kind.FACESNAP,
        "facesnap-flame": Kind.FLAME,
        "facesnap-deca": Kind.DECA,
        "facesnap-identity": Kind.IDENTITY,
    }
    return by_format.get(index.metadata.get("format", "")) or recognise_tensors(index.shapes)


def require(path: Path, wanted: Kind, advice: str) -> None:
    """Refuse a file of another kind by the name of what it is.

    Args:
        advice: what to do instead, the end of the sentence.
    """
    if (kind := recognise(path)) is not wanted:
        raise FaceSnapError(f"{path.name} is {kind.value}, not {wanted.value}; {advice}")


def _is_pickle(path: Path) -> bool:
    """Whether the file starts as a pickle that is not torch's, such as FLAME's."""
    with path.open("rb") as file:
        start = file.read(2)
    return len(start) == 2 and start[0] == 0x80 and start[1] in range(2, 6) and not is_torch_file(path)


def recognise_tensors(shapes: Shapes) -> Kind:
    """Say what a set of tensors is."""
    if not shapes:
        return Kind.UNKNOWN
    if any(key.startswith("ffrnet.") for key in shapes):
        return Kind.FACESNAP
    if any(".lora_down." in key or ".lora_A." in key for key in shapes):
        return Kind.LORA
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
    if any(key.endswith(("embeddings.patch_embedding.weight", "visual.conv1.weight")) for key in shapes):
        return Kind.CLIP_VISION
    if any(key.endswith(("text_model.embeddings.token_embedding.weight", "token_embedding.weight")) for key in shapes):
        return Kind.CLIP_TEXT
    if any(key.startswith(("decoder.", "first_stage_model.decoder.")) for key in shapes):
        return Kind.VAE
    return Kind.UNKNOWN


def _is_sd2s(shapes: Shapes) -> bool:
    """Whether cross-attention reads SD2's text, of 1024 channels."""
    texts = (shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight"))
    return next(texts, ())[-1:] == (1024,)


def _controlnet(shapes: Shapes, sdxl: Kind) -> Kind:
    if any("add_embedding." in key or "label_emb." in key for key in shapes):
        return sdxl
    return Kind.SD2_CONTROLNET if _is_sd2s(shapes) else Kind.SD15_CONTROLNET


def _checkpoint(shapes: Shapes) -> Kind:
    if "model.diffusion_model.label_emb.0.0.weight" in shapes:
        # the refiner has one text encoder, SDXL two
        two_encoders = any(key.startswith("conditioner.embedders.1.") for key in shapes)
        return Kind.SDXL if two_encoders else Kind.SDXL_REFINER
    return Kind.SD2 if _is_sd2s(shapes) else Kind.SD15
