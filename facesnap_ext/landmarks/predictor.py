"""The Landmark Predictor: 72 points of the source's face in the driving photo's pose and expression.

Source: FaceSnap, section "Face Fidelity Reinforce Network". DECA estimates shape s, pose p and expression e of the
source and of the driving face. FLAME turns [s_source, p_driving, e_driving] into a head mesh, and the driving photo's
camera projects its 72 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.deca import CODE_SIZES, Deca, crop_face, crop_transform, load_deca, project, to_photo
from facesnap_ext.landmarks.flame import NOT_FINITE, Flame, full_pose, load_flame, posed_vertices, rotation_matrices
from facesnap_ext.landmarks.neutral import NeutralFace
from facesnap_ext.landmarks.points72 import TRIANGLES, Landmarks, points_on
from facesnap_ext.weights.flame_release import unfit_for_deca
from facesnap_ext.weights.tensors import is_finite

MAX_COORDINATE = 1e6  # pixels; heads lie in the photo or near it


@dataclass(frozen=True)
class FaceCodes:
    """DECA's codes of one face in a photo; float32 on the CPU."""

    shape: Tensor  # [S] standard deviations
    expression: Tensor  # [E] standard deviations
    pose: Tensor  # [6] global and jaw rotation vectors in radians
    cam: Tensor  # [3] scale and translation; see `deca.project`
    transform: np.ndarray  # [3,3] from pixel indices of the photo to pixel indices of the crop
    width: int  # width of the photo in pixels
    height: int  # height of the photo in pixels


@dataclass(frozen=True)
class LandmarkPredictor:
    """DECA and FLAME on the same device."""

    deca: Deca
    flame: Flame
    device: torch.device

    def encode(self, photo: np.ndarray, box: np.ndarray, angle: float = 0.0) -> FaceCodes:
        """Return the codes of a face.

        Args:
            photo: [H,W,3] uint8 RGB.
            box: [4] left, top, right, bottom of the detected face in pixels.

        Raises:
            FaceSnapError: they are not finite numbers.
            angle: see `crop_transform`.
        """
        return self.encode_batch([photo], [box], [angle])[0]

    @torch.no_grad()
    def encode_batch(
        self, photos: Sequence[np.ndarray], boxes: Sequence[np.ndarray], angles: Sequence[float] | None = None
    ) -> list[FaceCodes]:
        """Return the codes of one face per photo, in a single forward pass. Arguments as in `encode`."""
        size = self.deca.image_size
        transforms = [crop_transform(box, size, angle) for box, angle in zip(boxes, angles or [0.0] * len(boxes))]
        crops = torch.stack([crop_face(photo, transform, size) for photo, transform in zip(photos, transforms)])
        codes = {name: code.cpu() for name, code in self.deca(crops.to(self.device)).items()}
        if not all(is_finite(code) for code in codes.values()):
            raise FaceSnapError(
                "DECA computes codes that are not finite, so its file is damaged; convert deca_model.tar again."
            )
        return [
            FaceCodes(
                shape=codes["shape"][i],
                expression=codes["exp"][i],
                pose=codes["pose"][i],
                cam=codes["cam"][i],
                transform=transform,
                width=photo.shape[1],
                height=photo.shape[0],
            )
            for i, (photo, transform) in enumerate(zip(photos, transforms))
        ]

    def neutral(self, shape: Tensor) -> FaceCodes:
        """Return codes for a face with a known shape only, for use as the source of `predict`.

        Expression, pose and camera are zero, and there is no photo.

        Args:
            shape: [S] standard deviations.
        """
        sizes, side = self.deca.code_sizes, self.deca.image_size
        expression, pose, cam = (torch.zeros(sizes[code]) for code in ("exp", "pose", "cam"))
        return FaceCodes(shape, expression, pose, cam, np.eye(3), side, side)

    def predict(self, source: FaceCodes, driving: FaceCodes) -> Landmarks:
        """Combine the source's shape with the driving face's pose, expression and camera.

        `predict(source, source)` returns the source's own landmarks.

        Returns:
            72 points in pixels of the driving photo.

        Raises:
            FaceSnapError: they are not finite numbers.
        """
        return self.predict_head(source, driving)[0]

    @torch.no_grad()
    def predict_head(self, source: FaceCodes, driving: FaceCodes) -> tuple[Landmarks, np.ndarray]:
        """Return the landmarks of `predict` and all vertices of the head, [V,2] float32 pixels of the driving photo."""
        shape, expression, pose, cam = (
            code[None].to(self.device) for code in (source.shape, driving.expression, driving.pose, driving.cam)
        )
        vertices = posed_vertices(self.flame, shape, expression, full_pose(self.flame, pose))
        in_photo = [
            to_photo(project(points, cam)[0].double().cpu().numpy(), driving.transform, self.deca.image_size)
            for points in (points_on(vertices, self.flame.faces), vertices)
        ]
        points, head = (points.astype(np.float32) for points in in_photo)
        if not all((np.abs(values) < MAX_COORDINATE).all() for values in (points, head)):  # NaN is not below
            raise FaceSnapError(NOT_FINITE)
        return Landmarks(points, driving.width, driving.height), head

    @torch.no_grad()
    def neutral_face(self, source: FaceCodes, driving: FaceCodes) -> NeutralFace:
        """Return the source's neutral face in the driving face's pose, in pixels of the driving photo.

        The driving face's expression takes part in placing the joint about which FLAME turns the head. The neutral face
        stays there, so that with this expression it has the points of `predict`.
        """
        rotation = rotation_matrices(driving.pose[None, None, :3])[0, 0, :2].double().numpy()
        scale = float(driving.cam[0]) * self.deca.image_size / 2
        to_photo_pixels = np.linalg.inv(driving.transform)[:2, :2]
        matrix = scale * to_photo_pixels @ (rotation * [[1], [-1]])  # pixels per metre
        height = float(np.ptp(self._head_points(source, source, neutral=True)[:, 1]))
        landmarks, matrix = self.predict(source, driving), height * matrix
        points = landmarks.points - self.expression(source, driving) @ matrix.T
        return NeutralFace(replace(landmarks, points=points.astype(np.float32)), matrix)

    @torch.no_grad()
    def expression(self, source: FaceCodes, face: FaceCodes) -> np.ndarray:
        """Return how a face's expression displaces the source's neutral points: [72,3] float64 face heights."""
        neutral, moved = (self._head_points(source, face, neutral=one) for one in (True, False))
        displacement: np.ndarray = (moved - neutral) / np.ptp(neutral[:, 1])
        return displacement

    def _head_points(self, source: FaceCodes, face: FaceCodes, neutral: bool) -> np.ndarray:
        """Return the 72 points of the source's head looking straight ahead, [72,3] float64 metres, with the expression
        of another face or without any."""
        keep = 0.0 if neutral else 1.0
        pose = keep * face.pose
        pose[:3] = 0
        shape, expression, pose = (code[None].to(self.device) for code in (source.shape, keep * face.expression, pose))
        vertices = posed_vertices(self.flame, shape, expression, full_pose(self.flame, pose))
        points: np.ndarray = points_on(vertices, self.flame.faces)[0].double().cpu().numpy()
        return points


def load_predictor(deca_path: Path, flame_path: Path, device: torch.device | str = "cpu") -> LandmarkPredictor:
    """Load a converted DECA file and a converted FLAME file that match each other.

    Raises:
        FaceSnapError: a file is unusable, or the FLAME model is from a release that DECA's codes do not fit, has a
            different topology, or has fewer directions than DECA has codes.
    """
    if unfit := unfit_for_deca(flame_path):
        raise FaceSnapError(unfit)
    deca, flame = load_deca(deca_path), load_head(flame_path)
    if any(deca.code_sizes[code] != CODE_SIZES[code] for code in ("pose", "cam")):
        raise FaceSnapError(
            f"{deca_path.name} has different codes for pose and camera from the published DECA; convert deca_model.tar."
        )
    for code, directions in (("shape", flame.shapedirs), ("exp", flame.expressiondirs)):
        if deca.code_sizes[code] > directions.shape[-1]:
            raise FaceSnapError(
                f"{flame_path.name} has {directions.shape[-1]} {code} directions, but {deca_path.name} requires "
                f"{deca.code_sizes[code]}; convert the full FLAME model."
            )
    return LandmarkPredictor(deca.to(device), flame.to(device), torch.device(device))


def load_head(path: Path) -> Flame:
    """Load a converted FLAME file whose mesh carries the 72 points, onto the CPU.

    Raises:
        FaceSnapError: the file is unusable, or the model has a different topology.
    """
    flame = load_flame(path)
    if len(flame.faces) != TRIANGLES:
        raise FaceSnapError(
            f"{path.name} has {len(flame.faces)} triangles, but the 72 points require FLAME's {TRIANGLES}; "
            "convert FLAME's generic_model.pkl."
        )
    return flame
