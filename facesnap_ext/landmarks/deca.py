"""DECA's coarse encoder: from the photo of a face to FLAME's codes and a camera.

Source: Feng, Feng, Black, Bolkart, "Learning an animatable detailed 3D face model from in-the-wild images" (2021),
https://github.com/YadiraF/DECA. A ResNet-50 and two linear layers read a square crop; the numbers that come out are
split, in this order, into shape, texture, expression, pose (global and jaw rotation vectors), camera and light.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import read_index, read_tensors
from facesnap_ext.weights.unpickle import read_torch

VERSION = 1
CODE_SIZES = {"shape": 100, "tex": 50, "exp": 50, "pose": 6, "cam": 3, "light": 27}  # of the published DECA
IMAGE_SIZE = 224
BOX_SCALE = 1.25  # the crop's side over the face's size
BOX_DROP = 0.12  # how far below a detector box's centre the crop's centre is, in sizes


class Bottleneck(nn.Module):
    """ResNet's block of a 1×1, a strided 3×3 and a 1×1 convolution (torchvision's key names)."""

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
    """A ResNet of bottleneck blocks without its classifier; widths and depths are read from the tensors' shapes.

    Args:
        shapes: shapes of a state dict with torchvision's key names.
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
        """[N,3,S,S] -> [N,features], averaged over the picture."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for level in range(1, 5):
            x = self.get_submodule(f"layer{level}")(x)
        return x.mean(dim=(2, 3))


class Deca(nn.Module):
    """DECA's `E_flame`, with its key names (`encoder.…`, `layers.0`, `layers.2`).

    Args:
        shapes: shapes of its state dict.
        code_sizes: how many numbers each code has, in the order of the output.
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
        """
        Args:
            crops: [N,3,S,S] RGB in 0…1 (`crop_face`).

        Returns:
            The codes by name, each [N,size]: `shape` and `exp` in standard deviations, `pose` in radians, `cam` as
            scale and translation (`project`), `tex`, `light`.
        """
        codes = self.layers(self.encoder(crops))
        return dict(zip(self.code_sizes, codes.split(list(self.code_sizes.values()), dim=1)))


def crop_transform(box: np.ndarray, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """The similarity transform from a photo to DECA's crop, for the box of a face detector.

    The crop's side is 1.25 times the mean of the box's sides, in whole pixels; its centre lies 0.12 means lower.

    Args:
        box: [4] left, top, right, bottom in pixels.

    Returns:
        [3,3] from pixel indices of the photo to those of the crop (a pixel's centre has whole numbers).
    """
    left, top, right, bottom = (float(edge) for edge in box)
    size = (right - left + bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2 + BOX_DROP * size
    side = max(int(size * BOX_SCALE), 1)
    scale = (image_size - 1) / side
    return np.array([[scale, 0, scale * (side / 2 - x)], [0, scale, scale * (side / 2 - y)], [0, 0, 1]])


def crop_face(photo: np.ndarray, transform: np.ndarray, image_size: int = IMAGE_SIZE) -> Tensor:
    """Cut DECA's crop out of a photo: bilinear, black beyond the photo's edges.

    Args:
        photo: [H,W,3] uint8 RGB.
        transform: from `crop_transform`.

    Returns:
        [3,S,S] float32 in 0…1.
    """
    from skimage.transform import SimilarityTransform, warp

    # only the window that the crop reads is turned into floats; a margin of 2 pixels serves the interpolation
    corners = to_photo_indices(np.array([[0, 0], [image_size - 1, image_size - 1]]), transform)
    height, width = photo.shape[:2]
    left, top = np.clip(np.floor(corners[0]) - 2, 0, [width - 1, height - 1]).astype(int)
    right, bottom = np.clip(np.ceil(corners[1]) + 3, [left + 1, top + 1], [width, height]).astype(int)
    window = photo[top:bottom, left:right].astype(np.float32) / 255
    into_window = SimilarityTransform(translation=(-left, -top)).params @ np.linalg.inv(transform)
    crop = warp(window, SimilarityTransform(matrix=into_window), output_shape=(image_size, image_size))
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1), dtype=np.float32))


def project(points: Tensor, cam: Tensor) -> Tensor:
    """DECA's orthographic camera: p = s·(X_xy + t), then the y axis is turned to point down.

    Args:
        points: [N,P,3] in FLAME's metres; their depth is not used.
        cam: [N,3] scale s and translation t.

    Returns:
        [N,P,2] in the crop, from -1 to 1.
    """
    flat = cam[:, None, :1] * (points[..., :2] + cam[:, None, 1:])
    return flat * flat.new_tensor([1.0, -1.0])


def to_photo(points: np.ndarray, transform: np.ndarray, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Bring projected points back into the photo that the crop was cut from.

    Args:
        points: [P,2] from `project`.
        transform: of the crop.

    Returns:
        [P,2] pixels from the photo's upper left corner.
    """
    # DECA's -1 and 1 are the crop's pixel indices 0 and S; a pixel's centre is half a pixel from its corner
    return to_photo_indices((points + 1) * (image_size / 2), transform) + 0.5


def to_photo_indices(indices: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """[P,2] pixel indices of a crop as pixel indices of its photo."""
    inverse = np.linalg.inv(transform)
    return indices @ inverse[:2, :2].T + inverse[:2, 2]


def load_deca(path: Path) -> Deca:
    """Load a converted DECA encoder (`convert_deca`) to the CPU, in evaluation mode and without gradients.

    Raises:
        FaceSnapError: the file is of another kind, of a newer version, or not whole.
    """
    require(path, Kind.DECA, "convert deca_model.tar once with `facesnap convert`.")
    metadata = read_index(path).metadata
    if int(metadata.get("version", VERSION)) > VERSION:
        raise FaceSnapError(f"{path.name} was written by a newer FaceSnap; update the extension.")
    try:
        code_sizes, image_size = json.loads(metadata["code_sizes"]), int(metadata["image_size"])
    except (KeyError, ValueError) as error:
        raise FaceSnapError(
            f"The metadata of {path.name} is damaged ({error}); convert deca_model.tar again."
        ) from error
    tensors = read_tensors(path)
    deca = _build(tensors, code_sizes, image_size, path.name)
    deca.load_state_dict(tensors, assign=True)
    return deca.float().eval().requires_grad_(False)  # files may be in half precision, photos are not


def save_deca(
    path: Path,
    tensors: Mapping[str, Tensor],
    source: str,
    code_sizes: Mapping[str, int] = CODE_SIZES,
    image_size: int = IMAGE_SIZE,
) -> None:
    """Write the tensors of a `Deca` as a converted file; `source` says in its metadata where they come from."""
    from safetensors.torch import save_file

    wanted = _build(tensors, code_sizes, image_size, source).state_dict()
    metadata = {
        "format": "facesnap-deca",
        "version": str(VERSION),
        "source": source,
        "code_sizes": json.dumps(dict(code_sizes)),
        "image_size": str(image_size),
    }
    save_file({key: tensors[key].contiguous() for key in wanted}, path, metadata)


def convert_deca(source: Path, destination: Path) -> None:
    """Convert DECA's `deca_model.tar` (a torch file, in spite of its name) to the tensors of its coarse encoder.

    Raises:
        FaceSnapError: the file is refused (`read_torch`), or holds no coarse encoder of DECA's published sizes.
    """
    encoder = read_torch(source).get("E_flame")
    if not isinstance(encoder, Mapping) or not all(isinstance(value, Tensor) for value in encoder.values()):
        raise FaceSnapError(f"{source.name} holds no DECA encoder (E_flame); give DECA's deca_model.tar.")
    save_deca(destination, encoder, source.name)


def _build(tensors: Mapping[str, Tensor], code_sizes: Mapping[str, int], image_size: int, name: str) -> Deca:
    """An encoder on the meta device that fits the tensors."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            deca = Deca(shapes, code_sizes, image_size)
    except (KeyError, ValueError) as error:
        raise FaceSnapError(f"{name} is no whole DECA encoder ({error} is missing); get the file again.") from error
    if wrong := [key for key, tensor in deca.state_dict().items() if shapes.get(key) != tuple(tensor.shape)]:
        raise FaceSnapError(f"{name} is no whole DECA encoder: {wrong[0]} is missing or misshapen; get the file again.")
    if (outputs := deca.layers[2].out_features) != sum(code_sizes.values()):
        raise FaceSnapError(
            f"{name} is a DECA encoder of {outputs} codes where {sum(code_sizes.values())} are expected; "
            "use the published deca_model.tar."
        )
    return deca
