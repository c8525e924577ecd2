"""Face model packs: ONNX files that are damaged, of another kind or hostile, and what their networks return."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.identity import faces
from facesnap_ext.photos import Photo
from facesnap_ext.weights.face_pack import has_insightface_names, pack_files
from facesnap_ext.weights.search import find_models
from tests.fuzz import networks
from tests.fuzz.harness import folder, refused, sample
from tests.fuzz.mutations import mutated
from tests.fuzz.watch import only_reading

ROLES = {"scrfd_10g_bnkps.onnx": "detector", "glintr100.onnx": "recognition", "1k3d68.onnx": "landmarks68"}
NOT_ONNX = [
    b"",
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(64),
    b"PK\3\4" + bytes(26),
]
SPARE = ["2d106det.onnx", "._glintr100.onnx", "0.onnx", "det_10g.onnx", "z.onnx", "weights.pb"]


def bright_square() -> Photo:
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[30:34, 40:44] = 255
    return Photo(pixels, "photo")


@cache
def pack_folder() -> Path:
    """A pack that has been used once, so that the libraries are initialised before their actions are audited."""
    pack = folder() / "packs" / "antelopev2"
    pack.mkdir(parents=True)
    for name, role in ROLES.items():
        (pack / name).write_bytes(networks.valid(role))
    [face, *_] = faces.find_faces(faces.load_pack(pack), bright_square())
    assert face.embedding.shape == (512,)
    find_landmarks(pack)
    return pack


@sample(40, share=0.6)
@given(st.data())
def test_face_packs(data):
    pack = pack_folder()
    for old in pack.iterdir():
        old.unlink()
    changed = data.draw(st.lists(st.sampled_from([*ROLES, *SPARE]), min_size=1, max_size=3, unique=True))
    for name in {*ROLES, *changed}:
        role = ROLES.get(name) or data.draw(st.sampled_from(sorted(networks.INPUTS)))
        content = networks.valid(role)
        if name in changed:
            content = data.draw(networks.odd_network(role) | mutated([content]) | st.sampled_from(NOT_ONNX))
        (pack / name).write_bytes(content)
    with only_reading(folder()):
        files = pack_files(pack)
        has_insightface_names(pack)
        found = find_models(pack.parent)
        assert found.face_pack == (pack if files.is_complete or found.face_pack else None)
        for use in (find_face, find_landmarks):
            refusal = refused(use, pack)
            assert refusal is None or "photo" in refusal or str(pack) in refusal


def find_face(pack: Path) -> None:
    for face in faces.find_faces(faces.load_pack(pack), bright_square()):
        assert np.isfinite(face.box).all()
        assert np.isfinite(face.keypoints).all()
        assert np.isfinite(face.embedding).all()


def find_landmarks(pack: Path) -> None:
    model = faces.load_landmarks68(pack)
    box, keypoints = np.array([10, 10, 50, 50], np.float32), np.zeros((5, 2), np.float32)
    face = faces.Face(bright_square(), box, keypoints, np.ones(512, np.float32), 1.0, False, 640)
    if model is not None:
        assert faces.detect_landmarks68(model, face).shape == (68, 2)
