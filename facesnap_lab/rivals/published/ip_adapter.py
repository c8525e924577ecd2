"""IP-Adapter's published SDXL files, loaded by diffusers.

Sources: github.com/tencent-ailab/IP-Adapter (`ip_adapter.py`, `ip_adapter_faceid.py`), the model cards of
h94/IP-Adapter and h94/IP-Adapter-FaceID, and diffusers' `IPAdapterMixin.load_ip_adapter`. diffusers receives tensors
that were read without executing pickles, and the features of the references.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.clip import ImageEncoder, load_image_encoder
from facesnap_ext.identity.faces import Face
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.recognise import Kind, Shapes, recognise
from facesnap_ext.weights.tensors import read_index, read_tensors
from facesnap_lab.rivals.attention import CROSS, PROJECTIONS
from facesnap_lab.rivals.published.method import (
    BUFFALO_L,
    Prepare,
    PublishedMethod,
    Sampling,
    below,
    require_peft,
)

PROJECTION, ATTENTION = "image_proj.", "ip_adapter."  # prefixes of the two halves of a file
FACEID, PORTRAIT, FACEID_PLUS, PLUS = "FaceID", "FaceID Portrait", "FaceID Plus v2", "Plus"
ALIGNED_SIDE = 224  # pixels of the aligned face that FaceID Plus sees
ADVICE = "use one of ip-adapter-plus-face, ip-adapter-faceid, -faceid-plusv2 or -faceid-portrait for SDXL"


@dataclass(frozen=True)
class IPAdapterFile(PublishedMethod):
    """A file of IP-Adapter Plus or FaceID.

    layout: one of the four layouts. rank: of the file's LoRA; 0 if it has none.
    """

    layout: str
    rank: int

    @classmethod
    def recognise(cls, path: Path, unet: Any) -> IPAdapterFile:
        """Recognise a file by its tensors, and compare their shapes with the base's UNet.

        Raises:
            FaceSnapError: it is a different kind of file, or was made for a different base.
        """
        shapes = read_index(path).shapes
        layout = _layout(path, shapes)
        rank = shapes.get(f"{ATTENTION}0.to_q_lora.down.weight", (0,))[0]
        found = {key: shape for key, shape in shapes.items() if key.startswith(ATTENTION)}
        expected = attention_shapes(unet, rank)
        if wrong := [key for key in expected | found if found.get(key) != expected.get(key)]:
            raise FaceSnapError(
                f"{path.name} does not fit the base model ({wrong[0]} is {found.get(wrong[0], 'missing')}, expected "
                f"{expected.get(wrong[0], 'none')}); use a complete IP-Adapter for SDXL."
            )
        if rank:
            require_peft(path)
        recognition = "" if layout == PLUS else BUFFALO_L
        parts = ("face_pack", "clip") if layout in (PLUS, FACEID_PLUS) else ("face_pack",)
        return cls(path, f"IP-Adapter {layout}", recognition, parts, layout, rank)

    @contextmanager
    def installed(self, pipe: Any, files: ModelFiles) -> Iterator[Prepare]:
        clip = None
        if "clip" in self.parts:
            clip = load_image_encoder(files.require("clip"), pipe.device, pipe.unet.dtype)
        try:
            self._load(pipe)
            if clip is not None:
                self._check_clip(pipe, clip, files.require("clip"))
            yield lambda faces, prompt, sampling: self._arguments(pipe, clip, faces, prompt, sampling)
        finally:
            if self.rank:
                pipe.unload_lora_weights()
            pipe.unload_ip_adapter()

    def _load(self, pipe: Any) -> None:
        tensors = read_tensors(self.path)
        halves = {prefix.rstrip("."): below(prefix, tensors) for prefix in (PROJECTION, ATTENTION)}
        try:
            pipe.load_ip_adapter(
                halves, subfolder="", weight_name="", image_encoder_folder=None, low_cpu_mem_usage=False
            )
        except Exception as error:  # diffusers raises errors of many types
            raise self.incomplete(error) from error

    def _check_clip(self, pipe: Any, clip: ImageEncoder, path: Path) -> None:
        width = pipe.unet.encoder_hid_proj.image_projection_layers[0].proj_in.in_features
        if clip.width != width:
            raise FaceSnapError(
                f"{self.path.name} takes CLIP tokens of width {width}, but {path.name} computes {clip.width}; put "
                "CLIP-ViT-H into the model folder."
            )

    def _arguments(
        self, pipe: Any, clip: ImageEncoder | None, faces: Sequence[Face], prompt: str, sampling: Sampling
    ) -> dict[str, Any]:
        weight = next(pipe.unet.parameters())

        def with_null(features: Tensor, null: Tensor) -> Tensor:
            """Stack the features [1,R,…] below those of the unconditional row, if there is one."""
            rows = [null.expand_as(features), features] if sampling.guided else [features]
            return torch.cat(rows).to(weight)

        tokens = None
        if clip is not None:
            crops = [aligned_face(face) if self.layout == FACEID_PLUS else face.crop for face in faces]
            tokens = with_null(clip(crops)[None], black_tokens(clip)[None])
        if self.layout == PLUS:
            return {"prompt": prompt, "ip_adapter_image_embeds": [tokens]}
        embeddings = torch.from_numpy(np.stack([face.embedding for face in faces]))[None].float()
        if "unnorm" not in self.path.name.lower():  # the tensors of the two Portrait files have equal names and shapes
            embeddings = F.normalize(embeddings, dim=-1)
        if tokens is not None:
            projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
            projection.clip_embeds, projection.shortcut = tokens, True
        return {"prompt": prompt, "ip_adapter_image_embeds": [with_null(embeddings, torch.zeros_like(embeddings))]}


def attention_shapes(unet: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a file's tensors for the UNet's attention layers.

    Args:
        rank: of the LoRA; 0 for a file without one.
    """
    modules = dict(unet.named_modules())
    shapes: dict[str, tuple[int, ...]] = {}
    for i, processor in enumerate(unet.attn_processors):
        name = processor.removesuffix(".processor")
        if name.endswith(CROSS):
            keys = modules[f"{name}.to_k"]
            for part in ("to_k_ip", "to_v_ip"):
                shapes[f"{ATTENTION}{i}.{part}.weight"] = (keys.out_features, keys.in_features)
        for part in PROJECTIONS if rank else ():
            layer = modules[f"{name}.{part}"]
            prefix = f"{ATTENTION}{i}.{part.removesuffix('.0')}_lora"
            shapes |= {f"{prefix}.down.weight": (rank, layer.in_features)}
            shapes |= {f"{prefix}.up.weight": (layer.out_features, rank)}
    return shapes


def aligned_face(face: Face) -> np.ndarray:
    """Return the face aligned to insightface's template, [224,224,3] uint8 RGB."""
    from insightface.utils.face_align import norm_crop

    return norm_crop(face.photo.pixels, face.keypoints, image_size=ALIGNED_SIDE)


@torch.no_grad()
def black_tokens(clip: ImageEncoder) -> Tensor:
    """Return the tokens [1,T,C] of an input of zeros, which IP-Adapter Plus uses for the unconditional rows."""
    weight = next(clip.parameters())
    pixels = torch.zeros(1, 3, clip.image_size, clip.image_size).to(weight)
    return clip.model(pixel_values=pixels).last_hidden_state


def _layout(path: Path, shapes: Shapes) -> str:
    projection = below(PROJECTION, shapes)
    kind = recognise(path)
    if kind is not Kind.IP_ADAPTER:
        raise FaceSnapError(f"{path.name} is {kind.value}, not an IP-Adapter; {ADVICE}.")
    if "perceiver_resampler.proj_in.weight" in projection:
        return FACEID_PLUS
    if {"norm.weight", "proj.2.weight"} <= projection.keys():
        tokens = projection["proj.2.weight"][0] // projection["norm.weight"][0]
        return FACEID if tokens == 4 else PORTRAIT
    if "latents" in projection:
        return PLUS
    raise FaceSnapError(f"{path.name} is an IP-Adapter for CLIP's final embedding, which is not supported; {ADVICE}.")
