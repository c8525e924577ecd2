"""InstantID's two published files (github.com/InstantID/InstantID): load them, pack them into one FaceSnap file, or
create a file that training starts from.

InstantID's ControlNet, IdentityNet, is an FFRNet trained with text and on landmark images of five points. The Resampler
in `ip-adapter.bin` computes its identity tokens. The other half of that file is the `Adapter`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import FLOAT8_TYPES, FFRNet, FFRNetConfig
from facesnap_ext.networks.number_types import unify_types
from facesnap_ext.networks.resampler import CLIP_PREFIXES, ResamplerConfig, ResamplerMixer
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.catalogue import WHERE_TO_GET
from facesnap_ext.weights.controlnet import controlnet_config
from facesnap_ext.weights.facesnap_file import POINTS5, FaceSnapInfo, FaceSnapWeights
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import read_index, read_tensors, shapes_of, without_prefix

NAME = "InstantID"
IDENTITYNET = "ControlNetModel/diffusion_pytorch_model.safetensors"
ADAPTER = "ip-adapter.bin"
LICENSE = "same as InstantID's weights"
RECOGNITION = "glintr100.onnx"  # antelopev2's model; InstantID's Resampler was trained on its embeddings
RECOGNITION_SHA256 = "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"  # many projects pin this hash
RESAMPLER_PREFIX, ADAPTER_PREFIX = "image_proj.", "ip_adapter."
ADVICE = f"use InstantID's file ({WHERE_TO_GET.format('it')})."


def load(controlnet: Path, adapter: Path) -> FaceSnapWeights:
    """Load the published pair to the CPU, like `facesnap_file.load`, each half in its own dtype.

    Sizes that cannot be read from the tensors come from the `config.json` next to the ControlNet, or are SDXL's sizes
    if that file does not exist.

    Raises:
        FaceSnapError: a file is of the wrong kind or incomplete, or the two do not match.
    """
    require(controlnet, Kind.SDXL_CONTROLNET, ADVICE)
    require(adapter, Kind.INSTANTID_ADAPTER, ADVICE)
    ffrnet, mixer = _identitynet(controlnet), _resampler(adapter)
    _check_fit(controlnet, ffrnet, adapter, mixer)
    shapes = {without_prefix(ADAPTER_PREFIX)(key): shape for key, shape in read_index(adapter).shapes.items()}
    with _reports_incomplete(adapter):
        config = AdapterConfig.from_shapes({key: shape for key, shape in shapes.items() if key is not None})
    info = FaceSnapInfo(
        mixer.config,
        ffrnet.config,
        text_free=False,
        license=LICENSE,
        trained_on=NAME,
        hint=POINTS5,
        null_identity=True,
        adapter=config,
        recognition=RECOGNITION,
    )
    return FaceSnapWeights(info, mixer, ffrnet, NAME)


def load_adapter(path: Path) -> Adapter:
    """Load the adapter half of `ip-adapter.bin` to the CPU, in the file's dtype. Its weights are views of the file,
    because they are used only once.

    Raises:
        FaceSnapError: the file is of a different kind or incomplete.
    """
    require(path, Kind.INSTANTID_ADAPTER, ADVICE)
    tensors = read_tensors(path, without_prefix(ADAPTER_PREFIX), mapped=True)
    with _reports_incomplete(path), torch.device("meta"):
        adapter = Adapter(AdapterConfig.from_shapes(shapes_of(tensors)))
        adapter.load_state_dict(tensors, assign=True)
    unify_types(adapter)
    return adapter.eval().requires_grad_(False)


def pack(controlnet: Path, adapter: Path, out: Path) -> None:
    """Write the published pair as one FaceSnap file, which produces bit-identical results.

    Raises:
        FaceSnapError: see `load`.
    """
    weights = load(controlnet, adapter)
    facesnap_file.save(out, weights.info, weights.mixer, weights.ffrnet, load_adapter(adapter))


def from_instantid(
    folder: Path,
    out: Path,
    *,
    head_dim: int = 64,
    size_dim: int = 256,
    clip_dim: int = 1280,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a FaceSnap file that training starts from.

    FFRNet is IdentityNet, and the Mixer is the Resampler. CLIP features are added by zero-initialised projections, so
    tokens and residuals match InstantID's until training changes them. The adapter half is left out.

    Args:
        folder: InstantID in its published layout, with `ControlNetModel/` and `ip-adapter.bin`.
        head_dim: channels of an attention head of IdentityNet; only used without a `config.json`.
        size_dim: channels of one embedded size; only used without a `config.json`.
        clip_dim: width of the CLIP image tokens.
        seed: initialises the added layers.
        dtype: floating-point dtype of the file; by default, each half keeps its own.

    Raises:
        FaceSnapError: a file is missing, of the wrong kind or incomplete, or the two do not match.
    """
    controlnet, adapter = folder / IDENTITYNET, folder / ADAPTER
    for path in (controlnet, adapter):
        if not path.is_file():
            raise FaceSnapError(f"There is no file {path}; enter InstantID's folder, with {IDENTITYNET} and {ADAPTER}.")
    require(controlnet, Kind.SDXL_CONTROLNET, ADVICE)
    require(adapter, Kind.INSTANTID_ADAPTER, ADVICE)
    ffrnet = _identitynet(controlnet, head_dim, size_dim, dtype)
    mixer = _resampler(adapter, clip_dim, seed, dtype)
    _check_fit(controlnet, ffrnet, adapter, mixer)
    info = FaceSnapInfo(
        mixer.config, ffrnet.config, text_free=False, license=LICENSE, trained_on="FFRNet and Mixer from InstantID"
    )
    facesnap_file.save(out, info, mixer, ffrnet)


def _identitynet(path: Path, head_dim: int = 64, size_dim: int = 256, dtype: torch.dtype | None = None) -> FFRNet:
    tensors = read_tensors(path, dtype=dtype)
    with _reports_incomplete(path), torch.device("meta"):
        shapes = shapes_of(tensors)
        if stated := controlnet_config(path.parent, shapes):
            config = FFRNetConfig.from_shapes(shapes, stated.heads, stated.size_dim)
        else:
            config = FFRNetConfig.from_shapes(shapes, size_dim=size_dim)
            config = replace(config, heads=tuple([max(1, width // head_dim) for width in config.widths]))
        ffrnet = FFRNet(config)
        ffrnet.load_state_dict(tensors, assign=True)
    unify_types(ffrnet)
    return ffrnet.eval().requires_grad_(False)


def _resampler(path: Path, clip_dim: int = 0, seed: int = 0, dtype: torch.dtype | None = None) -> ResamplerMixer:
    """Load the Resampler and, unless `clip_dim` is 0, add seeded layers for CLIP tokens of this width."""
    views = read_tensors(path, without_prefix(RESAMPLER_PREFIX), dtype, mapped=True)
    tensors = {key: tensor.clone() for key, tensor in views.items()}  # the file may change later
    with _reports_incomplete(path), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # only layers for CLIP keep their initial weights
        with torch.device("cpu" if clip_dim else "meta"):
            mixer = ResamplerMixer(ResamplerConfig.from_shapes(shapes_of(tensors), clip_dim))
        added = {key: tensor for key, tensor in mixer.state_dict().items() if key.startswith(CLIP_PREFIXES)}
        latents = tensors["latents"].dtype
        added = {key: tensor.to(torch.float16 if latents in FLOAT8_TYPES else latents) for key, tensor in added.items()}
        mixer.load_state_dict(tensors | added, assign=True)
    unify_types(mixer)
    return mixer.eval().requires_grad_(False)


def _check_fit(controlnet: Path, ffrnet: FFRNet, adapter: Path, mixer: ResamplerMixer) -> None:
    if mixer.config.dim != ffrnet.config.context_dim:
        raise FaceSnapError(
            f"{adapter.name} computes tokens of width {mixer.config.dim}, but {controlnet.name} takes "
            f"{ffrnet.config.context_dim}; use files of the same InstantID release."
        )


@contextmanager
def _reports_incomplete(path: Path) -> Iterator[None]:
    """Report a file as incomplete if no network can be built from its tensors."""
    try:
        yield
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = reason_of(error, 200)
        raise FaceSnapError(f"{path.name} is incomplete or damaged ({reason}); download it again.") from error
