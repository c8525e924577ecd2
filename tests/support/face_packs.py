"""Face model packs with the true names, inputs and outputs of insightface's, as tiny networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LANDMARKS = {"1k3d68.onnx": (192, 3309), "2d106det.onnx": (192, 212), "genderage.onnx": (96, 3)}
PACKS = {  # the detector and the recognition model come last
    "antelopev2": (*LANDMARKS, "scrfd_10g_bnkps.onnx", "glintr100.onnx"),
    "buffalo_l": (*LANDMARKS, "det_10g.onnx", "w600k_r50.onnx"),
    "buffalo_m": (*LANDMARKS, "det_2.5g.onnx", "w600k_r50.onnx"),
    "buffalo_s": (*LANDMARKS, "det_500m.onnx", "w600k_mbf.onnx"),
    "buffalo_sc": ("det_500m.onnx", "w600k_mbf.onnx"),
    "AuraFace": ("genderage.onnx", "scrfd_10g_bnkps.onnx", "glintr100.onnx"),
}
_HEADER = '<ir_version: 7, opset_import: ["" : 13]>\n'


def write_pack(folder: Path, name: str, seed: int = 0) -> Path:
    """Write a pack of this name into a new folder and return it; equal seeds produce equal recognition models."""
    folder.mkdir(parents=True)
    for file in PACKS[name]:
        write_layout(folder / file, seed)
    return folder


def write_layout(path: Path, seed: int = 0) -> None:
    """Write a network that runs and has the input and outputs of insightface's file with this name.

    Names of detectors begin with "scrfd" or "det", and all names that are not insightface's are recognition models.
    """
    import onnx.numpy_helper
    import onnx.parser

    if path.name in LANDMARKS:
        side, numbers = LANDMARKS[path.name]
        network = onnx.parser.parse_model(
            f"{_HEADER}net (float[N, 3, {side}, {side}] data) => (float[N, {numbers}] fc1) "
            "{ flat = ReduceMean <axes = [1, 2, 3], keepdims = 0> (data)\n axis = Constant <value_ints = [1]> ()\n"
            " column = Unsqueeze (flat, axis)\n fc1 = MatMul (column, row) }"
        )
        weights = {"row": np.zeros((1, numbers), np.float32)}
    elif path.name.startswith(("scrfd", "det")):
        outputs = [
            (f"{kind}{stride}", width) for kind, width in (("s", 1), ("b", 4), ("k", 10)) for stride in (8, 16, 32)
        ]
        signature = ", ".join(f"float[n, {width}] {name}" for name, width in outputs)
        body = "\n".join(f"{name} = MatMul (column, row{width})" for name, width in outputs)
        network = onnx.parser.parse_model(
            f"{_HEADER}net (float[1, 3, height, width] image) => ({signature}) "
            "{ pixels = Constant <value_ints = [-1, 1]> ()\n column = Reshape (image, pixels)\n" + body + " }"
        )
        weights = {f"row{width}": np.zeros((1, width), np.float32) for width in (1, 4, 10)}
    else:
        network = onnx.parser.parse_model(
            f"{_HEADER}net (float[N, 3, 112, 112] face) => (float[N, 512] embedding) "
            "{ blurred = AveragePool <kernel_shape = [16, 16], strides = [16, 16]> (face)\n flat = Flatten (blurred)\n"
            " embedding = MatMul (flat, projection) }"
        )
        projection = np.random.default_rng(seed).standard_normal((3 * 7 * 7, 512), dtype=np.float32)
        weights = {"projection": projection}
    network.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.save(network, str(path))
