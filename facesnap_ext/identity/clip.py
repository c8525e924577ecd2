"""CLIP image tokens, computed with transformers. The paper uses ViT-H/14 of laion2B-s32B-b79K."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.weights.clip_file import encoder_names, split_qkv, weight_file
from facesnap_ext.weights.recognise import Kind, Shapes, recognise_tensors
from facesnap_ext.weights.tensors import read_index, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

# Normalisation of CLIP's input, RGB in 0…1 (https://github.com/openai/CLIP, clip/clip.py)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Channels per head of open_clip's ViT-H, ViT-g and ViT-bigG, by width; all other encoders have 64. They are listed here
# because the number of attention heads cannot be derived from the tensors.
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
# The activation cannot be derived either. OpenAI's ViT-B and ViT-L have these widths and use quick_gelu; open_clip's
# ViT-H, ViT-g and ViT-bigG use gelu.
_OPENAI_WIDTHS = (768, 1024)
# transformers' defaults for values missing from a config.json, and the activations that are accepted
_CONFIG_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")


class ImageEncoder(nn.Module):
    """A CLIP image encoder up to its penultimate layer.

    Attributes:
        image_size: side of the input in pixels.
        tokens: number of output tokens: one per patch, and the class token.
        width: width of a token.
    """

    def __init__(self, model: CLIPVisionModel):
        super().__init__()
        self.model = model
        config: Any = model.config
        self.image_size: int = config.image_size
        self.tokens: int = (config.image_size // config.patch_size) ** 2 + 1
        self.width: int = config.hidden_size

    @torch.no_grad()
    def forward(self, crops: Sequence[np.ndarray]) -> Tensor:
        """Encode square crops.

        Args:
            crops: N crops [S, S, 3] uint8 RGB; sizes may differ.

        Returns:
            Output of the penultimate layer without a final norm, [N, tokens, width] (ViT-H: [N, 257, 1280]), class
            token first, with the encoder's device and dtype.
        """
        weight = next(self.model.parameters())
        return self.model(pixel_values=preprocess(crops, self.image_size).to(weight)).last_hidden_state


def preprocess(crops: Sequence[np.ndarray], size: int) -> Tensor:
    """Resize (bicubic) and normalise square crops for CLIP.

    Args:
        crops: N crops [S, S, 3] uint8 RGB; sizes may differ.
        size: side of CLIP's input in pixels.

    Returns:
        [N, 3, size, size] float32.

    Raises:
        ValueError: a crop is not square.
    """
    if any(crop.shape[0] != crop.shape[1] for crop in crops):
        raise ValueError("crops for CLIP must be square")
    resized = [Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC) for crop in crops]
    values = torch.from_numpy(np.stack([np.asarray(crop, np.float32) for crop in resized])) / 255
    return ((values - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def load_image_encoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """Load a CLIP image encoder, recognised by its tensors.

    Sizes are derived from the tensors. The number of heads and the activation are read from a `config.json` in the same
    folder if it describes these tensors. Otherwise the number of heads comes from open_clip's encoder of this width,
    and the activation is quick_gelu for the widths of OpenAI's encoders (768 and 1024) and gelu for all others.

    Args:
        path: a transformers folder, or a file (.safetensors or written by `torch.save`) with the tensors of
            transformers (`vision_model.*`, or a complete CLIPModel) or of open_clip (`visual.*`), with or without a
            prefix.
        device: device to load it to.
        dtype: type of the weights and of the output.

    Raises:
        FaceSnapError: the file is missing, damaged, or not a CLIP image encoder.
    """
    path = Path(path).expanduser()
    file = weight_file(path)
    shapes = read_index(file).shapes
    names = encoder_names(shapes)
    if not names:
        raise _not_clip(file, shapes)
    config = _config(file, names, shapes)

    from transformers import CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(config)
    expected = {key for key, _ in model.named_parameters()}
    prefix = next(key for key in expected if key.endswith("embeddings.class_embedding"))
    prefix = prefix.removesuffix("embeddings.class_embedding")  # "vision_model." in versions before transformers 5
    tensors = split_qkv(read_tensors(file, names.get, dtype))
    tensors = {prefix + name: tensor for name, tensor in tensors.items() if prefix + name in expected}
    if missing := sorted(expected - tensors.keys()):
        raise FaceSnapError(
            f"{file.name} is not a complete CLIP image encoder: {missing[0]} is missing; download the file again."
        )
    try:
        model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        reason = reason_of(str(error).partition("\n")[2] or error, 200)
        raise FaceSnapError(
            f"{file.name} is not a valid CLIP image encoder ({reason}): download the file again."
        ) from error
    encoder = ImageEncoder(model)
    embeddings = model.get_submodule(f"{prefix}embeddings")
    embeddings.position_ids = torch.arange(encoder.tokens)[None]  # a buffer, not a weight; only older files contain it
    return encoder.to(device).eval().requires_grad_(False)


def _not_clip(file: Path, shapes: Shapes) -> FaceSnapError:
    kind = recognise_tensors(shapes)
    what = "an image encoder with a different architecture" if kind is Kind.CLIP_VISION else kind.value
    return FaceSnapError(
        f"{file.name} is {what}, not a CLIP image encoder: download CLIP-ViT-H-14-laion2B-s32B-b79K as a transformers"
        " folder or as a single file in transformers or open_clip format."
    )


def _config(file: Path, names: dict[str, str], file_shapes: Shapes) -> CLIPVisionConfig:
    """Return transformers' configuration of the encoder without its last layer, which is not needed."""
    from transformers import CLIPVisionConfig

    shapes = {name: file_shapes[key] for key, name in names.items()}
    layers = len({match[1] for name in shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))})
    patches = shapes.get("embeddings.patch_embedding.weight", ())
    mlp = shapes.get("encoder.layers.0.mlp.fc1.weight", ())
    grid = math.isqrt(shapes.get("embeddings.position_embedding.weight", (1,))[0] - 1)
    if layers < 2 or len(patches) != 4 or not mlp or not grid:
        raise _not_clip(file, file_shapes)
    width = patches[0]

    heads, activation = _read_config(file.parent / "config.json", width, layers)
    if not heads:
        head_width = _HEAD_WIDTHS.get(width, 64)
        if width % head_width:
            raise FaceSnapError(
                f"The number of attention heads of {file.name} cannot be derived from its tensors: put its config.json"
                " into the same folder."
            )
        heads, activation = width // head_width, "quick_gelu" if width in _OPENAI_WIDTHS else "gelu"
    return CLIPVisionConfig(
        num_attention_heads=heads,
        hidden_act=activation,
        hidden_size=width,
        intermediate_size=mlp[0],
        patch_size=patches[-1],
        image_size=grid * patches[-1],
        num_hidden_layers=layers - 1,
    )


def _vision_config(content: dict[str, Any]) -> dict[str, Any]:
    """Return the image encoder's part of a complete CLIP configuration; older files use a different key."""
    return content.get("vision_config") or content.get("vision_config_dict") or {}


def _read_config(config_file: Path, width: int, layers: int) -> tuple[int, str]:
    """Read the number of attention heads and the activation from a `config.json`.

    Nothing else is read from it, because a config.json can make transformers download and run code.

    Returns:
        (0, "") if the file does not exist or describes a different encoder.

    Raises:
        FaceSnapError: the file is damaged.
    """
    if not config_file.is_file():
        return 0, ""
    try:
        content = json.loads(config_file.read_text(encoding="utf-8"))
        kind = content.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            return 0, ""
        values = {**_CONFIG_DEFAULTS, **(_vision_config(content) if kind == "clip" else content)}
        if (values["hidden_size"], values["num_hidden_layers"]) != (width, layers):
            return 0, ""
        heads, activation = values["num_attention_heads"], values["hidden_act"]
        if not isinstance(heads, int) or heads < 1 or width % heads or activation not in _ACTIVATIONS:
            raise ValueError(f"{heads} heads for {width} channels, activation {activation}")
        return heads, activation
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise FaceSnapError(f"{config_file} cannot be read ({reason_of(error)}): download it again.") from error
