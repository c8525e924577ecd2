"""DECA's coarse encoder: estimate FLAME codes and a camera from the photo of a face.

Source: Feng, Feng, Black, Bolkart, "Learning an animatable detailed 3D face model from in-the-wild images" (2021),
https://github.com/YadiraF/DECA. A ResNet-50 and two linear layers encode a square crop. The output vector is split, in
this order, into shape, texture, expression, pose (global and jaw rotation vectors), camera and light.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import read_index, read_tensors
from facesnap_ext.weights.unpickle import read_torch

VERSION = 1
CODE_SIZES = {"shape": 100, "tex": 50, "exp": 50, "pose": 6, "cam": 3, "light": 27}  # lengths in the published DECA
IMAGE_SIZE = 224
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE, MAX_CODE = 16, 1024, 4096  # limits accepted in metadata
CROP_SCALE = 1.25  # side of the crop, relative to the mean side of the face box
CROP_SHIFT = 0.12  # distance of the crop's centre below the box's centre, relative to the mean side of the face box


class Bottleneck(nn.Module):
    """ResNet bottleneck block: 1×1, strided 3×3 and 1×1 convolution, with torchvision's key names."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if project
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A bottleneck ResNet without its classifier. Widths and depths are derived from tensor shapes.

    Args:
        shapes: tensor shapes of a state dict with torchvision's key names.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        channels, inputs, kernel, _ = shapes["conv1.weight"]
        self.conv1 = nn.Conv2d(inputs, channels, kernel, 2, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for level in range(1, 5):
            blocks: list[nn.Module] = []
            while (prefix := f"layer{level}.{len(blocks)}") + ".conv1.weight" in shapes:
                width, outputs = shapes[f"{prefix}.conv1.weight"][0], shapes[f"{prefix}.conv3.weight"][0]
                stride = 2 if level > 1 and not blocks else 1
                project = f"{prefix}.downsample.0.weight" in shapes
                blocks.append(Bottleneck(channels, width, outputs, stride, project))
                channels = outputs
            self.add_module(f"layer{level}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N,3,S,S] to features [N,features], averaged over all positions."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for level in range(1, 5):
            x = self.get_submodule(f"layer{level}")(x)
        return x.mean(dim=(2, 3))


class Deca(nn.Module):
    """DECA's `E_flame`, with its key names (`encoder.…`, `layers.0`, `layers.2`).

    Args:
        shapes: tensor shapes of its state dict.
        code_sizes: length of each code, in output order.
        image_size: side of the crop in pixels.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], code_sizes: Mapping[str, int], image_size: int = IMAGE_SIZE
    ) -> None:
        super().__init__()
        self.encoder = ResNet({key[8:]: shape for key, shape in shapes.items() if key.startswith("encoder.")})
        (hidden, features), (outputs, _) = shapes["layers.0.weight"], shapes["layers.2.weight"]
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        self.code_sizes = dict(code_sizes)
        self.image_size = image_size

    def forward(self, crops: Tensor) -> dict[str, Tensor]:
        """Encode face crops.

        Args:
            crops: [N,3,S,S] RGB in 0…1, from `crop_face`.

        Returns:
            The codes by name, each [N,size]: `shape` and `exp` in standard deviations, `pose` in radians, `cam` as
            scale and translation (see `project`), `tex` and `light`.
        """
        codes = self.layers(self.encoder(crops))
        return dict(zip(self.code_sizes, codes.split(list(self.code_sizes.values()), dim=1)))


def crop_transform(box: np.ndarray, image_size: int = IMAGE_SIZE, angle: float = 0.0) -> np.ndarray:
    """Return the similarity transform from a photo to DECA's crop of a detected face.

    The side of the crop is 1.25 times the mean side of the face box, truncated to whole pixels. Its centre lies 0.12
    mean sides below the centre of the box.

    Args:
        box: [4] left, top, right, bottom of the detected face in pixels.
        image_size: side of the crop in pixels.
        angle: clockwise rotation of the face in the photo, in degrees; the crop shows the face upright.

    Returns:
        [3,3] float64, from pixel indices of the photo to pixel indices of the crop (pixel centres have integer
        coordinates).
    """
    left, top, right, bottom = (float(edge) for edge in box)
    if angle:
        return crop_transform(box, image_size) @ _rotation_about((left + right) / 2, (top + bottom) / 2, -angle)
    size = (right - left + bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2 + CROP_SHIFT * size
    side = max(int(size * CROP_SCALE), 1)
    scale = (image_size - 1) / side
    return np.array([[scale, 0, scale * (side / 2 - x)], [0, scale, scale * (side / 2 - y)], [0, 0, 1]])


def _rotation_about(x: float, y: float, angle: float) -> np.ndarray:
    """Return the matrix [3,3] of a rotation by `angle` degrees about a point, clockwise as seen in the image."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]])


def crop_face(photo: np.ndarray, transform: np.ndarray, image_size: int = IMAGE_SIZE) -> Tensor:
    """Cut DECA's crop out of a photo, with bilinear interpolation and black outside the photo.

    Args:
        photo: [H,W,3] uint8 RGB.
        transform: [3,3] from `crop_transform`.
        image_size: side S of the crop in pixels.

    Returns:
        [3,S,S] float32 in 0…1.
    """
    from skimage.transform import SimilarityTransform, warp

    # Convert only the part of the photo that the crop reads to float, with a margin of 2 pixels for the interpolation.
    last = image_size - 1
    corners = to_photo_indices(np.array([[0, 0], [last, 0], [0, last], [last, last]]), transform)
    height, width = photo.shape[:2]
    left, top = np.clip(np.floor(corners.min(0)) - 2, 0, [width - 1, height - 1]).astype(int)
    right, bottom = np.clip(np.ceil(corners.max(0)) + 3, [left + 1, top + 1], [width, height]).astype(int)
    window = photo[top:bottom, left:right].astype(np.float32) / 255
    into_window = SimilarityTransform(translation=(-left, -top)).params @ np.linalg.inv(transform)
    crop = warp(window, SimilarityTransform(matrix=into_window), output_shape=(image_size, image_size))
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1), dtype=np.float32))


def project(points: Tensor, cam: Tensor) -> Tensor:
    """Apply DECA's scaled orthographic camera: p = s·(X_xy + t), with the y axis flipped to point down.

    Args:
        points: [N,P,3] metres, in FLAME's axes; z is ignored.
        cam: [N,3] scale s and translation t.

    Returns:
        [N,P,2] crop coordinates, -1…1 from edge to edge.
    """
    flat = cam[:, None, :1] * (points[..., :2] + cam[:, None, 1:])
    return flat * flat.new_tensor([1.0, -1.0])


def to_photo(points: np.ndarray, transform: np.ndarray, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Map projected points from crop coordinates back to the photo.

    Args:
        points: [P,2] crop coordinates from `project`.
        transform: [3,3] from `crop_transform`.
        image_size: side S of the crop in pixels.

    Returns:
        [P,2] pixels from the photo's upper left corner.
    """
    # DECA's -1 and 1 are the pixel indices 0 and S of the crop. Add half a pixel: an index denotes a pixel's centre.
    return to_photo_indices((points + 1) * (image_size / 2), transform) + 0.5


def to_photo_indices(indices: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Map pixel indices [P,2] of a crop to pixel indices of its photo."""
    inverse = np.linalg.inv(transform)
    return indices @ inverse[:2, :2].T + inverse[:2, 2]


def load_deca(path: Path) -> Deca:
    """Load a DECA encoder converted by `convert_deca` onto the CPU, in evaluation mode and without gradients.

    Raises:
        FaceSnapError: the file is not a converted DECA encoder, has a newer format version, or is incomplete.
    """
    require(path, Kind.DECA, "convert deca_model.tar once with `python -m facesnap_ext convert`.")
    metadata = read_index(path).metadata
    try:
        if int(metadata.get("version", VERSION)) > VERSION:
            raise FaceSnapError(f"{path.name} was written by a newer FaceSnap; update the extension.")
        code_sizes, image_size = json.loads(metadata["code_sizes"]), int(metadata["image_size"])
        _check_metadata(code_sizes, image_size)
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise FaceSnapError(
            f"The metadata of {path.name} is damaged ({reason_of(error)}); convert deca_model.tar again."
        ) from error
    tensors = read_tensors(path)
    deca = _build_encoder(tensors, code_sizes, image_size, path.name)
    deca.load_state_dict(tensors, assign=True)
    return deca.float().eval().requires_grad_(False)  # the file may be in half precision; crops are float32


def _check_metadata(code_sizes: Any, image_size: int) -> None:
    """Raise `ValueError` for sizes that no DECA encoder has."""
    if not isinstance(code_sizes, dict) or not set(CODE_SIZES) >= set(code_sizes) >= {"shape", "exp", "pose", "cam"}:
        raise ValueError(f"the codes are {reason_of(repr(code_sizes), 80)}")
    if not all(type(size) is int and 0 <= size <= MAX_CODE for size in code_sizes.values()):
        raise ValueError(f"the sizes of the codes are {reason_of(repr(code_sizes), 80)}")
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"the side of the crop is {image_size} pixels")


def save_deca(
    path: Path,
    tensors: Mapping[str, Tensor],
    source: str,
    code_sizes: Mapping[str, int] = CODE_SIZES,
    image_size: int = IMAGE_SIZE,
) -> None:
    """Write the tensors of a `Deca` as a converted file.

    Args:
        path: file to write.
        tensors: state dict of the encoder; extra tensors are dropped.
        source: origin of the tensors, stored in the file's metadata and named in error messages.
        code_sizes: length of each code, in output order.
        image_size: side of the crop in pixels.

    Raises:
        FaceSnapError: a tensor is missing or has the wrong shape.
    """
    from safetensors.torch import save_file

    expected = _build_encoder(tensors, code_sizes, image_size, source).state_dict()
    metadata = {
        "format": "facesnap-deca",
        "version": str(VERSION),
        "source": source,
        "code_sizes": json.dumps(dict(code_sizes)),
        "image_size": str(image_size),
    }
    save_file({key: tensors[key].contiguous() for key in expected}, path, metadata)


def convert_deca(source: Path, destination: Path) -> None:
    """Extract the coarse encoder from DECA's `deca_model.tar` (a torch checkpoint, despite the name).

    Raises:
        FaceSnapError: `read_torch` rejects the file, or it contains no coarse encoder of the published size.
    """
    encoder = read_torch(source).get("E_flame")
    if not isinstance(encoder, Mapping) or not all(isinstance(value, Tensor) for value in encoder.values()):
        raise FaceSnapError(f"{source.name} does not contain a DECA encoder (E_flame); use DECA's deca_model.tar.")
    save_deca(destination, encoder, source.name)


def _build_encoder(tensors: Mapping[str, Tensor], code_sizes: Mapping[str, int], image_size: int, name: str) -> Deca:
    """Return an encoder on the meta device whose tensors have the same shapes as the given tensors."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            deca = Deca(shapes, code_sizes, image_size)
    except KeyError as error:
        raise FaceSnapError(
            f"{name} is not a complete DECA encoder: {error.args[0]} is missing; download the file again."
        ) from error
    except ValueError as error:
        raise FaceSnapError(f"{name} is not a valid DECA encoder ({error}); download the file again.") from error
    if wrong := [key for key, tensor in deca.state_dict().items() if shapes.get(key) != tuple(tensor.shape)]:
        raise FaceSnapError(
            f"{name} is not a complete DECA encoder: {wrong[0]} is missing or has the wrong shape; "
            "download the file again."
        )
    outputs, expected = shapes["layers.2.weight"][0], sum(code_sizes.values())
    if outputs != expected:
        raise FaceSnapError(
            f"{name} is a DECA encoder with {outputs} codes, but {expected} are expected; "
            "use the published deca_model.tar."
        )
    return deca
