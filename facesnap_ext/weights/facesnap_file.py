"""The FaceSnap file: Mixer and FFRNet in one `.safetensors`, with the metadata that their sizes come from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import user_write
from facesnap_ext.landmarks.hints import HINTS, POINTS72
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.networks.resampler import ResamplerConfig, ResamplerMixer
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import read_index, read_tensors, without_prefix

VERSION = 1
MAX_SIZE = 2**20  # of a width, in metadata
MIXERS: dict[str, tuple[type, type[nn.Module]]] = {  # sizes and network of each kind; the lab adds its own
    "facial attributes": (MixerConfig, FacialAttributeMixer),  # the paper's
    "resampler": (ResamplerConfig, ResamplerMixer),  # InstantID's
}


@dataclass(frozen=True)
class FaceSnapInfo:
    """What a FaceSnap file says of itself.

    mixer: its class says which Mixer it is.
    text_free: False for weights that want the rows' own `y`.
    hint: how landmarks are drawn for it, of `HINTS`.
    null_identity: whether unconditional rows get tokens of their own, made of an embedding of zeros.
    adapter: of the second half that adds attention to the UNet; None where there is none.
    recognition: file name of the recognition model whose embeddings alone make sense; empty where nobody says.
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

    def to_metadata(self) -> dict[str, str]:
        """As safetensors' flat strings; configurations as JSON."""
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
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> FaceSnapInfo:
        # the first files name neither their Mixer nor anything that InstantID's have besides
        mixer, _ = MIXERS[metadata.get("mixer_kind", "facial attributes")]
        hint = metadata.get("hint", POINTS72)
        if hint not in HINTS:
            raise ValueError(f"landmarks drawn as {hint}")
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
        )


@dataclass(frozen=True)
class FaceSnapWeights:
    """A loaded FaceSnap file but for its adapter; both networks in evaluation mode and without gradients."""

    info: FaceSnapInfo
    mixer: FacialAttributeMixer | ResamplerMixer
    ffrnet: FFRNet
    name: str


def build_mixer(config: MixerConfig | ResamplerConfig) -> FacialAttributeMixer | ResamplerMixer:
    """The untrained Mixer of these sizes."""
    return next(network for kind, network in MIXERS.values() if kind is type(config))(config)


def read_info(path: Path) -> FaceSnapInfo:
    """Read a FaceSnap file's metadata and check its tensors against it, without reading their numbers.

    Raises:
        FaceSnapError: the file is of another kind, of a newer version, or not whole.
    """
    require(path, Kind.FACESNAP, "put a FaceSnap .safetensors in its place, models/README.md lists them.")
    index = read_index(path)
    try:
        if int(index.metadata.get("version", VERSION)) > VERSION:
            raise FaceSnapError(f"{path.name} was written by a newer FaceSnap; update the extension.")
        info = FaceSnapInfo.from_metadata(index.metadata)
        _check_sizes(info, len(index.shapes))
        with torch.device("meta"):
            networks = {"mixer": build_mixer(info.mixer), "ffrnet": FFRNet(info.ffrnet)}
            if info.adapter is not None:
                networks["adapter"] = Adapter(info.adapter)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = reason_of(error)
        raise FaceSnapError(f"The metadata of {path.name} is damaged ({reason}); download the file again.") from error
    expected = {
        f"{part}.{key}": tuple(t.shape) for part, net in networks.items() for key, t in net.state_dict().items()
    }
    wrong = [key for key, shape in expected.items() if index.shapes.get(key) != shape]
    wrong += [key for key in index.shapes if key not in expected]
    if wrong:
        raise FaceSnapError(
            f"{path.name} is not whole: {len(wrong)} tensors are missing, foreign or of other sizes than its metadata "
            f"says, the first is {wrong[0]}; download the file again."
        )
    return info


def _check_sizes(info: FaceSnapInfo, tensors: int) -> None:
    """Raise `ValueError` for sizes that no network has, before one is built that has them: no more layers than there
    are tensors in the file."""
    for config in (info.mixer, info.ffrnet, info.adapter):
        for name, value in ({} if config is None else asdict(config)).items():
            lowest = {"middle_depth": -1, "depths": 0, "clip_dim": 0}.get(name, 1)
            highest = tensors if name in ("layers", "depths", "middle_depth") else MAX_SIZE
            sizes = _numbers(value)
            if len(sizes) > tensors or not all(type(size) is int and lowest <= size <= highest for size in sizes):
                raise ValueError(f"{name} of {reason_of(repr(value), 80)}")
    ffrnet = info.ffrnet
    if len(ffrnet.heads) != len(ffrnet.widths) or any(map(int.__mod__, ffrnet.widths, ffrnet.heads)):
        raise ValueError(f"{ffrnet.heads} attention heads for widths of {ffrnet.widths}")
    if not all(isinstance(flag, bool) for flag in (info.text_free, info.null_identity)):
        raise ValueError("text_free and null_identity are true or false")


def _numbers(value: Any) -> list[Any]:
    """The numbers in tuples in tuples, or the one."""
    return [number for item in value for number in _numbers(item)] if isinstance(value, (tuple, list)) else [value]


def load(path: Path, dtype: torch.dtype | None = None) -> FaceSnapWeights:
    """Load a FaceSnap file to the CPU; its adapter, which is large and rarely wanted, is left to `load_adapter`.

    Args:
        dtype: floating type of both networks; by default the file's.

    Raises:
        FaceSnapError: see `read_info`.
    """
    info = read_info(path)
    with torch.device("meta"):
        mixer, ffrnet = build_mixer(info.mixer), FFRNet(info.ffrnet)
    tensors = read_tensors(path, lambda key: None if key.startswith("adapter.") else key, dtype)
    for part, network in (("mixer", mixer), ("ffrnet", ffrnet)):
        network.load_state_dict(_strip(tensors, f"{part}."), assign=True)
        network.eval().requires_grad_(False)
    return FaceSnapWeights(info, mixer, ffrnet, path.name)


def load_adapter(path: Path) -> Adapter:
    """The adapter of a FaceSnap file that has one, on the CPU in the file's type.

    Raises:
        FaceSnapError: see `read_info`.
    """
    with torch.device("meta"):
        adapter = Adapter(read_info(path).adapter)
    adapter.load_state_dict(read_tensors(path, without_prefix("adapter.")), assign=True)
    return adapter.eval().requires_grad_(False)


def save(path: Path, info: FaceSnapInfo, mixer: nn.Module, ffrnet: nn.Module, adapter: nn.Module | None = None) -> None:
    """Write a FaceSnap file; a file of the same name is replaced only once the new one is whole.

    Raises:
        FaceSnapError: it cannot be written.
    """
    from safetensors.torch import save_file

    networks = {"mixer": mixer, "ffrnet": ffrnet} | ({} if adapter is None else {"adapter": adapter})
    tensors = {
        f"{part}.{key}": tensor.contiguous()
        for part, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    with user_write(path) as part:
        save_file(tensors, part, info.to_metadata())


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _tuples(value: Any) -> Any:
    """JSON knows lists alone; configurations hold tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
