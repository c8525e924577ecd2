"""Write the miniature SDXL as a checkpoint file that AUTOMATIC1111 loads without changes.

    python -m facesnap_lab.miniature.export WEBUI/models/Stable-diffusion/miniature.safetensors \
        --models WEBUI/models/facesnap

The tensors get the names of SDXL's own file (Stability-AI/generative-models). Three things are written next to it:

- `miniature.yaml`, which A1111 uses as the config of a checkpoint with the same name. It contains all sizes, so they do
  not have to match SDXL's.
- `miniature/`, with the config and the vocabulary of the first text encoder, which `FrozenCLIPEmbedder` loads from any
  folder.
- in that folder, the sizes of the second text encoder. open_clip knows architectures by name only. This one is
  registered where the config names a sampler, which A1111 does not use and creates before the text encoders.

The paths in the yaml are absolute: export again after moving the files.

A1111 tokenises a prompt for the second encoder with CLIP's vocabulary of 49,408 tokens. Every word of the miniature is
one of these tokens, and its embedding is copied to that row. All other rows contain the embedding of the unknown word.
CLIP and the miniature may split unknown words into different numbers of tokens; prompts of known words always match.

A1111 assumes that a latent cell covers 8 × 8 pixels and has no setting for it. The miniature's cells cover 4 × 4, so a
setting of 128 × 128 produces an image of 64 × 64, and the UNet receives the size 128 × 128. Hires fix works: the latent
upscalers also halve the size, and the others produce the requested size. img2img works only in the resize mode "latent
upscale".

Verified with A1111 v1.10.1: context, pooled text, UNet and VAE agree with diffusers to 1e-5, and an image sampled in
eight Euler steps is bit-identical.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.tensors import read_tensors
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.sdxl_layout import Config, open_clip_tensors, text_key, unet_tensors, vae_tensors
from facesnap_lab.miniature.words import BEGIN, END, UNKNOWN

# Token ids of words in CLIP's vocabulary, derived from the merges in `bpe_simple_vocab_16e6.txt.gz` (open_clip, MIT).
# fmt: off
CLIP_IDS = {
    ",": 267, ".": 269, "a": 320, "the": 518, "on": 525, "in": 530, "at": 536, "and": 537, "of": 539, "with": 593,
    "from": 633, "red": 736, "photo": 1125, "right": 1155, "light": 1395, "black": 1449, "long": 1538, "white": 1579,
    "face": 1710, "blue": 1746, "left": 1823, "green": 1901, "front": 2184, "hair": 2225, "shirt": 2523, "person": 2533,
    "brown": 2866, "short": 3005, "dark": 3144, "wearing": 3309, "pink": 3360, "sad": 3719, "soft": 3773, "hat": 3801,
    "orange": 4287, "above": 4348, "lit": 4350, "yellow": 4481, "bright": 4852, "grey": 5046, "portrait": 5352,
    "purple": 5496, "background": 5994, "glasses": 6116, "surprised": 8949, "beard": 9052, "angry": 9054,
    "smiling": 9200, "blonde": 10711, "bald": 14875, "neutral": 17011,
}
# fmt: on
CLIP_SIZE, CLIP_BEGIN, CLIP_END, CLIP_PAD = 49408, 49406, 49407, 0

# Settings that SDXL's layout fixes.
FIXED = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "use_linear_projection": True,
        "class_embed_type": None,
    },
    "vae": {
        "latent_channels": 4,
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "shift_factor": None,
    },
    "text_encoder": {"max_position_embeddings": 77},
    "text_encoder_2": {"max_position_embeddings": 77, "layer_norm_eps": 1e-5},
}


def export(miniature: Path, checkpoint: Path) -> None:
    """Write a diffusers folder of SDXL's architecture as one checkpoint, with its yaml and its folder next to it.

    Args:
        miniature: folder with `unet`, `vae`, `text_encoder`, `text_encoder_2` and their common `tokenizer`.
        checkpoint: `NAME.safetensors` in the WebUI's `models/Stable-diffusion`.

    Raises:
        FaceSnapError: a part is missing, or has a size or a setting that SDXL's layout cannot express.
    """
    from safetensors.torch import save_file

    configs = {part: _config(miniature, part) for part in FIXED}
    tokenizer = miniature / "tokenizer"
    words, special = read_words(tokenizer)
    folder = checkpoint.with_suffix("").absolute()
    arch = folder / f"{folder.name}-open-clip.json"
    settings = webui_config(configs, folder, arch)
    tensors = unet_tensors(_weights(miniature, "unet"), configs["unet"])
    tensors |= vae_tensors(_weights(miniature, "vae"), configs["vae"])
    for key, tensor in _weights(miniature, "text_encoder").items():
        tensors[f"conditioner.embedders.0.transformer.{text_key(key)}"] = tensor
    tensors |= open_clip_tensors(
        _weights(miniature, "text_encoder_2"), clip_rows(words, special), "conditioner.embedders.1.model."
    )

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, checkpoint)
    _write_json(checkpoint.with_suffix(".yaml"), settings)  # JSON is valid YAML
    _write_json(folder / "config.json", configs["text_encoder"])
    _write_json(arch, open_clip_config(configs["text_encoder_2"]))
    # without parts of words, so that both encoders treat other words as unknown
    _write_json(folder / "vocab.json", {f"{word}</w>": row for word, row in words.items()} | special)
    for name in ("merges.txt", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def webui_config(configs: Mapping[str, Config], folder: Path, arch: Path) -> dict[str, Any]:
    """Return the checkpoint's config: generative-models' `sd_xl_base.yaml` with the miniature's sizes.

    Args:
        configs: diffusers' config of each part.
        folder: contains the first text encoder's config and vocabulary.
        arch: file with the second text encoder's sizes.
    """
    unet, vae = configs["unet"], configs["vae"]
    text, text_2 = configs["text_encoder"], configs["text_encoder_2"]
    widths = unet["block_out_channels"]
    attended = [level for level, kind in enumerate(unet["down_block_types"]) if "CrossAttn" in kind]
    heads = _each(unet.get("num_attention_heads") or unet["attention_head_dim"], widths)
    head_widths = {widths[level] // heads[level] for level in attended}
    sizes = unet["addition_time_embed_dim"]
    pooled = text_2["projection_dim"]
    context = text["hidden_size"] + text_2["hidden_size"]
    _require(len(head_widths) == 1, "the attention heads of its UNet do not all have the same width")
    _require(unet["cross_attention_dim"] == context, "its UNet's context is not as wide as both text encoders together")
    _require(
        unet["projection_class_embeddings_input_dim"] == pooled + 6 * sizes,
        "its UNet's added input is not as wide as the pooled text and six sizes",
    )
    _require(
        text_2["intermediate_size"] == 4 * text_2["hidden_size"],
        "its second text encoder's MLP is not four times as wide",
    )
    _require(32 % vae["norm_num_groups"] == 0, "32 is not a multiple of its VAE's normalisation groups")
    _require(text["num_hidden_layers"] <= 13, "its first text encoder has more than 13 layers")

    def sgm(target: str, **params: Any) -> dict[str, Any]:
        return {"target": f"sgm.{target}", "params": params}

    def embedder(key: str, target: str, **params: Any) -> dict[str, Any]:
        return {"is_trainable": False, "input_key": key} | sgm(f"modules.encoders.modules.{target}", **params)

    diffusion = "modules.diffusionmodules"
    denoiser = sgm(
        f"{diffusion}.denoiser.DiscreteDenoiser",
        num_idx=1000,
        weighting_config=sgm(f"{diffusion}.denoiser_weighting.EpsWeighting"),
        scaling_config=sgm(f"{diffusion}.denoiser_scaling.EpsScaling"),
        discretization_config=sgm(f"{diffusion}.discretizer.LegacyDDPMDiscretization"),
    )
    network = sgm(
        f"{diffusion}.openaimodel.UNetModel",
        adm_in_channels=pooled + 6 * sizes,
        num_classes="sequential",
        use_checkpoint=False,
        in_channels=4,
        out_channels=4,
        model_channels=widths[0],
        attention_resolutions=[2**level for level in attended],
        num_res_blocks=unet["layers_per_block"],
        channel_mult=_multiples(widths, "UNet"),
        num_head_channels=head_widths.pop(),
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        transformer_depth=_each(unet["transformer_layers_per_block"], widths),
        context_dim=context,
        spatial_transformer_attn_type="softmax-xformers",
        legacy=False,
    )
    conditioner = sgm(
        "modules.GeneralConditioner",
        emb_models=[
            embedder(
                "txt",
                "FrozenCLIPEmbedder",
                version=folder.as_posix(),
                layer="hidden",
                layer_idx=text["num_hidden_layers"] - 1,
            ),
            embedder(
                "txt",
                "FrozenOpenCLIPEmbedder2",
                arch=arch.stem,
                version="none",
                freeze=True,
                layer="penultimate",
                always_return_pooled=True,
                legacy=False,
            ),
            *(
                embedder(key, "ConcatTimestepEmbedderND", outdim=sizes)
                for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
            ),
        ],
    )
    first_stage = sgm(
        "models.autoencoder.AutoencoderKLInferenceWrapper",
        embed_dim=4,
        monitor="val/rec_loss",
        ddconfig={
            "attn_type": "vanilla-xformers",
            "double_z": True,
            "z_channels": 4,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": vae["block_out_channels"][0] * 32 // vae["norm_num_groups"],
            "ch_mult": _multiples(vae["block_out_channels"], "VAE"),
            "num_res_blocks": vae["layers_per_block"],
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        lossconfig={"target": "torch.nn.Identity"},
    )
    engine = sgm(
        "models.diffusion.DiffusionEngine",
        scale_factor=vae["scaling_factor"],
        disable_first_stage_autocast=True,
        sampler_config={"target": "open_clip.add_model_config", "params": {"path": arch.as_posix()}},
        denoiser_config=denoiser,
        network_config=network,
        conditioner_config=conditioner,
        first_stage_config=first_stage,
    )
    return {"model": engine}


def open_clip_config(text_2: Config) -> dict[str, Any]:
    """Return open_clip's description of this text tower; the image tower in it is created and dropped."""
    width = text_2["hidden_size"]
    return {
        "embed_dim": text_2["projection_dim"],
        "quick_gelu": text_2["hidden_act"] == "quick_gelu",
        "vision_cfg": {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": CLIP_SIZE,
            "width": width,
            "heads": text_2["num_attention_heads"],
            "layers": text_2["num_hidden_layers"],
        },
    }


def clip_rows(words: Mapping[str, int], special: Mapping[str, int]) -> list[int]:
    """Map each of CLIP's 49,408 ids to the miniature's id of the same word, or to the id of the unknown word."""
    rows = [special[UNKNOWN]] * CLIP_SIZE
    for word, row in words.items():
        rows[CLIP_IDS[word]] = row
    # A1111 pads with 0, the miniature with its end token
    rows[CLIP_BEGIN], rows[CLIP_END], rows[CLIP_PAD] = special[BEGIN], special[END], special[END]
    return rows


def read_words(tokenizer: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Read the ids of complete words and of special tokens from a folder written by `words.write_tokenizer`."""
    pieces = _read_json(tokenizer / "vocab.json")
    words = {piece.removesuffix("</w>"): row for piece, row in pieces.items() if piece.endswith("</w>")}
    known = {word: row for word, row in words.items() if word in CLIP_IDS}
    return known, {token: pieces[token] for token in (UNKNOWN, BEGIN, END)}


def few_step_miniature(folder: Path) -> Path:
    """Write the shipped miniature in diffusers' layout, with the distilled LoRA merged into its UNet.

    Sample it with Euler, SGM uniform, 8 steps and CFG 2.
    """
    shutil.copytree(shipped.SDXL, folder)
    shipped.few_step_sampler().pipe.unet.save_pretrained(folder / "unet")
    return folder


def _multiples(widths: list[int], part: str) -> list[int]:
    _require(
        all(width % widths[0] == 0 for width in widths), f"the widths of its {part} are not multiples of the first one"
    )
    return [width // widths[0] for width in widths]


def _each(value: int | list[int], levels: list[int]) -> list[int]:
    return [value] * len(levels) if isinstance(value, int) else list(value)


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise FaceSnapError(f"The miniature cannot be written as an SDXL checkpoint: {what}.")


def _config(miniature: Path, part: str) -> dict[str, Any]:
    config = _read_json(miniature / part / "config.json")
    for key, expected in FIXED[part].items():
        value = config.get(key, expected)
        _require(value == expected, f"{part} has {key} {value}, but that layout supports only {expected}")
    return config


def _weights(miniature: Path, part: str) -> dict[str, Tensor]:
    name = "model" if part.startswith("text") else "diffusion_pytorch_model"
    return read_tensors(miniature / part / f"{name}.safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FaceSnapError(f"The file {path} does not exist; specify a folder in diffusers' layout.")
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the miniature SDXL as a checkpoint for AUTOMATIC1111.")
    parser.add_argument("checkpoint", type=Path, help="NAME.safetensors in models/Stable-diffusion")
    parser.add_argument("--miniature", type=Path, default=shipped.SDXL, help="folder in diffusers' layout")
    parser.add_argument("--few-steps", action="store_true", help="merge the distilled LoRA, as turbo checkpoints do")
    parser.add_argument(
        "--models", type=Path, help="models/facesnap folder to fill with the miniature's other networks"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.few_steps:
            arguments.miniature = few_step_miniature(Path(folder) / "miniature")
        export(arguments.miniature, arguments.checkpoint)
    if arguments.models:
        shipped.write_models(arguments.models)
