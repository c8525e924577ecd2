"""A procedural head in FLAME's layout, which replaces FLAME in tests and the demo, since FLAME may not be distributed.

The head shares with FLAME everything that code can depend on: 5023 vertices, 9976 triangles, the indices of the 72
points' triangles, five joints, metres, and the axes. Everything else is invented: an ellipsoid with a nose, a chin and
eye sockets, on which the 72 points lie as on a drawn face. It is not derived from real people. Its first shape and
expression directions are bumps and stretches with plain meanings; the others are smooth random fields.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.landmarks.flame import save_flame
from facesnap_ext.landmarks.points72 import POINT_TRIANGLES, POINT_WEIGHTS, TRIANGLES

VERTICES = 5023
RIM = (
    2 * VERTICES - 2 - TRIANGLES
)  # edges of the hole, which give the mesh FLAME's number of triangles (by Euler's formula)
CENTRE = np.array([0.0, 0.022, -0.030])  # centre of the skull, in metres
RADII = np.array([0.080, 0.128, 0.100])
NECK = np.array([0.0, -0.80, -0.60])  # direction of the hole
CAP = np.radians(155)  # angle that the mesh covers, from the point opposite the hole
MOUTH = -0.038  # height of the line between the lips
MOUTH_HALF = 0.025


def face_layout() -> np.ndarray:
    """Return the points [72,2] of the face seen from the front, x to the image's right and y up, in metres."""
    points = np.zeros((72, 2))
    angle = np.linspace(0, np.pi, 17)
    squareness = 0.85  # below 1 the jaw is squarer than an ellipse
    jaw = np.stack([-0.070 * _signed_power(np.cos(angle), squareness), 0.014 - 0.100 * np.sin(angle) ** 0.95], 1)
    points[[0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 15, 14, 13, 12, 11, 10, 9]] = jaw

    out = np.linspace(1, 0, 5)  # a brow, from its outer end to its inner end
    brow = np.stack([0.014 + 0.042 * out, 0.044 + 0.022 * out * (1 - out) - 0.002 * out], 1)
    points[17:22], points[22:27] = brow * [-1, 1], brow[::-1]

    turn = np.radians([180, 135, 92, 48, 0, -48, -92, -135])  # around an eye from its outer corner, over the top
    eye = np.stack([0.0125 * np.cos(turn), np.where(turn > 0, 0.0056, 0.0046) * np.sin(turn)], 1)
    points[36:44] = np.array([-0.032, 0.024]) + eye
    points[[48, 47, 46, 45, 44, 51, 50, 49]] = eye * (-1, 1) + (0.032, 0.024)

    points[27:31, 1] = np.linspace(0.027, -0.001, 4)
    points[31:36] = np.stack([np.linspace(-0.014, 0.014, 5), -0.014 - np.array([0, 1.5, 3, 1.5, 0]) / 1000], 1)

    points[[52, 54, 53, 62, 58, 59, 57, 65, 66, 71, 69, 68]] = [
        [x * MOUTH_HALF, MOUTH + y]
        for x, y in zip(
            [-1, -0.66, -0.24, 0, 0.24, 0.66, 1, 0.66, 0.28, 0, -0.28, -0.66],
            [0, 0.0052, 0.0080, 0.0070, 0.0080, 0.0052, 0, -0.0066, -0.0098, -0.0105, -0.0098, -0.0066],
        )
    ]
    inner_x, inner_y = np.array([-0.94, -0.45, 0, 0.45, 0.94, 0.45, 0, -0.45]), np.array([0, 8, 10, 8, 0, -8, -10, -8])
    points[[55, 56, 63, 61, 60, 64, 70, 67]] = np.stack([inner_x * MOUTH_HALF, MOUTH + inner_y / 10000], 1)
    return points


def stand_in_flame(
    seed: int = 0, shapes: int = 100, expressions: int = 50, named_shapes: dict[str, list[Bump]] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a `Flame` with V = 5023, F = 9976, J = 5 (float32; indices int64).

    Args:
        seed: seed of the random directions after the named ones, and of the pose correctives.
        shapes, expressions: numbers of directions; the first ones are `SHAPES` and `EXPRESSIONS`.
        named_shapes: shape directions to use in place of `SHAPES`.
    """
    disc, faces = _mesh()
    vertices = _surface(_disc_to_sphere(disc))
    random = np.random.default_rng(seed)
    jaw = _jaw_weight(vertices)
    shapedirs = _directions(vertices, named_shapes or SHAPES, shapes, random)
    expressiondirs = _directions(vertices, EXPRESSIONS, expressions, random)
    root = _sigmoid((-0.115 - vertices[:, 1]) / 0.006)
    weights = np.stack([root, (1 - root) * (1 - jaw), (1 - root) * jaw, 0 * jaw, 0 * jaw], 1)
    joints = np.array([[0, -0.125, -0.040], [0, -0.085, -0.040], [0, -0.012, -0.015], [0.032, 0.024, 0.035]])
    joints = np.vstack([joints, joints[3] * [-1, 1, 1]])
    arrays = {
        "v_template": vertices,
        "shapedirs": shapedirs,
        "expressiondirs": expressiondirs,
        "posedirs": np.stack([0.003 * _random_field(vertices, random) for _ in range(36)], -1),
        "J_regressor": np.stack([_regress(vertices, joint) for joint in joints]),
        "weights": weights,
    }
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    return tensors | {"parents": torch.tensor([-1, 0, 1, 1, 1]), "faces": torch.from_numpy(faces.astype(np.int64))}


def write_stand_in_flame(path: Path, seed: int = 0, shapes: int = 100, expressions: int = 50) -> None:
    """Write `stand_in_flame` as a converted FLAME file."""
    save_flame(path, stand_in_flame(seed, shapes, expressions), f"FaceSnap's procedural stand-in head, seed {seed}")


# Each direction is a sum of (kind, centre, radii, vector). A "push" moves a soft ellipsoid around the centre by the
# vector, a "drop" moves the part of it that hangs on the jaw, a "stretch" scales it about the centre by the vector. A
# centre off the symmetry plane acts on both sides. Vectors are in metres (push, drop) or ratios (stretch) per standard
# deviation.
Bump = tuple[str, tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
SHAPES: dict[str, list[Bump]] = {
    "longer face": [("stretch", (0, 0.02, 0.02), (0.3, 0.3, 0.3), (0, 0.055, 0))],
    "wider face": [("stretch", (0, -0.02, 0), (0.3, 0.15, 0.3), (0.05, 0, 0))],
    "wider jaw": [("stretch", (0, -0.075, 0.02), (0.09, 0.04, 0.09), (0.11, 0, 0))],
    "longer chin": [("push", (0, -0.090, 0.05), (0.035, 0.028, 0.06), (0, -0.005, 0.001))],
    "wide-set eyes": [("push", (0.032, 0.026, 0.05), (0.018, 0.018, 0.05), (0.0024, 0, 0))],
    "large eyes": [("stretch", (0.032, 0.024, 0.05), (0.013, 0.009, 0.05), (0.12, 0.20, 0))],
    "slanted eyes": [("push", (0.045, 0.025, 0.05), (0.009, 0.012, 0.05), (0, 0.0016, 0))],
    "wide nose": [("stretch", (0, -0.012, 0.08), (0.020, 0.012, 0.04), (0.18, 0, 0))],
    "long nose": [("push", (0, -0.010, 0.09), (0.016, 0.012, 0.04), (0, -0.0026, 0.002))],
    "wide mouth": [("stretch", (0, MOUTH, 0.06), (0.030, 0.014, 0.05), (0.11, 0, 0))],
    "full lips": [("stretch", (0, MOUTH, 0.06), (0.025, 0.009, 0.05), (0, 0.28, 0))],
    "low mouth": [("push", (0, MOUTH, 0.06), (0.036, 0.016, 0.05), (0, -0.0022, 0))],
    "high brows": [("push", (0.035, 0.050, 0.06), (0.026, 0.009, 0.05), (0, 0.0022, 0))],
    "deep chin": [("push", (0, -0.080, 0.06), (0.04, 0.03, 0.05), (0, 0, 0.004))],
    "long skull": [("stretch", (0, 0.04, -0.03), (0.3, 0.3, 0.3), (0, 0, 0.06))],
}
EXPRESSIONS: dict[str, list[Bump]] = {
    "mouth open": [("drop", (0, -0.055, 0.06), (0.034, 0.040, 0.06), (0, -0.006, -0.002))],
    "smile": [("push", (0.024, MOUTH, 0.06), (0.011, 0.012, 0.05), (0.0026, 0.0036, -0.002))],
    "brows up": [("push", (0.034, 0.048, 0.06), (0.030, 0.011, 0.05), (0, 0.0044, 0))],
    "frown": [("push", (0.018, 0.046, 0.06), (0.011, 0.010, 0.05), (-0.0022, -0.0034, 0))],
    "eyes closed": [
        ("push", (0.032, 0.0300, 0.05), (0.010, 0.0036, 0.05), (0, -0.0036, 0)),
        ("push", (0.032, 0.0195, 0.05), (0.010, 0.0036, 0.05), (0, 0.0008, 0)),
    ],
    "pout": [("stretch", (0, MOUTH, 0.06), (0.024, 0.012, 0.05), (-0.17, 0.10, 0))],
    "corners down": [("push", (0.025, MOUTH, 0.06), (0.009, 0.010, 0.05), (0, -0.0030, 0))],
    "cheeks up": [("push", (0.042, -0.005, 0.05), (0.016, 0.016, 0.05), (0, 0.0030, 0.002))],
}


def _directions(
    vertices: np.ndarray, named: dict[str, list[Bump]], count: int, random: np.random.Generator
) -> np.ndarray:
    """Return directions [V,3,count]; random ones decay like the tail of a morphable model."""
    directions = [sum(_bump(vertices, *bump) for bump in bumps) for bumps in named.values()][:count]
    for index in range(len(directions), count):
        directions.append(0.0012 * (len(named) / (index + 1)) * _random_field(vertices, random))
    return np.stack(directions, -1)


def _bump(vertices: np.ndarray, kind: str, centre: tuple, radii: tuple, vector: tuple) -> np.ndarray:
    total = np.zeros_like(vertices)
    for side in (1, -1) if centre[0] else (1,):
        mirror = np.array([side, 1, 1])
        away = vertices - centre * mirror
        soft = np.exp(-0.5 * ((away / radii) ** 2).sum(1, keepdims=True))
        if kind == "drop":  # the lips part
            soft = soft * _jaw_weight(vertices)[:, None]
        total += soft * (away * vector if kind == "stretch" else vector * mirror)
    return total


def _random_field(vertices: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a smooth displacement of unit size, symmetric about the middle of the face."""
    waves = random.normal(0, 22, (6, 3))  # radians per metre: no detail finer than an eye
    phases, strengths = random.uniform(0, 2 * np.pi, 6), random.normal(0, 1, (6, 3)) / np.sqrt(3)
    field, twin = (np.cos(points @ waves.T + phases) @ strengths for points in (vertices, vertices * [-1, 1, 1]))
    return (field + twin * [-1, 1, 1]) / 2


def _surface(sphere: np.ndarray) -> np.ndarray:
    """Map directions on the unit sphere to the head's surface [V,3]; the front keeps the ellipsoid's x and y."""
    points = CENTRE + RADII * sphere
    x, y = points[:, 0], points[:, 1]
    front = _sigmoid((sphere[:, 2] - 0.2) / 0.08)

    def bump(height: float, at: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
        return height * np.exp(-0.5 * (((np.abs(x) - at[0]) / radii[0]) ** 2 + ((y - at[1]) / radii[1]) ** 2))

    relief = bump(0.026, (0, -0.090), (0.034, 0.034))  # the lower face protrudes
    relief += np.where(y > -0.002, bump(0.022, (0, -0.002), (0.008, 0.017)), bump(0.022, (0, -0.002), (0.008, 0.011)))
    relief += bump(0.006, (0.011, -0.013), (0.006, 0.006))  # wings of the nose
    relief -= bump(0.012, (0.032, 0.024), (0.016, 0.011))  # eye sockets
    relief += bump(0.003, (0.030, 0.046), (0.024, 0.007))  # brow ridges
    relief += bump(0.008, (0, MOUTH), (0.016, 0.010))  # lips
    relief += bump(0.004, (0, -0.078), (0.012, 0.010))  # chin
    points[:, 2] += front * relief
    neck = _sigmoid((sphere @ NECK - 0.80) / 0.03)  # the edge of the hole hangs down as a neck
    points[:, 1] -= 0.04 * neck
    return points


def _jaw_weight(vertices: np.ndarray) -> np.ndarray:
    """Return the jaw's weight [V]: 1 on chin and lower lip, 0 above the mouth, with a soft edge on the cheeks."""
    x, y, z = vertices.T
    beyond = np.clip((np.abs(x) - 0.7 * MOUTH_HALF) / (1.5 * MOUTH_HALF), 0, 1)
    line = MOUTH + 0.020 * beyond  # the jaw's edge rises towards the ears
    return _sigmoid((line - y) / (0.00025 + 0.010 * beyond)) * _sigmoid((z + 0.005) / 0.008)


def _regress(vertices: np.ndarray, joint: np.ndarray) -> np.ndarray:
    """Return weights [V] of sum 1 that average the vertices to the joint: least squares, preferring near vertices."""
    near = np.exp(-0.5 * (np.linalg.norm(vertices - joint, axis=1) / 0.05) ** 2)
    system = np.vstack([np.ones(len(vertices)), vertices.T])
    return near * (system.T @ np.linalg.solve((system * near) @ system.T, np.append(1, joint)))


def _mesh() -> tuple[np.ndarray, np.ndarray]:
    """Return vertices [5023,2] on the unit disc and triangles [9976,3], with the triangles of the 72 points at their
    indices.

    A small triangle surrounds each point, and an even spiral fills the rest. A Delaunay triangulation of a disc with 68
    vertices on its rim has as many triangles as FLAME's mesh.
    """
    from scipy.spatial import Delaunay

    targets = _front_to_disc(face_layout())
    distance = np.linalg.norm(targets[:, None] - targets, axis=-1) + 9 * np.eye(len(targets))
    sizes = np.minimum(0.2 * distance.min(1), 0.008)
    triangles: dict[int, np.ndarray] = {}
    for point, triangle in enumerate(POINT_TRIANGLES):
        equilateral = sizes[point] * np.stack([np.cos(_THIRDS), np.sin(_THIRDS)], 1)
        triangles.setdefault(int(triangle), targets[point] + equilateral - POINT_WEIGHTS[point] @ equilateral)
    for triangle in triangles:
        points = np.flatnonzero(triangle == POINT_TRIANGLES)
        if len(points) == 2:  # two points share a triangle, which determines its first and last vertex
            chosen, weights = triangles[triangle], POINT_WEIGHTS[points].astype(np.float64)
            reach = 1.5 * distance[tuple(points)]
            chosen[1] = targets[points[0]] - (0, reach)
            chosen[[0, 2]] = np.linalg.solve(weights[:, [0, 2]], targets[points] - weights[:, 1:2] * chosen[1])
            sizes[points] = reach

    corners = np.concatenate(list(triangles.values()))
    turn = 2 * np.pi * np.arange(RIM) / RIM
    rim = np.stack([np.cos(turn), np.sin(turn)], 1)
    needed = VERTICES - RIM - len(corners)
    step = np.arange(needed + 400)
    spiral_turn, spiral_radius = step * np.pi * (3 - np.sqrt(5)), 0.985 * np.sqrt((step + 0.5) / len(step))
    spiral = np.stack([spiral_radius * np.cos(spiral_turn), spiral_radius * np.sin(spiral_turn)], 1)
    gap = np.linalg.norm(spiral[:, None] - targets, axis=-1)
    clear = np.flatnonzero((gap > 2.5 * sizes + 0.004).all(1))
    spiral = spiral[clear[np.linspace(0, len(clear) - 1, needed).round().astype(int)]]

    disc = np.concatenate([corners, spiral, rim])
    faces = Delaunay(disc).simplices
    edges = disc[faces[:, 1:]] - disc[faces[:, :1]]
    clockwise = np.linalg.det(edges) < 0
    faces[clockwise] = faces[clockwise][:, [0, 2, 1]]

    by_vertices = {frozenset(range(3 * i, 3 * i + 3)): (triangle, 3 * i) for i, triangle in enumerate(triangles)}
    ordered = np.full((TRIANGLES, 3), -1)
    rest = []
    for face in faces:
        if found := by_vertices.pop(frozenset(face.tolist()), None):
            ordered[found[0]] = found[1] + np.arange(3)
        else:
            rest.append(face)
    ordered[ordered[:, 0] < 0] = rest
    return disc, ordered


_THIRDS = np.radians([90, 210, 330])


def _front_to_disc(front: np.ndarray) -> np.ndarray:
    """Project points of the face [P,2], x and y in metres, onto the disc."""
    flat = (front - CENTRE[:2]) / RADII[:2]
    sphere = np.column_stack([flat, np.sqrt(1 - (flat**2).sum(1))])
    east, north = _disc_axes()
    angle = np.arccos(-sphere @ NECK)
    direction = np.stack([sphere @ east, sphere @ north], 1)
    radius = np.sin(angle / 2) / np.sin(CAP / 2)  # Lambert's equal-area projection
    return direction / np.linalg.norm(direction, axis=1, keepdims=True) * radius[:, None]


def _disc_to_sphere(disc: np.ndarray) -> np.ndarray:
    """Invert Lambert's equal-area projection."""
    east, north = _disc_axes()
    radius = np.linalg.norm(disc, axis=1)
    angle = 2 * np.arcsin(np.minimum(radius, 1) * np.sin(CAP / 2))
    direction = disc / np.maximum(radius, 1e-12)[:, None]
    around = direction[:, :1] * east + direction[:, 1:] * north
    return np.sin(angle)[:, None] * around - np.cos(angle)[:, None] * NECK


def _disc_axes() -> tuple[np.ndarray, np.ndarray]:
    east = np.array([1.0, 0.0, 0.0])
    return east, np.cross(-NECK, east)


def _signed_power(x: np.ndarray, power: float) -> np.ndarray:
    return np.sign(x) * np.abs(x) ** power


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))
