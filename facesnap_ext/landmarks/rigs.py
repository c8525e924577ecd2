"""Rigs: a person's neutral face with the displacements of every movement, from FLAME or the open face model.

The displacements are those of the open face model, in face heights, so every rig has all of them. FLAME opens the mouth
with its own jaw joint. Lids are displaced by fractions of the opening of the person's own eyes, so that they meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.flame import JAW, NOT_FINITE, Flame, posed_vertices
from facesnap_ext.landmarks.movements import LIDS, MOVEMENTS, Modes
from facesnap_ext.landmarks.open_face import Basis, OpenShape, face_points, load_basis
from facesnap_ext.landmarks.points72 import POLYLINES, points_on
from facesnap_ext.landmarks.poses import Rig

JAW_OPEN = 0.35  # rotation of FLAME's jaw joint at mouth 1, in radians
LIDS_MEET = 0.15  # height at which closing lids meet, above the lower lid, relative to the opening of the eye
LIDS_WIDEN = (0.5, 0.1)  # rise of the upper and drop of the lower lid at amount 1, relative to the opening of the eye
DECIMALS = 7  # of a rig's figures, so that the page receives the same ones in few characters


def flame_rig(flame: Flame, shape: Tensor | None = None) -> Rig:
    """Derive a person's rig from FLAME.

    Args:
        flame: the head model.
        shape: [S] shape code of the person in standard deviations, from DECA; None for FLAME's mean face.

    Raises:
        FaceSnapError: the face is not made of finite numbers.
    """
    shape = flame.v_template.new_zeros(1) if shape is None else shape
    neutral, open_jaw = flame.v_template.new_zeros(2, 1, len(flame.parents), 3)
    open_jaw[0, JAW, 0] = JAW_OPEN
    with torch.no_grad():
        vertices = [posed_vertices(flame, shape[None], shape.new_zeros(1, 0), pose) for pose in (neutral, open_jaw)]
        rest, opened = points_on(torch.cat(vertices), flame.faces).double().cpu().numpy()
    basis = load_basis("ict")  # its points are on a mesh, as FLAME's are, so their heights correspond
    scale = np.ptp(rest[:, 1]) / np.ptp(basis.mean[:, 1])
    fields = {name: scale * one for name, one in movement_fields(basis).items()}
    rig = make_rig(rest, {**fields, "mouth": (opened - rest)[None]})
    if not all(np.isfinite(points).all() for points in (rig.rest, *rig.directions.values())):
        raise FaceSnapError(NOT_FINITE)
    return rig


def open_face_rig(basis: Basis, shape: OpenShape | None = None) -> Rig:
    """Derive a person's rig from the open face model.

    Args:
        shape: None for the mean face.
    """
    return make_rig(face_points(basis, shape), movement_fields(basis))


def make_rig(rest: np.ndarray, fields: Mapping[str, np.ndarray]) -> Rig:
    """Derive a rig from a neutral face.

    Args:
        rest: [72,3] points of the face, in any unit; x to the image's right, y up, z towards the viewer.
        fields: the displacements of each movement but the lids in the same unit; see `Rig.directions`.
    """
    low, high = rest.min(axis=0), rest.max(axis=0)
    height = high[1] - low[1]
    rest = (rest - (low + high) / 2) / height
    lids = {name: _lid_directions(rest, eye) for name, eye in LIDS.items()}
    directions = {name: lids[name] if name in lids else fields[name] / height for name in MOVEMENTS}
    return Rig(rest.round(DECIMALS), {name: direction.round(DECIMALS) for name, direction in directions.items()})


@lru_cache(maxsize=8)
def movement_fields(basis: Basis) -> Mapping[str, np.ndarray]:
    """Return the displacements of each movement but the lids, in the unit of the basis; see `Rig.directions`."""

    def total(modes: Modes) -> np.ndarray:
        displacement: np.ndarray = sum(
            (amount * basis.expression[..., basis.names.index(name)] for name, amount in modes.items()),
            np.zeros_like(basis.mean),
        )
        return displacement

    return {
        name: np.stack([total(modes) for modes in (slider.positive, slider.negative) if modes])
        for name, slider in MOVEMENTS.items()
        if name not in LIDS
    }


def _lid_directions(rest: np.ndarray, eye: str) -> np.ndarray:
    """Return the displacements [2,72,3] that widen and that close an eye. The corners of the eye do not move."""
    wide, closed = np.zeros((2, *rest.shape))
    outline = POLYLINES[eye][0]  # from the outer corner to the inner one, which is the fifth point, and back
    for i in (1, 2, 3):
        upper, lower = sorted((outline[i], outline[-1 - i]), key=lambda point: -rest[point, 1])
        opening = rest[upper] - rest[lower]
        closed[upper], closed[lower] = -(1 - LIDS_MEET) * opening, LIDS_MEET * opening
        wide[upper], wide[lower] = LIDS_WIDEN[0] * opening, -LIDS_WIDEN[1] * opening
    return np.stack([wide, closed])
