"""Image tokens of CLIP (ViT-H/14 of laion2B-s32B-b79K in the paper), through transformers."""

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
from facesnap_ext.weights.recognise import Kind, Shapes, recognise_tensors
from facesnap_ext.weights.tensors import read_index, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

# of the pictures that CLIP was trained on, RGB in 0...1 (https://github.com/openai/CLIP, clip/clip.py)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Attention heads cannot be seen in tensors: what open_clip's ViT-H, ViT-g and ViT-bigG have a head; all others have 64.
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
# Nor can the activation: OpenAI's ViT-B and ViT-L have quick_gelu, open_clip's ViT-H and larger ones gelu.
_OPENAI_WIDTHS = (768, 1024)
# what a config.json means that leaves it out (transformers), and activations that such encoders have
_STATED = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")

_FROM_OPEN_CLIP = (
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1.", "embeddings.patch_embedding."),
    ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.in_proj_", ".self_attn.in_proj."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


class ImageEncoder(nn.Module):
    """A CLIP image encoder up to its penultimate layer.

    image_size: side in pixels of what it sees. tokens: patches and one class token. width: of a token.
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
        """Tokens [N, tokens, width] (ViT-H: [N, 257, 1280]) of N square crops [S, S, 3] uint8 RGB, the class token
        first, as the penultimate layer leaves them, without a final norm; on the encoder's device, in its type."""
        weight = next(self.model.parameters())
        return self.model(pixel_values=preprocess(crops, self.image_size).to(weight)).last_hidden_state


def preprocess(crops: Sequence[np.ndarray], size: int) -> Tensor:
    """CLIP's input [N, 3, size, size] of square crops [S, S, 3] uint8 RGB: bicubic, minus mean, over deviation."""
    if any(crop.shape[0] != crop.shape[1] for crop in crops):
        raise ValueError("CLIP's crops are square")
    resized = [Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC) for crop in crops]
    values = torch.from_numpy(np.stack([np.asarray(crop, np.float32) for crop in resized])) / 255
    return ((values - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def load_image_encoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """Load a CLIP image encoder, recognised by its tensors.

    Sizes come from the tensors. Number of heads and activation come from a `config.json` in the same folder if it
    describes these tensors; else the heads are as open_clip's of that width, and the activation is quick_gelu for the
    widths of OpenAI's encoders (768 and 1024) and gelu for all others.

    Args:
        path: a transformers folder, or a file (.safetensors, or of `torch.save`) with the tensors of transformers
            (`vision_model.*`, CLIPModel's whole file too) or of open_clip (`visual.*`), with or without a prefix.

    Raises:
        FaceSnapError: the file is missing, damaged, or no CLIP image encoder.
    """
    path = Path(path).expanduser()
    file = weight_file(path)
    shapes = read_index(file).shapes
    names = _names(shapes)
    if not names:
        raise _not_clip(file, shapes)
    config = _config(file, names, shapes)

    from transformers import CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(config)
    expected = {key for key, _ in model.named_parameters()}
    prefix = next(key for key in expected if key.endswith("embeddings.class_embedding"))
    prefix = prefix.removesuffix("embeddings.class_embedding")  # "vision_model." before transformers 5
    tensors = _split_qkv(read_tensors(file, names.get, dtype))
    tensors = {prefix + name: tensor for name, tensor in tensors.items() if prefix + name in expected}
    if missing := sorted(expected - tensors.keys()):
        raise FaceSnapError(f"{file.name} is not a whole CLIP image encoder, {missing[0]} is missing: get it again.")
    model.load_state_dict(tensors, strict=False, assign=True)
    encoder = ImageEncoder(model)
    embeddings = model.get_submodule(f"{prefix}embeddings")
    embeddings.position_ids = torch.arange(encoder.tokens)[None]  # older files have it, it is not a weight
    return encoder.to(device).eval().requires_grad_(False)


def weight_file(path: Path) -> Path:
    """The file with the tensors: itself, or what lies in a transformers folder."""
    if not path.is_dir():
        return path
    files = [path / "model.safetensors", path / "pytorch_model.bin"]
    if not (found := [file for file in files if file.is_file()]):
        raise FaceSnapError(f"There is no model.safetensors in {path}: put the CLIP image encoder there.")
    return found[0]


def _not_clip(file: Path, shapes: Shapes) -> FaceSnapError:
    kind = recognise_tensors(shapes)
    what = "an image encoder of another design" if kind is Kind.CLIP_VISION else kind.value
    return FaceSnapError(
        f"{file.name} is {what}, not a CLIP image encoder: get CLIP-ViT-H-14-laion2B-s32B-b79K as a transformers folder"
        " or as one file with the tensors of transformers or open_clip."
    )


def _names(shapes: Shapes) -> dict[str, str]:
    """What the file's tensors are called in transformers, from `embeddings.` on; empty if it has no such encoder."""
    for key in shapes:
        prefix = key.removesuffix("class_embedding")
        if key == prefix:
            continue
        if prefix.endswith("embeddings.") and f"{prefix}patch_embedding.weight" in shapes:
            prefix = prefix.removesuffix("embeddings.")
            return {key: key[len(prefix) :] for key in shapes if key.startswith(prefix)}
        if f"{prefix}conv1.weight" in shapes and f"{prefix}positional_embedding" in shapes:
            return {key: _from_open_clip(key[len(prefix) :]) for key in shapes if key.startswith(prefix)}
    return {}


def _from_open_clip(name: str) -> str:
    for old, new in _FROM_OPEN_CLIP:
        name = name.replace(old, new)
    return name


def _split_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip keeps query, key and value in one tensor, in this order."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".in_proj." in name:
            split |= {name.replace("in_proj", f"{letter}_proj"): part for letter, part in zip("qkv", tensor.chunk(3))}
        else:
            split[name] = tensor
    return split


def _config(file: Path, names: dict[str, str], file_shapes: Shapes) -> CLIPVisionConfig:
    """transformers' configuration of the encoder without its last layer, which nobody needs."""
    from transformers import CLIPVisionConfig

    shapes = {name: file_shapes[key] for key, name in names.items()}
    layers = len({match[1] for name in shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))})
    patches = shapes.get("embeddings.patch_embedding.weight", ())
    mlp = shapes.get("encoder.layers.0.mlp.fc1.weight", ())
    grid = math.isqrt(shapes.get("embeddings.position_embedding.weight", (1,))[0] - 1)
    if layers < 2 or len(patches) != 4 or not mlp or not grid:
        raise _not_clip(file, file_shapes)
    width = patches[0]

    heads, activation = _described(file.parent / "config.json", width, layers)
    if not heads:
        head_width = _HEAD_WIDTHS.get(width, 64)
        if width % head_width:
            raise FaceSnapError(
                f"The number of attention heads of {file.name} cannot be told from its tensors: put the config.json"
                " that belongs to it into its folder."
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


def _vision(content: dict[str, Any]) -> dict[str, Any]:
    """The image encoder's half of a whole CLIP's configuration, in older files under another name."""
    return content.get("vision_config") or content.get("vision_config_dict") or {}


def _described(config_file: Path, width: int, layers: int) -> tuple[int, str]:
    """The attention heads and the activation that a `config.json` states of this encoder; no heads where it is not
    there or speaks of another. Nothing else is taken from it: transformers can be told there to fetch code."""
    if not config_file.is_file():
        return 0, ""
    try:
        content = json.loads(config_file.read_text(encoding="utf-8"))
        kind = content.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            return 0, ""
        stated = {**_STATED, **(_vision(content) if kind == "clip" else content)}
        if (stated["hidden_size"], stated["num_hidden_layers"]) != (width, layers):
            return 0, ""
        heads, activation = stated["num_attention_heads"], stated["hidden_act"]
        if not isinstance(heads, int) or heads < 1 or width % heads or activation not in _ACTIVATIONS:
            raise ValueError(f"{heads} heads in {width} channels, activation {activation}")
        return heads, activation
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise FaceSnapError(f"{config_file} cannot be read ({reason_of(error)}): download it again.") from error
