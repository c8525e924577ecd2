"""PhotoMaker's published files, versions 1 and 2.

Source: github.com/TencentARC/PhotoMaker: `photomaker/model.py`, `model_v2.py` and `pipeline.py`, and the style strength
of `gradio_demo/app_v2.py`. A file has two halves: `id_encoder`, a CLIP-ViT-L with projections and a fusion, and
`lora_weights`. The published pipeline marks the class word by a word after it. Here, the prompt's first class word is
used, as in `facesnap_lab.rivals.photomaker`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.clip import preprocess
from facesnap_ext.identity.faces import Face
from facesnap_ext.networks.resampler import ResamplerConfig
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.recognise import Kind, Shapes, recognise_tensors
from facesnap_ext.weights.tensors import read_index, read_tensors, shapes_of
from facesnap_lab.rivals.ip_adapter import FaceProjection, Resampler
from facesnap_lab.rivals.photomaker import FuseModule, PhotoMaker
from facesnap_lab.rivals.published.method import (
    BUFFALO_L,
    Prepare,
    PublishedMethod,
    Sampling,
    below,
    require_peft,
)

ENCODER, LORA = "id_encoder.", "lora_weights."  # prefixes of the two halves of a file
PERCEIVER = "qformer_perceiver."  # only in version 2
HEAD_DIM = 128  # channels of an attention head of the perceiver
CLIP_HEAD_DIM = 64  # of CLIP-ViT-L
TEXT_ONLY = 0.2  # share of the steps before the identity is merged: the demo's style strength
ADVICE = "use photomaker-v1.bin or photomaker-v2.bin"


class IDEncoder(nn.Module):
    """The half `id_encoder` of a file: photos, and embeddings in version 2, to tokens that replace the class word."""

    def __init__(self, shapes: Shapes):
        """
        Args:
            shapes: of the tensors without their prefix.

        Raises:
            KeyError: a tensor is missing.
        """
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        self.clip = CLIPVisionModelWithProjection(_clip_config(shapes))
        (dim,) = shapes["fuse_module.layer_norm.weight"]
        width = self.clip.config.hidden_size
        self.visual_projection_2 = nn.Linear(width, shapes["visual_projection_2.weight"][0], bias=False)
        self.fuse_module = FuseModule(dim)
        self.face: FaceProjection | None = None
        self.tokens_per_photo = 1
        if f"{PERCEIVER}token_proj.0.weight" in shapes:
            hidden, id_dim = shapes[f"{PERCEIVER}token_proj.0.weight"]
            self.tokens_per_photo = shapes[f"{PERCEIVER}token_proj.2.weight"][0] // dim
            self.face = FaceProjection(id_dim, self.tokens_per_photo, dim, hidden)
            own = below(f"{PERCEIVER}perceiver_resampler.", shapes)
            own["latents"] = (1, 0, own["proj_in.weight"][0])  # the queries are the embedding's tokens
            self.perceiver = Resampler(ResamplerConfig.from_shapes(own, clip_dim=0, head_dim=HEAD_DIM))

    def forward(self, pixels: Tensor, embeddings: Tensor, words: Tensor) -> Tensor:
        """Return the tokens [R×T,dim] that take the place of the class word.

        Args:
            pixels: R preprocessed photos [R,3,S,S]. embeddings: [R,E], not normalised; version 1 does not use them.
            words: encoded class words [R×T,dim], which differ by their positions in the text.
        """
        out = self.clip.vision_model(pixel_values=pixels)
        if self.face is None:
            projections = (self.clip.visual_projection, self.visual_projection_2)
            identities = torch.cat([projection(out.pooler_output) for projection in projections], dim=-1)
        else:
            face = self.face(embeddings)
            identities = (face + self.perceiver(out.last_hidden_state, latents=face)).flatten(0, 1)
        return self.fuse_module(words, identities)


@dataclass(frozen=True)
class PhotoMakerFile(PublishedMethod):
    """A file of version 1 or 2."""

    @classmethod
    def recognise(cls, path: Path, unet: Any) -> PhotoMakerFile:
        """Recognise a file by its tensors, and compare its width with the base's UNet.

        Raises:
            FaceSnapError: it is a different kind of file, or was made for a different base.
        """
        shapes = read_index(path).shapes
        width = shapes.get(f"{ENCODER}fuse_module.layer_norm.weight")
        if width is None or not any(key.startswith(LORA) for key in shapes):
            kind = recognise_tensors(shapes)
            what = "is not PhotoMaker" if kind is Kind.UNKNOWN else f"is {kind.value}, not PhotoMaker"
            raise FaceSnapError(f"{path.name} {what}; {ADVICE}.")
        if width != (unet.config.cross_attention_dim,):
            raise FaceSnapError(
                f"{path.name} does not fit the base model (its tokens have the shape {width}, and the base's text has "
                f"the width {unet.config.cross_attention_dim}); use an SDXL model as the base."
            )
        require_peft(path)
        second = any(key.startswith(ENCODER + PERCEIVER) for key in shapes)
        name, recognition = ("PhotoMaker V2", BUFFALO_L) if second else ("PhotoMaker", "")
        return cls(path, name, recognition, ("face_pack",))

    def check_prompt(self, pipe: Any, prompt: str) -> None:
        _class_word(pipe, prompt)

    @contextmanager
    def installed(self, pipe: Any, files: ModelFiles) -> Iterator[Prepare]:
        tensors = read_tensors(self.path)
        encoder = self._encoder(tensors).to(pipe.device, pipe.unet.dtype)
        lora = below(LORA, tensors)
        del tensors
        try:
            self._load_lora(pipe, lora)
            yield lambda faces, prompt, sampling: _arguments(pipe, encoder, faces, prompt, sampling)
        finally:
            pipe.unload_lora_weights()

    def _encoder(self, tensors: Mapping[str, Tensor]) -> IDEncoder:
        named = below(ENCODER, tensors)
        named.pop("vision_model.embeddings.position_ids", None)  # a buffer, not a weight; only older files contain it
        try:
            with torch.device("meta"):
                encoder = IDEncoder(shapes_of(named))
            encoder.load_state_dict({_own_name(key): tensor for key, tensor in named.items()}, assign=True)
            embeddings = encoder.clip.vision_model.embeddings
            embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
            return encoder.eval().requires_grad_(False)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self.incomplete(error) from error

    def _load_lora(self, pipe: Any, lora: dict[str, Tensor]) -> None:
        pairs = sum(1 for key in lora if ".up." in key or "lora_B" in key or "lora_up" in key)
        try:
            pipe.load_lora_weights(lora, adapter_name="photomaker")
        except Exception as error:  # diffusers and peft raise errors of many types
            raise self.incomplete(error) from error
        used = sum("photomaker" in getattr(module, "lora_B", ()) for module in pipe.unet.modules())
        if used != pairs:
            raise self.incomplete(f"the LoRA changes {pairs} layers, of which the base has {used}")


@torch.no_grad()
def _arguments(pipe: Any, encoder: IDEncoder, faces: Sequence[Face], prompt: str, sampling: Sampling) -> dict[str, Any]:
    weight = next(encoder.parameters())
    pixels = torch.cat([photo_pixels(face.photo.pixels, encoder.clip.config.image_size) for face in faces]).to(weight)
    embeddings = torch.from_numpy(np.stack([face.embedding for face in faces])).to(weight)
    word, count = _class_word(pipe, prompt), len(faces) * encoder.tokens_per_photo
    context, pooled = _encode_stretched(pipe, prompt, word, count)
    words = context[:, word : word + count]
    if words.shape[1] < count:
        raise FaceSnapError(
            f"'{prompt}' leaves no room for {len(faces)} reference photos; use fewer, or a shorter one."
        )
    fused = encoder(pixels, embeddings, words[0].to(weight)).to(context)[None]
    context = torch.cat([context[:, :word], fused, context[:, word + count :]], dim=1)
    text, null_text, pooled_text, null_pooled = pipe.encode_prompt(
        prompt, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=sampling.guided
    )
    merge_step = int(TEXT_ONLY * sampling.steps)

    def merge(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Replace the text by the text with the identity after the step `merge_step`."""
        if step != merge_step:
            return {}
        null = ([null_text], [null_pooled]) if sampling.guided else ([], [])
        return {
            "prompt_embeds": torch.cat([*null[0], context]).to(values["prompt_embeds"]),
            "add_text_embeds": torch.cat([*null[1], pooled]).to(values["add_text_embeds"]),
        }

    return {
        "prompt_embeds": text,
        "negative_prompt_embeds": null_text,
        "pooled_prompt_embeds": pooled_text,
        "negative_pooled_prompt_embeds": null_pooled,
        "callback_on_step_end": merge,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "add_text_embeds"],
    }


def photo_pixels(photo: np.ndarray, side: int) -> Tensor:
    """Preprocess a photo [H,W,3] uint8 like transformers' `CLIPImageProcessor`: its shorter side becomes `side` pixels
    long, and the central square is normalised, [1,3,side,side]."""
    height, width = photo.shape[:2]
    scale = side / min(height, width)
    size = (max(side, int(width * scale)), max(side, int(height * scale)))
    left, top = ((length - side) // 2 for length in size)
    resized = Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC)
    return preprocess([np.asarray(resized)[top : top + side, left : left + side]], side)


def _class_word(pipe: Any, prompt: str) -> int:
    """Return the position of the class word's last token in the encoded prompt."""
    length = pipe.tokenizer.model_max_length
    return int(PhotoMaker.class_words(pipe.tokenizer, [prompt], length)[0].long().argmax())


def _encode_stretched(pipe: Any, prompt: str, word: int, count: int) -> tuple[Tensor, Tensor]:
    """Encode a prompt in which the token at `word` is repeated `count` times: context [1,T,C] and pooled text [1,P]."""
    states = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        length = tokenizer.model_max_length
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        ids = (ids[:word] + [ids[word]] * count + ids[word + 1 :])[:length]
        out = encoder(torch.tensor([ids], device=pipe.device), output_hidden_states=True)
        states.append(out.hidden_states[-2])
    return torch.cat(states, dim=-1), out[0]


def _own_name(key: str) -> str:
    """Return the name in `IDEncoder` of a tensor of the file."""
    for published, own in (
        ("vision_model.", "clip.vision_model."),
        ("visual_projection.", "clip.visual_projection."),
        (f"{PERCEIVER}token_proj.", "face.proj."),
        (f"{PERCEIVER}token_norm.", "face.norm."),
        (f"{PERCEIVER}perceiver_resampler.", "perceiver."),
    ):
        if key.startswith(published):
            return own + key.removeprefix(published)
    return key


def _clip_config(shapes: Shapes) -> Any:
    from transformers import CLIPVisionConfig

    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    grid = math.isqrt(shapes["vision_model.embeddings.position_embedding.weight"][0] - 1)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=sum(key.endswith(".mlp.fc1.weight") and "encoder.layers" in key for key in shapes),
        num_attention_heads=max(1, width // CLIP_HEAD_DIM),
        image_size=grid * patch,
        patch_size=patch,
        projection_dim=shapes["visual_projection.weight"][0],
    )
