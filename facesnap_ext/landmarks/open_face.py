"""The open face model: 72 points of one person's face in the pose and expression of another, without DECA and FLAME.

A face is a linear function of a shape b and an expression e, and a photo sees it through a scaled orthographic camera:

    P(b, e) = mean + shape·b + expression·e + residual
    pixel   = s · (R P)_xy + t,   with y turned to point down

`fit` finds one shape for all photos of a person, and scale s, rotation R, shift t and expression e for each photo, from
72 points per photo. It minimises the robust squared errors of the points under the priors b ~ N(0, 1) and
e ~ N(0, spread) by Gauss-Newton. Only x and y of the points are used.

The basis is `open_face.safetensors`, whose metadata names its source and licence: figures derived from USC's ICT Face
Model Light (MIT). The unit of length is the height of the mean face from brows to chin. Axes are those of `poses.Rig`:
x to the image's right, y up, z towards the viewer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from facesnap_ext.landmarks.points72 import LEFT_EYE, RIGHT_EYE
from facesnap_ext.landmarks.poses import Rig, make_rig

PATH = Path(__file__).with_name("open_face.safetensors")
NOISE = 0.03  # expected error of a point in x and in y, relative to the distance between the eyes
HUBER = 2.5  # errors beyond this multiple of the noise count linearly instead of squared
KEPT = 0.3  # fraction of the part of a face that no shape spans that is kept: the rest is mostly noise of the points
STEPS = (
    4  # of Gauss-Newton: further ones move the points by less than 0.03 % of the distance between the eyes at 3 % noise
)
MIN_SCALE = 1.0  # pixels: height of the smallest face; below, points differ by rounding errors only
MAX_ZOOM_STEP = 0.3  # largest change of log(scale) in one step
CAMERA = 6  # parameters of a photo besides the expression: 3 of rotation, 2 of shift, 1 of scale


class FitError(ValueError):
    """The points are not those of a face: they coincide, lie on a line, or are not finite."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The linear face model with K shapes and M expressions; float64.

    Attributes:
        mean: [72,3] the neutral mean face.
        shape: [72,3,K] displacements for one standard deviation; each is symmetric.
        expression: [72,3,M] displacements for the full movement that ARKit names.
        names: M names of the expressions, such as "jawOpen".
        spread: [M] prior standard deviation of each expression.
        trust: [72] weight of each point in a fit: contour points lie on other parts of the skin as the head turns.
        mirror: [72] index of each point's twin on the other half of the face.
    """

    mean: np.ndarray
    shape: np.ndarray
    expression: np.ndarray
    names: tuple[str, ...]
    spread: np.ndarray
    trust: np.ndarray
    mirror: np.ndarray

    @cached_property
    def eye_distance(self) -> float:
        """Distance between the centres of the mean face's eyes."""
        return float(np.linalg.norm(self.mean[LEFT_EYE].mean(0) - self.mean[RIGHT_EYE].mean(0)))

    @cached_property
    def directions(self) -> np.ndarray:
        """[3,72·(K+M)] all displacements, shapes first, so that one product with a rotation turns them."""
        both = np.concatenate([self.shape, self.expression], axis=2)
        return np.ascontiguousarray(both.transpose(1, 0, 2).reshape(3, -1))


@dataclass(frozen=True, eq=False)
class OpenShape:
    """A person's shape.

    Attributes:
        modes: [K] float64 standard deviations.
        residual: [72,3] float64 symmetric displacements that the modes do not span, in face heights.
    """

    modes: np.ndarray
    residual: np.ndarray


@dataclass(frozen=True, eq=False)
class OpenPose:
    """What a photo shows of a face besides its shape.

    Attributes:
        scale: pixels per face height.
        rotation: [3,3] float64 from the face's axes to the photo's, which has y up and z towards the viewer.
        shift: [2] float64 pixels: where the origin of the basis lies, x to the right and y down.
        expression: [M] float64 amounts of the movements in `Basis.names`.
        error: root mean square distance of the photo's points from the fitted face, relative to the distance between
            the eyes; weighted by `Basis.trust`.
    """

    scale: float
    rotation: np.ndarray
    shift: np.ndarray
    expression: np.ndarray
    error: float


@lru_cache(maxsize=8)
def load_basis(points: str = "1k3d68") -> Basis:
    """Load the basis with the mean face of one kind of points.

    Detectors place their points differently. With a mean face other than the detector's own, the systematic difference
    would be taken for the person's shape.

    Args:
        points: "1k3d68" for insightface's 68 landmarks, "mediapipe" for those of MediaPipe's landmarker, or "ict" for
            points on ICT's own mesh.
    """
    from safetensors.numpy import load_file

    tensors = load_file(PATH)
    figures = {name: tensors[name].astype(np.float64) for name in ("shape", "expression", "spread", "trust")}
    names = tuple(json.loads(_metadata()["expressions"]))
    mean = tensors[f"mean.{points}"].astype(np.float64)
    return Basis(mean=mean, **figures, names=names, mirror=tensors["mirror"].astype(int))


def basis_version() -> str:
    """Return the version of the shapes. A shape fitted with one version means a different face in another version."""
    return _metadata()["version"]


@lru_cache(maxsize=1)
def _metadata() -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(PATH, "np") as file:
        return dict(file.metadata())


def fit(
    basis: Basis, photos: Sequence[np.ndarray], noise: float = NOISE, steps: int = STEPS
) -> tuple[OpenShape, list[OpenPose]]:
    """Fit one person to any number of photos.

    Args:
        photos: for each photo the 72 points [72,≥2] in pixels, x to the right and y down; further columns are ignored.
        noise: see `NOISE`.
        steps: iterations of Gauss-Newton.

    Returns:
        The person's shape, and what each photo shows besides it.

    Raises:
        FitError: the points of a photo do not form a face.
    """
    points = [np.asarray(photo, np.float64)[:, :2] * (1.0, -1.0) for photo in photos]  # y up
    fitted = [_start(basis, one) for one in points]
    shape = np.zeros(basis.shape.shape[2])
    for _ in range(steps):
        shape = _step(basis, points, shape, fitted, noise)
    if not all(np.isfinite(one.values()).all() for one in fitted) or not np.isfinite(shape).all():
        raise FitError("the points do not form a face")
    residual = np.mean([_unexplained(basis, one, shape, photo)[1] for one, photo in zip(points, fitted)], axis=0)
    residual = KEPT / 2 * (residual + residual[basis.mirror] * (-1, 1, 1))
    poses = [photo.pose(_error(basis, one, shape, photo)) for one, photo in zip(points, fitted)]
    return OpenShape(shape, residual), poses


def face_points(basis: Basis, shape: OpenShape | None = None, expression: np.ndarray | None = None) -> np.ndarray:
    """Return the 72 points of a face: [72,3] face heights, in the axes of the basis.

    Args:
        shape: None for the mean face.
        expression: [M] amounts of the movements in `Basis.names`; None for the neutral face.
    """
    points = basis.mean if shape is None else basis.mean + basis.shape @ shape.modes + shape.residual
    return points if expression is None else points + basis.expression @ expression


def predict(basis: Basis, shape: OpenShape | None, pose: OpenPose) -> np.ndarray:
    """Return the points of a face of this shape in a photo's pose and expression: [72,2] float64 pixels of the photo.

    Args:
        shape: None for the mean face.
    """
    turned = face_points(basis, shape, pose.expression) @ pose.rotation[:2].T
    return pose.scale * turned * (1, -1) + pose.shift


def open_face_rig(basis: Basis, shape: OpenShape | None = None) -> Rig:
    """Derive a person's rig, whose mouth is opened by the expression "jawOpen".

    Args:
        shape: None for the mean face.
    """
    rest = face_points(basis, shape)
    return make_rig(rest, rest + basis.expression[..., basis.names.index("jawOpen")])


@dataclass
class _Photo:
    """The present estimate of a photo's parameters, with y up; see `OpenPose`."""

    scale: float
    rotation: np.ndarray
    shift: np.ndarray
    expression: np.ndarray

    def values(self) -> np.ndarray:
        return np.concatenate([[self.scale], self.rotation.ravel(), self.shift, self.expression])

    def pose(self, error: float) -> OpenPose:
        return OpenPose(self.scale, self.rotation, self.shift * (1, -1), self.expression, error)


def _start(basis: Basis, points: np.ndarray) -> _Photo:
    """Return the pose in which the mean face comes closest to the points, in the sense of an affine camera."""
    weights = basis.trust / basis.trust.sum()
    face_centre, centre = weights @ basis.mean, weights @ points
    root = np.sqrt(weights)[:, None]
    if not np.isfinite(points).all():
        raise FitError("the points are not finite")
    affine = np.linalg.lstsq((basis.mean - face_centre) * root, (points - centre) * root, rcond=None)[0].T  # [2,3]
    left, sizes, right = np.linalg.svd(affine, full_matrices=False)
    scale = float(sizes.mean())
    if not (scale > MIN_SCALE and sizes[1] > 1e-3 * sizes[0]):
        raise FitError("the points coincide or lie on a line")
    rows = left @ right
    rotation = np.vstack([rows, np.cross(*rows)])
    return _Photo(scale, rotation, centre - scale * rows @ face_centre, np.zeros(len(basis.names)))


def _step(
    basis: Basis, points: Sequence[np.ndarray], shape: np.ndarray, fitted: list[_Photo], noise: float
) -> np.ndarray:
    """Improve all photos in place by one step of Gauss-Newton, and return the improved shape.

    The normal equations couple photos only through the shape. Each photo's own parameters are therefore eliminated
    first (Schur complement), which makes the cost linear in the number of photos.
    """
    size = len(shape)
    matrix, vector = np.eye(size), -shape  # of the prior
    eliminated = []
    for one, photo in zip(points, fitted):
        jacobian, errors, weights = _linearise(basis, one, shape, photo, noise)
        weighted = jacobian * weights[:, None]
        normal, gradient = weighted.T @ jacobian, weighted.T @ errors
        own, coupling = normal[size:, size:], normal[:size, size:]
        prior = np.concatenate([1 / basis.spread**2, np.full(CAMERA, 1e-9)])
        own[np.diag_indices_from(own)] += prior
        own_gradient = gradient[size:]
        own_gradient[: len(photo.expression)] -= photo.expression * prior[: len(photo.expression)]
        solved = np.linalg.solve(own, np.column_stack([coupling.T, own_gradient]))
        matrix = matrix + normal[:size, :size] - coupling @ solved[:, :-1]
        vector = vector + gradient[:size] - coupling @ solved[:, -1]
        eliminated.append(solved)
    change = np.linalg.solve(matrix, vector)
    for photo, solved in zip(fitted, eliminated):
        _move(photo, solved[:, -1] - solved[:, :-1] @ change)
    return shape + change


def _linearise(
    basis: Basis, points: np.ndarray, shape: np.ndarray, photo: _Photo, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a photo's Jacobian [144,K+M+6], errors [144] and weights [144]: first x of all points, then y.

    Errors are in multiples of the noise. The columns are the shapes, the expressions, small rotations about x, y and z,
    the shift in face heights, and the logarithm of the scale.
    """
    turned, missing = _unexplained(basis, points, shape, photo)[::2]
    unit = noise * basis.eye_distance
    lengths = np.linalg.norm(missing, axis=1) / unit
    weights = basis.trust * np.minimum(1, HUBER / np.maximum(lengths, 1e-9))
    jacobian = np.zeros((2, len(points), basis.directions.shape[1] // len(points) + CAMERA))
    jacobian[..., :-CAMERA] = (photo.rotation[:2] @ basis.directions).reshape(2, len(points), -1)
    rotate, shift, zoom = jacobian[..., -6:-3], jacobian[..., -3:-1], jacobian[..., -1]
    rotate[0, :, 1], rotate[0, :, 2] = turned[:, 2], -turned[:, 1]
    rotate[1, :, 0], rotate[1, :, 2] = -turned[:, 2], turned[:, 0]
    shift[0, :, 0] = shift[1, :, 1] = 1
    zoom[:] = turned[:, :2].T
    return jacobian.reshape(2 * len(points), -1) / unit, missing.T.ravel() / unit, np.tile(weights, 2)


def _unexplained(
    basis: Basis, points: np.ndarray, shape: np.ndarray, photo: _Photo
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the turned face [72,3], and what the photo's points lack to it: in the face's axes [72,3], where the depth
    that the photo does not show counts as correct, and in the photo's [72,2]; all in face heights."""
    turned = (basis.mean + basis.shape @ shape + basis.expression @ photo.expression) @ photo.rotation.T
    missing = (points - photo.shift) / photo.scale - turned[:, :2]
    return turned, missing @ photo.rotation[:2], missing


def _error(basis: Basis, points: np.ndarray, shape: np.ndarray, photo: _Photo) -> float:
    squares = (_unexplained(basis, points, shape, photo)[2] ** 2).sum(axis=1)
    return float(np.sqrt(np.average(squares, weights=basis.trust))) / basis.eye_distance


def _move(photo: _Photo, change: np.ndarray) -> None:
    """Apply a step [M+6] to a photo's parameters."""
    expression, rotate, shift, zoom = np.split(change, [-6, -3, -1])
    photo.expression = photo.expression + expression
    photo.rotation = _rotation(rotate) @ photo.rotation
    photo.shift = photo.shift + photo.scale * shift
    photo.scale *= float(np.exp(np.clip(zoom[0], -MAX_ZOOM_STEP, MAX_ZOOM_STEP)))


def _rotation(vector: np.ndarray) -> np.ndarray:
    """Return the rotation matrix of a rotation vector [3] in radians (Rodrigues' formula)."""
    x, y, z = vector
    angle = np.linalg.norm(vector)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotated: np.ndarray = (
        np.eye(3) + np.sinc(angle / np.pi) * cross + np.sinc(angle / 2 / np.pi) ** 2 / 2 * cross @ cross
    )
    return rotated
