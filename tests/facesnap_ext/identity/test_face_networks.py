"""Whatever a network of a face model pack returns or raises is reported with the file, and costs bounded time."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import face_networks
from facesnap_ext.identity.detection import detect_faces
from facesnap_ext.weights.face_pack import role_of
from facesnap_ext.weights.onnx_graph import OnnxGraph

BGR = np.zeros((64, 96, 3), np.uint8)
BOX, POINTS = np.array([[10, 10, 30, 30, 0.9]], np.float32), np.full((1, 5, 2), 20, np.float32)


def fails(*arguments, **values):
    raise RuntimeError("[ONNXRuntimeError] : 2 :\nINVALID_ARGUMENT")


def returning(value):
    return lambda *arguments, **values: value


def with_number(array, number):
    changed = array.copy()
    changed.flat[1] = number
    return changed


NUMBERS = (np.nan, np.inf, -np.inf, 1e30, -3e38)
DETECT = {
    "raises": fails,
    "nothing": returning((None, None)),
    "no keypoints": returning((BOX, None)),
    "fewer keypoints": returning((BOX.repeat(2, 0), POINTS)),
    "boxes without scores": returning((BOX[:, :4], POINTS)),
    "one point too few": returning((BOX, POINTS[:, :4])),
    **{f"a box with {number}": returning((with_number(BOX, number), POINTS)) for number in NUMBERS},
    **{f"a point with {number}": returning((BOX, with_number(POINTS, number))) for number in NUMBERS},
}
EMBED = {
    "raises": fails,
    "nothing": returning(None),
    "no numbers": returning(np.zeros(0)),
    "zeros": returning(np.zeros(512)),
    "text": returning(np.array(["a"])),
    **{f"{number}": returning(with_number(np.ones(512), number)) for number in (np.nan, np.inf, 1e300)},
}
LANDMARKS = {
    "raises": fails,
    "nothing": returning(None),
    "one dimension": returning(np.zeros(204)),
    "too few": returning(np.zeros((67, 3))),
    **{f"{number}": returning(with_number(np.ones((68, 3)), number)) for number in NUMBERS},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind, cases in (("d", DETECT), ("e", EMBED), ("l", LANDMARKS)) for case in cases],
)
def test_a_network_that_misbehaves_is_reported_with_its_file(kind, case):
    behaviour = {"d": DETECT, "e": EMBED, "l": LANDMARKS}[kind][case]
    model = SimpleNamespace(model_file="/models/pack/net.onnx", detect=behaviour, get=behaviour)
    run = {
        "d": lambda: detect_faces(model, BGR),
        "e": lambda: face_networks.embed(model, BGR, POINTS[0]),
        "l": lambda: face_networks.landmarks68(model, BGR, BOX[0, :4]),
    }[kind]
    pytest.importorskip("insightface")
    with pytest.raises(FaceSnapError, match=r"^The face model /models/pack/net\.onnx .*: unpack .* again\.$") as error:
        run()
    assert "\n" not in str(error.value)


def test_a_detector_that_finds_faces_everywhere_costs_bounded_time():
    """Every tile of a large photo, in all rotations, has 25,600 faces."""
    boxes = np.random.default_rng(0).uniform(0, 600, (25_600, 5)).astype(np.float32)
    boxes[:, 2:4] = boxes[:, :2] + 8
    model = SimpleNamespace(detect=returning((boxes, np.zeros((25_600, 5, 2), np.float32))))
    start = time.process_time()
    found = detect_faces(model, np.zeros((4000, 6000, 3), np.uint8))
    assert time.process_time() - start < 20
    assert 0 < len(found) <= 4 * face_networks.MAX_FACES  # in each of four rotations


@pytest.mark.parametrize("side", [112, 128, 224, 512])
def test_recognition_models_take_crops_of_usual_sizes(side):
    assert role_of(OnnxGraph(((1, 3, side, side),), ((1, 512),), ())) == "recognition"


@pytest.mark.parametrize("side", [0, 16, 96, 113, 192, 528, 1024, 2**20, 2**30])
def test_no_crop_of_a_size_that_no_recognition_model_has_is_made(side):
    assert role_of(OnnxGraph(((1, 3, side, side),), ((1, 512),), ())) == ""
