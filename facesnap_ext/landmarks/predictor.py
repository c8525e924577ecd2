"""The Landmark Predictor: the source's face in the driving photo's pose and expression, as 72 points.

Source: FaceSnap, "Face Fidelity Reinforce Network": with [s, p, e] the shape, pose and expression that DECA finds in
the source and the driving photo, FLAME turns [s_source, p_driving, e_driving] into a head, and the driving photo's
camera projects its 72 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.deca import Deca, crop_face, crop_transform, load_deca, project, to_photo
from facesnap_ext.landmarks.flame import Flame, full_pose, load_flame, posed_vertices
from facesnap_ext.landmarks.points72 import TRIANGLES, Landmarks, points_on


@dataclass(frozen=True)
class FaceCodes:
    """What DECA sees in one face of one photo; float32 on the CPU."""

    shape: Tensor  # [S] standard deviations
    expression: Tensor  # [E] standard deviations
    pose: Tensor  # [6] radians: global and jaw rotation vectors
    cam: Tensor  # [3] scale and translation, see `deca.project`
    transform: np.ndarray  # [3,3] from the photo's pixel indices to the crop's
    width: int  # of the photo
    height: int


@dataclass(frozen=True)
class LandmarkPredictor:
    """DECA and FLAME, on one device."""

    deca: Deca
    flame: Flame
    device: torch.device

    def encode(self, photo: np.ndarray, box: np.ndarray) -> FaceCodes:
        """The codes of a face.

        Args:
            photo: [H,W,3] uint8 RGB.
            box: [4] left, top, right, bottom of the face from a detector, in pixels.
        """
        return self.encode_batch([photo], [box])[0]

    @torch.no_grad()
    def encode_batch(self, photos: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[FaceCodes]:
        """The codes of one face in each photo, in one pass of the network."""
        size = self.deca.image_size
        transforms = [crop_transform(box, size) for box in boxes]
        crops = torch.stack([crop_face(photo, move, size) for photo, move in zip(photos, transforms)])
        codes = {name: code.cpu() for name, code in self.deca(crops.to(self.device)).items()}
        return [
            FaceCodes(
                codes["shape"][i],
                codes["exp"][i],
                codes["pose"][i],
                codes["cam"][i],
                move,
                photo.shape[1],
                photo.shape[0],
            )
            for i, (photo, move) in enumerate(zip(photos, transforms))
        ]

    def neutral(self, shape: Tensor) -> FaceCodes:
        """Codes of a face of which the shape alone is known, [S] standard deviations: a source for `predict`, which is
        in no photo and has no expression, pose or camera of its own."""
        sizes, side = self.deca.code_sizes, self.deca.image_size
        expression, pose, cam = (torch.zeros(sizes[code]) for code in ("exp", "pose", "cam"))
        return FaceCodes(shape, expression, pose, cam, np.eye(3), side, side)

    def predict(self, source: FaceCodes, driving: FaceCodes) -> Landmarks:
        """The source's shape with the driving photo's pose, expression and camera.

        `predict(source, source)` gives the source photo's own landmarks.

        Returns:
            Landmarks in the driving photo's pixels.
        """
        return self.predict_head(source, driving)[0]

    @torch.no_grad()
    def predict_head(self, source: FaceCodes, driving: FaceCodes) -> tuple[Landmarks, np.ndarray]:
        """`predict`, and where all of the head's vertices are, [V,2] float32 in the driving photo's pixels."""
        shape, expression, pose, cam = (
            code[None].to(self.device) for code in (source.shape, driving.expression, driving.pose, driving.cam)
        )
        vertices = posed_vertices(self.flame, shape, expression, full_pose(self.flame, pose))
        in_photo = [
            to_photo(project(points, cam)[0].double().cpu().numpy(), driving.transform, self.deca.image_size)
            for points in (points_on(vertices, self.flame.faces), vertices)
        ]
        points, head = (points.astype(np.float32) for points in in_photo)
        return Landmarks(points, driving.width, driving.height), head


def load_predictor(deca_path: Path, flame_path: Path, device: torch.device | str = "cpu") -> LandmarkPredictor:
    """Load converted DECA and FLAME files that belong together.

    Raises:
        FaceSnapError: a file cannot be used, or FLAME's is of another topology or has fewer directions than DECA codes.
    """
    deca, flame = load_deca(deca_path), load_flame(flame_path)
    if len(flame.faces) != TRIANGLES:
        raise FaceSnapError(
            f"{flame_path.name} has {len(flame.faces)} triangles where the 72 points need FLAME's {TRIANGLES}; "
            "convert FLAME's generic_model.pkl."
        )
    for code, directions in (("shape", flame.shapedirs), ("exp", flame.expressiondirs)):
        if deca.code_sizes[code] > directions.shape[-1]:
            raise FaceSnapError(
                f"{flame_path.name} has {directions.shape[-1]} {code} directions where {deca_path.name} gives "
                f"{deca.code_sizes[code]}; convert the full FLAME model."
            )
    return LandmarkPredictor(deca.to(device), flame.to(device), torch.device(device))
