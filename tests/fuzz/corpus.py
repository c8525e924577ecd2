"""Valid files of each kind that FaceSnap reads, as the seeds of fuzzing."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tempfile
import types
from collections import OrderedDict
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.sparse
import torch
from PIL import Image
from safetensors.torch import save

from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.networks.resampler import ResamplerConfig, ResamplerMixer
from facesnap_ext.weights import facesnap_file, identity_file
from facesnap_ext.weights.facesnap_file import FaceSnapInfo
from facesnap_ext.weights.identity_file import Identity
from facesnap_ext.weights.instantid import ADAPTER
from tests.support import tiny
from tests.support.stand_ins import write_instantid


@cache
def photos() -> list[bytes]:
    """Small images in many formats and modes, with the oddities that occur in practice."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 2000  # rotated by 90 degrees, with a long description
    large_exif = Image.Exif()
    large_exif[0x9286] = b"y" * 60_000
    animation = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    saved = [
        (image, "PNG", {}),
        (image.convert("RGBA"), "PNG", {}),
        (image.convert("P"), "PNG", {"transparency": 0}),
        (Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), "PNG", {}),
        (image, "PNG", animation),
        (image, "JPEG", {"exif": exif}),
        (image, "JPEG", {"exif": large_exif, "progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
        (image.convert("L"), "JPEG", {}),
        (image, "WEBP", {"lossless": True}),
        (image, "WEBP", animation),
        (image, "GIF", animation),
        (image, "BMP", {}),
        (image, "TIFF", {"compression": "tiff_lzw"}),
        (image.convert("F"), "TIFF", {}),
        (image, "PPM", {}),
        (image, "JPEG2000", {}),
    ]
    return [_encoded(*one) for one in saved] + [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ]


def _encoded(image: Image.Image, form: str, options: dict) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@cache
def weights() -> list[bytes]:
    """A FaceSnap file, an identity, a safetensors file, torch files, a TorchScript program, and an expanded tensor."""
    torch.manual_seed(0)
    config = MixerConfig(id_dim=8, clip_dim=8, dim=8, id_tokens=2, queries=2, layers=1, feedforward=8, heads=2)
    ffrnet = tiny.config(widths=(32, 32, 32), depths=((0,), (1,), (1,)), middle_depth=1, heads=(1, 1, 1), context_dim=8)
    networks = FacialAttributeMixer(config), tiny.FFRNet(ffrnet)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "facesnap.safetensors", Path(folder) / "identity.safetensors"
        facesnap_file.save(files[0], FaceSnapInfo(config, ffrnet), *networks)
        identity_file.save(files[1], identity())
        contents = [file.read_bytes() for file in files]
    tensors = {"model.weight": torch.arange(12.0).reshape(3, 4), "model.bias": torch.ones(3, dtype=torch.float16)}
    contents.append(save(tensors, {"format": "pt"}))
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"state_dict": OrderedDict(tensors)}, file, _use_new_zipfile_serialization=zipped)
        contents.append(file.getvalue())
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    wide = io.BytesIO()
    torch.save({"wide": torch.ones(1).expand(10**4, 10**5)}, wide)
    return [*contents, program.getvalue(), wide.getvalue()]


@cache
def instantid() -> dict[str, bytes]:
    """InstantID's files by name: the ControlNet, its config, and the adapter."""
    torch.manual_seed(0)
    ffrnet = tiny.config(widths=(32, 32, 32), depths=((0,), (1,), (1,)), middle_depth=1, heads=(1, 1, 1), context_dim=8)
    with tempfile.TemporaryDirectory() as folder:
        write_instantid(Path(folder), tiny.FFRNet(ffrnet), (32, 32))
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*.*"))}
    sizes = ResamplerConfig(clip_dim=0, dim=8, width=8, queries=2, layers=1, feedforward=8, heads=1)
    halves = {"image_proj": ResamplerMixer(sizes), "ip_adapter": Adapter(AdapterConfig((32, 32), 8))}
    file = io.BytesIO()
    torch.save({name: network.state_dict() for name, network in halves.items()}, file)
    return {**contents, ADAPTER: file.getvalue()}


def _chumpy_pickle() -> bytes:
    """Nested chumpy objects, as FLAME 2020 has instead of arrays. Each level refers to the one below twice."""
    module = types.ModuleType("chumpy.reordering")
    module.Select = type("Select", (), {"__module__": module.__name__})
    array = np.zeros(4, np.int64)
    for _ in range(30):
        select = module.Select()
        select.a = select.idxs = array
        array = select
    with mock.patch.dict(sys.modules, {"chumpy": types.ModuleType("chumpy"), module.__name__: module}):
        return pickle.dumps({"v_template": array}, 2)


def identity() -> Identity:
    numbers = torch.linspace(-1, 1, 24)
    return Identity(
        name="Ada",
        embeddings=numbers[:16].reshape(2, 8).clone(),
        clip_tokens=numbers.reshape(2, 3, 4),
        shapes=numbers[:10].reshape(2, 5).clone(),
        photos=("0123456789", "abcdefabcd"),
        networks=dict.fromkeys(("face_pack", "clip", "deca"), "0" * 64),
    )


def safetensors_headers(data: bytes) -> tuple[dict, bytes]:
    """The JSON header of a safetensors file, and the bytes after it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@cache
def pickles() -> list[bytes]:
    """Pickled arrays like FLAME's in every protocol, and pickles with calls that must not be made."""
    arrays = {"f": np.arange(12, dtype=np.uint32).reshape(4, 3), "v_template": np.linspace(0, 1, 15).reshape(5, 3)}
    sparse = scipy.sparse.csc_matrix(np.eye(4, 6))
    arrays |= {"J_regressor": sparse, "again": sparse, "raw": np.frombuffer(bytearray(16), np.uint8)}
    contents = [pickle.dumps(arrays, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    contents.append(_chumpy_pickle())
    contents.append(b"\x80\x05\x96" + (2**34).to_bytes(8, "little") + b"short.")  # longer than the file
    return contents + [
        f"c{module}\n{function}\n(V{argument}\ntR.".encode()
        for module, function, argument in (
            ("os", "system", "touch facesnap-was-here"),
            ("posix", "system", "touch facesnap-was-here"),
            ("builtins", "exec", "open('facesnap-was-here', 'w')"),
            ("builtins", "eval", "__import__('os').mkdir('facesnap-was-here')"),
            ("pathlib", "Path", "facesnap-was-here"),
            ("webbrowser", "open", "http://127.0.0.1:9/"),
            ("numpy", "load", "facesnap-was-here"),
            ("torch", "load", "facesnap-was-here"),
        )
    ]
