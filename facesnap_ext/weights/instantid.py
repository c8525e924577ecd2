"""InstantID's published files (github.com/InstantID/InstantID): used as they are, packed into one FaceSnap file, or as
what training starts from.

IdentityNet, the ControlNet, is an FFRNet that was trained with text and on drawings of five points; the Resampler in
`ip-adapter.bin` makes its identity tokens. The other half of that file is the `Adapter`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.landmarks.hints import POINTS5
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.networks.resampler import CLIP_PREFIXES, ResamplerConfig, ResamplerMixer
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.facesnap_file import FaceSnapInfo, FaceSnapWeights
from facesnap_ext.weights.initialise import controlnet_config
from facesnap_ext.weights.places import WeightSource
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import read_index, read_tensors, shapes_of, without_prefix

NAME = "InstantID"
IDENTITYNET = "ControlNetModel/diffusion_pytorch_model.safetensors"
ADAPTER = "ip-adapter.bin"
LICENSE = "that of InstantID's weights"
RECOGNITION = "glintr100.onnx"  # antelopev2's, whose embeddings alone its Resampler knows
RECOGNITION_SHA256 = "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"  # as many projects pin it
RESAMPLER_PREFIX, ADAPTER_PREFIX = "image_proj.", "ip_adapter."
ADVICE = "take InstantID's, models/README.md says where from."


def load(controlnet: Path, adapter: Path) -> FaceSnapWeights:
    """Load the published pair to the CPU, as `facesnap_file.load` does one file, each half in its own type.

    Sizes that the tensors do not tell are those of the `config.json` beside the ControlNet, without one SDXL's.

    Raises:
        FaceSnapError: a file is of another kind, not whole, or does not fit the other.
    """
    require(controlnet, Kind.SDXL_CONTROLNET, ADVICE)
    require(adapter, Kind.INSTANTID_ADAPTER, ADVICE)
    ffrnet, mixer = _identitynet(controlnet), _resampler(adapter)
    _check_fit(controlnet, ffrnet, adapter, mixer)
    shapes = {without_prefix(ADAPTER_PREFIX)(key): shape for key, shape in read_index(adapter).shapes.items()}
    with _whole(adapter):
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
    """The adapter half of `ip-adapter.bin`, on the CPU in the file's type.

    Raises:
        FaceSnapError: the file is of another kind or not whole.
    """
    require(path, Kind.INSTANTID_ADAPTER, ADVICE)
    tensors = read_tensors(path, without_prefix(ADAPTER_PREFIX))
    with _whole(path), torch.device("meta"):
        adapter = Adapter(AdapterConfig.from_shapes(shapes_of(tensors)))
        adapter.load_state_dict(tensors, assign=True)
    return adapter.eval().requires_grad_(False)


def load_any(source: WeightSource) -> FaceSnapWeights:
    """Load a FaceSnap file or the published pair, see `facesnap_file.load` and `load`."""
    return load(*source) if isinstance(source, tuple) else facesnap_file.load(source)


def takes_clip(source: WeightSource) -> bool:
    """Whether the Mixer of a FaceSnap file wants CLIP's tokens beside embeddings; of the published pair it does not."""
    return not isinstance(source, tuple) and facesnap_file.read_info(source).mixer.clip_dim > 0


def recognition_of(source: WeightSource) -> str:
    """`FaceSnapInfo.recognition` of a FaceSnap file, of which only the header is read, or of the published pair."""
    if isinstance(source, tuple):
        return RECOGNITION
    try:
        return read_index(source).metadata.get("recognition", "")
    except FaceSnapError:  # of a damaged file, which its own job tells
        return ""


def load_any_adapter(source: WeightSource) -> Adapter:
    """The adapter of a FaceSnap file that has one, or of the published pair."""
    return load_adapter(source[1]) if isinstance(source, tuple) else facesnap_file.load_adapter(source)


def pack(controlnet: Path, adapter: Path, out: Path) -> None:
    """Write the published pair as one FaceSnap file, which gives the same bits.

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
    """Write a FaceSnap file for training to start from.

    FFRNet is IdentityNet and the Mixer the Resampler, with CLIP features added by projections that are zero, so that
    tokens and residuals are InstantID's until training changes them. The adapter half is left out.

    Args:
        folder: as InstantID is published, with `ControlNetModel/` and `ip-adapter.bin`.
        head_dim: channels of an attention head of IdentityNet, where there is no `config.json` that says it.
        size_dim: channels of one embedded size, likewise.
        clip_dim: width of the CLIP image tokens.
        dtype: floating type of the file; by default each half keeps its own.

    Raises:
        FaceSnapError: a half is missing, of another kind, not whole, or does not fit the other.
    """
    controlnet, adapter = folder / IDENTITYNET, folder / ADAPTER
    for path in (controlnet, adapter):
        if not path.is_file():
            raise FaceSnapError(f"There is no {path}; give InstantID's folder, with {IDENTITYNET} and {ADAPTER}.")
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
    with _whole(path), torch.device("meta"):
        stated = controlnet_config(path.parent, shapes_of(tensors))
        config = FFRNetConfig.from_shapes(shapes_of(tensors), **{"size_dim": size_dim, **stated})
        if "heads" not in stated:
            config = replace(config, heads=tuple(max(1, width // head_dim) for width in config.widths))
        ffrnet = FFRNet(config)
        ffrnet.load_state_dict(tensors, assign=True)
    return ffrnet.eval().requires_grad_(False)


def _resampler(path: Path, clip_dim: int = 0, seed: int = 0, dtype: torch.dtype | None = None) -> ResamplerMixer:
    """The Resampler, with seeded layers for CLIP tokens of this width added to it."""
    tensors = read_tensors(path, without_prefix(RESAMPLER_PREFIX), dtype)
    with _whole(path), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = ResamplerMixer(ResamplerConfig.from_shapes(shapes_of(tensors), clip_dim)).to(tensors["latents"].dtype)
        added = {key: tensor for key, tensor in mixer.state_dict().items() if key.startswith(CLIP_PREFIXES)}
        mixer.load_state_dict(tensors | added)
    return mixer.eval().requires_grad_(False)


def _check_fit(controlnet: Path, ffrnet: FFRNet, adapter: Path, mixer: ResamplerMixer) -> None:
    if mixer.config.dim != ffrnet.config.context_dim:
        raise FaceSnapError(
            f"{adapter.name} makes tokens of {mixer.config.dim} numbers and {controlnet.name} takes "
            f"{ffrnet.config.context_dim}; take both from one release of InstantID."
        )


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Say that a file is not whole where its tensors make no network."""
    try:
        yield
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = reason_of(error, 200)
        raise FaceSnapError(f"{path.name} is not whole ({reason}); download it again.") from error
