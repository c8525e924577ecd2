"""The FaceSnap file: Mixer and FFRNet in one `.safetensors`, with metadata that states their sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import user_write
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.networks.number_types import unify_types
from facesnap_ext.networks.resampler import ResamplerConfig, ResamplerMixer
from facesnap_ext.weights.network_names import parse_networks
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.sources import ImageSource, parse_sources, to_json
from facesnap_ext.weights.tensors import is_finite, read_index, read_tensors, without_prefix

VERSION = 1
MAX_SIZE = 2**20  # maximum width accepted in metadata

POINTS72 = "72 points"  # FaceSnap's
POINTS5 = "5 points"  # InstantID's
HINT_NAMES = (POINTS72, POINTS5)
"""The kinds of landmark image that FFRNet can be trained with; `landmarks.hints` draws them."""

Mixer: TypeAlias = FacialAttributeMixer | ResamplerMixer
PAPER_MIXER = "facial attributes"
MIXERS: dict[str, tuple[type, Callable[[Any], Mixer]]] = {
    PAPER_MIXER: (MixerConfig, FacialAttributeMixer),
    "resampler": (ResamplerConfig, ResamplerMixer),  # InstantID's
}
"""Config and network of each kind of Mixer; `facesnap_lab.ablated_mixers` registers the ablation's Mixers here."""


@dataclass(frozen=True)
class FaceSnapInfo:
    """The metadata of a FaceSnap file.

    Args:
        mixer: sizes of the Mixer; the class determines its kind.
        ffrnet: sizes of FFRNet.
        text_free: False for weights that need the SDXL vector conditioning `y` of each row.
        hint: the kind of landmark image, one of `HINT_NAMES`.
        null_identity: whether unconditional rows get separate tokens, computed from an embedding of zeros.
        adapter: sizes of the adapter that adds attention to the UNet; None if there is none.
        recognition: file name of the recognition model whose embeddings the Mixer was trained with; empty if unknown.
        networks: content hashes of the networks that it was trained with, by the keys of `network_names.TITLES`; empty
            if unknown.
        sources: the training images, counted by source, licence and consent; empty if not recorded.
    """

    mixer: MixerConfig | ResamplerConfig
    ffrnet: FFRNetConfig
    text_free: bool = True
    license: str = "unknown"
    trained_on: str = "nothing"
    hint: str = POINTS72
    null_identity: bool = False
    adapter: AdapterConfig | None = None
    recognition: str = ""
    networks: dict[str, str] = field(default_factory=dict)
    sources: tuple[ImageSource, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata as strings, as safetensors requires, with configs as JSON."""
        return {
            "format": "facesnap",
            "version": str(VERSION),
            "mixer_kind": next(kind for kind, (config, _) in MIXERS.items() if config is type(self.mixer)),
            "mixer": json.dumps(asdict(self.mixer)),
            "ffrnet": json.dumps(asdict(self.ffrnet)),
            "text_free": json.dumps(self.text_free),
            "license": self.license,
            "trained_on": self.trained_on,
            "hint": self.hint,
            "null_identity": json.dumps(self.null_identity),
            **({} if self.adapter is None else {"adapter": json.dumps(asdict(self.adapter))}),
            **({"recognition": self.recognition} if self.recognition else {}),
            **({"networks": json.dumps(self.networks, sort_keys=True)} if self.networks else {}),
            **({"sources": to_json(self.sources)} if self.sources else {}),
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> FaceSnapInfo:
        """Parse metadata. The oldest files lack `mixer_kind` and all fields added for InstantID."""
        mixer, _ = MIXERS[metadata.get("mixer_kind", PAPER_MIXER)]
        hint = metadata.get("hint", POINTS72)
        if hint not in HINT_NAMES:
            raise ValueError(f"landmark image of unknown kind {hint!r}")
        adapter = json.loads(metadata.get("adapter", "null"))
        return cls(
            mixer=mixer(**json.loads(metadata["mixer"])),
            ffrnet=FFRNetConfig(**_tuples(json.loads(metadata["ffrnet"]))),
            text_free=json.loads(metadata["text_free"]),
            license=metadata["license"],
            trained_on=metadata["trained_on"],
            hint=hint,
            null_identity=json.loads(metadata.get("null_identity", "false")),
            adapter=None if adapter is None else AdapterConfig(**_tuples(adapter)),
            recognition=metadata.get("recognition", ""),
            networks=parse_networks(metadata.get("networks", "{}")),
            sources=parse_sources(metadata.get("sources", "[]")),
        )


@dataclass(frozen=True)
class FaceSnapWeights:
    """A loaded FaceSnap file without its adapter; both networks are in evaluation mode and require no gradients."""

    info: FaceSnapInfo
    mixer: Mixer
    ffrnet: FFRNet
    name: str


def default_mixer_config(context_dim: int) -> MixerConfig:
    """Return the paper's sizes of the Mixer, scaled to tokens as wide as the UNet's context."""
    default = MixerConfig()
    heads = max(1, context_dim * default.heads // default.dim)
    return replace(default, dim=context_dim, feedforward=4 * context_dim, heads=heads)


def build_mixer(config: MixerConfig | ResamplerConfig) -> Mixer:
    """Return an untrained Mixer with these sizes."""
    return next(network for kind, network in MIXERS.values() if kind is type(config))(config)


def read_info(path: Path) -> FaceSnapInfo:
    """Read a FaceSnap file's metadata and check the names and shapes of its tensors against it.

    Raises:
        FaceSnapError: the file is of the wrong kind, of a newer version, damaged or incomplete, or its Mixer is of an
            unknown kind.
    """
    require(path, Kind.FACESNAP, "choose a FaceSnap file.")
    index = read_index(path)
    if (kind := index.metadata.get("mixer_kind", PAPER_MIXER)) not in MIXERS:
        raise FaceSnapError(
            f"{path.name} has a Mixer of the unknown kind {reason_of(repr(kind), 80)}; update the extension, or choose "
            f"a file with one of these kinds: {', '.join(MIXERS)}."
        )
    try:
        if int(index.metadata.get("version", VERSION)) > VERSION:
            raise FaceSnapError(f"{path.name} was written by a newer FaceSnap; update the extension.")
        info = FaceSnapInfo.from_metadata(index.metadata)
        _check_sizes(info, len(index.shapes))
        with torch.device("meta"):
            networks: dict[str, nn.Module] = {"mixer": build_mixer(info.mixer), "ffrnet": FFRNet(info.ffrnet)}
            if info.adapter is not None:
                networks["adapter"] = Adapter(info.adapter)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = reason_of(error)
        raise FaceSnapError(
            f"The metadata of {path.name} is damaged ({reason}); download the original file again."
        ) from error
    expected = {
        f"{part}.{key}": tuple(t.shape) for part, net in networks.items() for key, t in net.state_dict().items()
    }
    wrong = [key for key, shape in expected.items() if index.shapes.get(key) != shape]
    wrong += [key for key in index.shapes if key not in expected]
    if wrong:
        tensors = f"{len(wrong)} tensors, such as {wrong[0]}, do" if len(wrong) > 1 else f"tensor {wrong[0]} does"
        raise FaceSnapError(
            f"{path.name} is incomplete or damaged: {tensors} not match its metadata; download the file again."
        )
    return info


def _check_sizes(info: FaceSnapInfo, tensors: int) -> None:
    """Raise `ValueError` for impossible sizes before a network is built with them.

    A network cannot have more layers than the file has tensors.
    """
    for config in (info.mixer, info.ffrnet, info.adapter):
        for name, value in ({} if config is None else asdict(config)).items():
            lowest = {"middle_depth": -1, "depths": 0, "clip_dim": 0}.get(name, 1)
            highest = tensors if name in ("layers", "depths", "middle_depth") else MAX_SIZE
            sizes = _flatten(value)
            if len(sizes) > tensors or not all(type(size) is int and lowest <= size <= highest for size in sizes):
                raise ValueError(f"{name} is {reason_of(repr(value), 80)}")
    ffrnet = info.ffrnet
    if len(ffrnet.heads) != len(ffrnet.widths) or any(map(int.__mod__, ffrnet.widths, ffrnet.heads)):
        raise ValueError(f"{ffrnet.heads} attention heads for widths {ffrnet.widths}")
    if not all(isinstance(flag, bool) for flag in (info.text_free, info.null_identity)):
        raise ValueError("text_free and null_identity must be true or false")


def _flatten(value: Any) -> list[Any]:
    """Return the items of nested tuples and lists, or a list of the value itself."""
    return [item for part in value for item in _flatten(part)] if isinstance(value, (tuple, list)) else [value]


def load(path: Path, dtype: torch.dtype | None = None) -> FaceSnapWeights:
    """Load a FaceSnap file to the CPU, without its adapter, which is large and loaded by `load_adapter` when needed.

    Args:
        dtype: floating-point dtype of both networks; by default the file's dtype.

    Raises:
        FaceSnapError: see `read_info`.
    """
    info = read_info(path)
    with torch.device("meta"):
        mixer, ffrnet = build_mixer(info.mixer), FFRNet(info.ffrnet)
    tensors = read_tensors(path, lambda key: None if key.startswith("adapter.") else key, dtype)
    networks: dict[str, nn.Module] = {"mixer": mixer, "ffrnet": ffrnet}
    for part, network in networks.items():
        network.load_state_dict(_strip(tensors, f"{part}."), assign=True)
        unify_types(network)
        network.eval().requires_grad_(False)
    return FaceSnapWeights(info, mixer, ffrnet, path.name)


def load_adapter(path: Path) -> Adapter:
    """Load the adapter of a FaceSnap file that has one, to the CPU, in the file's dtype.

    Raises:
        FaceSnapError: see `read_info`.
    """
    config = read_info(path).adapter
    assert config is not None, f"{path.name} has no adapter"
    with torch.device("meta"):
        adapter = Adapter(config)
    adapter.load_state_dict(read_tensors(path, without_prefix("adapter.")), assign=True)
    unify_types(adapter)
    return adapter.eval().requires_grad_(False)


def save(path: Path, info: FaceSnapInfo, mixer: nn.Module, ffrnet: nn.Module, adapter: nn.Module | None = None) -> None:
    """Write a FaceSnap file atomically.

    Raises:
        FaceSnapError: the file cannot be written, or a weight is not a finite number.
    """
    from safetensors.torch import save_file

    networks = {"mixer": mixer, "ffrnet": ffrnet} | ({} if adapter is None else {"adapter": adapter})
    tensors = {
        f"{part}.{key}": tensor.contiguous()
        for part, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    if wrong := next((key for key, tensor in tensors.items() if not is_finite(tensor)), None):
        raise FaceSnapError(
            f"{path.name} is not written because {wrong} contains values that are not finite in "
            f"{str(tensors[wrong].dtype).removeprefix('torch.')}; use a wider data type."
        )
    with user_write(path) as part:
        save_file(tensors, part, info.to_metadata())


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _tuples(value: Any) -> Any:
    """Convert JSON lists to the tuples that configs use."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple([_tuples(item) for item in value]) if isinstance(value, list) else value
