"""Whole things of each kind that FaceSnap reads, from which the fuzzing starts."""

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
    """Small pictures in every format, mode and oddity that people have."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 2000  # lying on its side, with a long description
    large_exif = Image.Exif()
    large_exif[0x9286] = b"y" * 60_000
    animation = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    saved = [
        (picture, "PNG", {}),
        (picture.convert("RGBA"), "PNG", {}),
        (picture.convert("P"), "PNG", {"transparency": 0}),
        (Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), "PNG", {}),
        (picture, "PNG", animation),
        (picture, "JPEG", {"exif": exif}),
        (picture, "JPEG", {"exif": large_exif, "progressive": True}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture.convert("L"), "JPEG", {}),
        (picture, "WEBP", {"lossless": True}),
        (picture, "WEBP", animation),
        (picture, "GIF", animation),
        (picture, "BMP", {}),
        (picture, "TIFF", {"compression": "tiff_lzw"}),
        (picture.convert("F"), "TIFF", {}),
        (picture, "PPM", {}),
        (picture, "JPEG2000", {}),
    ]
    return [_picture(*one) for one in saved] + [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ]


def _picture(picture: Image.Image, form: str, options: dict) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@cache
def weights() -> list[bytes]:
    """A FaceSnap file, an identity, safetensors' and torch's own, a program, and a tensor larger than its numbers."""
    torch.manual_seed(0)
    config = MixerConfig(id_dim=8, clip_dim=8, dim=8, id_tokens=2, queries=2, layers=1, feedforward=8, heads=2)
    ffrnet = tiny.config(widths=(32, 32, 32), depths=((0,), (1,), (1,)), middle_depth=1, heads=(1, 1, 1), context_dim=8)
    networks = FacialAttributeMixer(config), tiny.FFRNet(ffrnet)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "facesnap.safetensors", Path(folder) / "identity.safetensors"
        facesnap_file.save(files[0], FaceSnapInfo(config, ffrnet), *networks)
        identity_file.save(files[1], identity())
        made = [file.read_bytes() for file in files]
    tensors = {"model.weight": torch.arange(12.0).reshape(3, 4), "model.bias": torch.ones(3, dtype=torch.float16)}
    made.append(save(tensors, {"format": "pt"}))
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"state_dict": OrderedDict(tensors)}, file, _use_new_zipfile_serialization=zipped)
        made.append(file.getvalue())
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    wide = io.BytesIO()
    torch.save({"wide": torch.ones(1).expand(10**4, 10**5)}, wide)
    return [*made, program.getvalue(), wide.getvalue()]


@cache
def instantid() -> dict[str, bytes]:
    """InstantID's files by their names: the ControlNet, its sizes, and the adapter."""
    torch.manual_seed(0)
    ffrnet = tiny.config(widths=(32, 32, 32), depths=((0,), (1,), (1,)), middle_depth=1, heads=(1, 1, 1), context_dim=8)
    with tempfile.TemporaryDirectory() as folder:
        write_instantid(Path(folder), tiny.FFRNet(ffrnet), (32, 32))
        made = {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*.*"))}
    sizes = ResamplerConfig(clip_dim=0, dim=8, width=8, queries=2, layers=1, feedforward=8, heads=1)
    halves = {"image_proj": ResamplerMixer(sizes), "ip_adapter": Adapter(AdapterConfig((32, 32), 8))}
    file = io.BytesIO()
    torch.save({name: network.state_dict() for name, network in halves.items()}, file)
    return {**made, ADAPTER: file.getvalue()}


def _chumpy_pickle() -> bytes:
    """What FLAME 2020 has in the place of arrays, each level naming the one below twice."""
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
    """A safetensors file's header as JSON, and the numbers behind it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@cache
def pickles() -> list[bytes]:
    """Pickled arrays as FLAME's are, by every protocol, and calls that a pickle must not make."""
    arrays = {"f": np.arange(12, dtype=np.uint32).reshape(4, 3), "v_template": np.linspace(0, 1, 15).reshape(5, 3)}
    sparse = scipy.sparse.csc_matrix(np.eye(4, 6))
    arrays |= {"J_regressor": sparse, "again": sparse, "raw": np.frombuffer(bytearray(16), np.uint8)}
    made = [pickle.dumps(arrays, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    made.append(_chumpy_pickle())
    made.append(b"\x80\x05\x96" + (2**34).to_bytes(8, "little") + b"short.")  # a bytearray that is not there
    return made + [
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
