"""Render a person in a scene, with the ground truth: landmarks, mask and box.

    python -m facesnap_lab.miniature.render people.png --split test

The head's mesh is projected orthographically, and its triangles are painted back to front at twice the resolution.
Colours depend on the position on the head at rest, so that features move with the mesh; shading is Lambertian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from facesnap_ext.landmarks.deca import project
from facesnap_ext.landmarks.flame import Flame, full_pose, posed_vertices
from facesnap_ext.landmarks.points72 import points_on
from facesnap_lab.miniature.captions import COLOURS
from facesnap_lab.miniature.head import MOUTH, stand_in_flame
from facesnap_lab.miniature.rasterise import Mesh, between, halve, mesh_of, rasterise, step
from facesnap_lab.miniature.world import EXPRESSION_CODES, SHAPE_CODES, SPLITS, Person, Scene, person, scene

OVERSAMPLED = 2
OUTER_LIPS = [52, 54, 53, 62, 58, 59, 57, 65, 66, 71, 69, 68]
INNER_LIPS = [55, 56, 63, 61, 60, 64, 70, 67]
Albedo = Callable[[np.ndarray, np.ndarray, Any], np.ndarray]
EYE, EYE_RADII = (0.032, 0.024), (0.0140, 0.0062)


@dataclass(frozen=True, eq=False)
class Rendering:
    """An image and its ground truth, in pixels from the upper left corner."""

    picture: np.ndarray  # [S,S,3] uint8 RGB
    mask: np.ndarray  # [S,S] uint8, 255 on the head
    points: np.ndarray  # [72,2] float32
    box: np.ndarray  # [4] float32 left, top, right, bottom, like a face detector's


@lru_cache(maxsize=1)
def head() -> Flame:
    """Return the miniature's morphable head in FLAME's layout."""
    return Flame(**stand_in_flame(shapes=SHAPE_CODES, expressions=EXPRESSION_CODES))


def render(people: Sequence[Person], scenes: Sequence[Scene], side: int = 64) -> list[Rendering]:
    """Render each person in the scene at the same index."""
    return render_with(head(), _albedo, people, scenes, side)


def render_with(
    flame: Flame, albedo: Albedo, people: Sequence[Any], scenes: Sequence[Scene], side: int
) -> list[Rendering]:
    """Render people of either edition.

    Args:
        albedo: maps points [P,3] on the head at rest, the amount of hair [P] there and the person to colours [P,3].
        people: objects with shape, skin, lips, the attributes of the hair, and whatever `albedo` needs.
    """
    vertices, points = posed(flame, people, scenes, side)
    mesh = mesh_of(flame)
    renderings = []
    for i, (who, what) in enumerate(zip(people, scenes)):
        picture, mask = _draw(mesh, albedo, vertices[i].numpy(), points[i], who, what, side)
        renderings.append(Rendering(picture, mask, points[i].astype(np.float32), face_box(points[i])))
    return renderings


def posed(flame: Flame, people: Sequence[Any], scenes: Sequence[Scene], side: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return the vertices [N,V,3] of each person's head in the scene, and the 72 points [N,72,2] in pixels."""
    shape = torch.tensor(np.stack([person.shape for person in people]), dtype=torch.float32)
    codes = torch.tensor(np.stack([scene.codes for scene in scenes]), dtype=torch.float32)
    pose = torch.tensor(np.stack([scene.pose for scene in scenes]), dtype=torch.float32)
    cam = torch.tensor(np.stack([scene.cam for scene in scenes]), dtype=torch.float32)
    vertices = posed_vertices(flame, shape, codes, full_pose(flame, pose))
    points = (project(points_on(vertices, flame.faces), cam).numpy() + 1) * (side / 2)
    return vertices, points


def face_shapes(people: int) -> np.ndarray:
    """Return the 72 points [P,72,2] of the test split's first people at rest, seen from the front, in metres.

    These are the world's ground truth, which no network receives.
    """
    return points_at_rest(head(), np.stack([person("test", index).shape for index in range(people)]))


def points_at_rest(flame: Flame, shapes: np.ndarray) -> np.ndarray:
    """Return the 72 points [P,72,2] of heads with shape codes [P,S] at rest, seen from the front, in metres."""
    shape = torch.tensor(shapes, dtype=torch.float32)
    rest = full_pose(flame, torch.zeros(len(shape), 6))
    vertices = posed_vertices(flame, shape, torch.zeros(len(shape), EXPRESSION_CODES), rest)
    return points_on(vertices, flame.faces)[..., :2].numpy()


def face_box(points: np.ndarray) -> np.ndarray:
    """Return a detector's box [4] around 72 points, extended to part of the forehead."""
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return np.array([left, top - 0.22 * (bottom - top), right, bottom], np.float32)


def _draw(
    mesh: Mesh, albedo: Albedo, vertices: np.ndarray, points: np.ndarray, who: Any, scene: Scene, side: int
) -> tuple[np.ndarray, np.ndarray]:
    normals = mesh.vertex_normals(vertices)
    hair = _hair_weight(mesh.rest, who)
    vertices = vertices + normals * (who.hair_volume * hair)[:, None]
    scale, *shift = scene.cam
    fine = OVERSAMPLED * side
    screen = (scale * (vertices[:, :2] + shift) * (1, -1) + 1) * (fine / 2)
    owner, weights = rasterise(screen, vertices[:, 2], mesh.faces, fine)

    picture = _backdrop(who, scene, fine)
    covered = owner >= 0
    corners = mesh.faces[owner[covered]]
    bary = weights[covered][:, :, None]
    rest = (mesh.rest[corners] * bary).sum(1)
    normal = (normals[corners] * bary).sum(1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    colour = albedo(rest, (hair[corners] * bary[:, :, 0]).sum(1), who)
    # soft light wraps around the edge of the shadow, as from a window
    light = scene.ambient + (1.12 - scene.ambient) * np.clip((normal @ scene.light_direction + 0.5) / 1.5, 0, 1)
    picture[covered] = colour * light[:, None]
    _paint_mouth(picture, points * OVERSAMPLED, who, float(np.median(light)))
    small = halve(picture)
    mask = covered.reshape(side, OVERSAMPLED, side, OVERSAMPLED).mean((1, 3)) >= 0.5
    return (np.clip(small, 0, 1) * 255).round().astype(np.uint8), mask.astype(np.uint8) * 255


def _paint_mouth(picture: np.ndarray, points: np.ndarray, who: Any, light: float) -> None:
    """Paint the lips and the opening between them from the landmarks, since the mesh is too coarse there."""
    for line, colour in ((OUTER_LIPS, who.lips), (INNER_LIPS, (0.22, 0.06, 0.06))):
        cover = Image.new("L", picture.shape[1::-1])
        outline = [tuple(point) for point in points[line]]
        ImageDraw.Draw(cover).polygon(outline, fill=255, outline=255)
        left, top, right, bottom = cover.getbbox() or (0, 0, 0, 0)
        part = np.s_[top:bottom, left:right]
        amount = np.asarray(cover, np.float32)[part][..., None] / 255
        picture[part] += amount * (np.asarray(colour) * light - picture[part])


def _albedo(rest: np.ndarray, hair: np.ndarray, who: Person) -> np.ndarray:
    """Return the colours [P,3] of points [P,3] on the head at rest."""
    x, y, z = rest.T
    ax = np.abs(x)
    front = step(z, 0.0, 0.01)
    colour = np.broadcast_to(who.skin.astype(np.float32), (len(rest), 3)).copy()

    def paint(cover: np.ndarray, rgb: np.ndarray | tuple[float, float, float]) -> None:
        cover = np.clip(cover, 0, 1)[:, None]
        colour[:] = colour + cover * (np.asarray(rgb) - colour)

    def disc(cx: float, cy: float, rx: float, ry: float, soft: float = 0.12) -> np.ndarray:
        return front * step(1 - np.sqrt(((ax - cx) / rx) ** 2 + ((y - cy) / ry) ** 2), -soft, soft)

    paint(0.25 * disc(0.042, -0.022, 0.020, 0.016, 0.6), who.lips)  # cheeks
    paint(0.35 * disc(0, -0.0165, 0.0160, 0.0052, 0.5), 0.4 * who.skin)  # below the nose
    paint(0.7 * disc(0.0075, -0.0145, 0.0046, 0.0028, 0.3), 0.3 * who.skin)  # nostrils
    paint(0.22 * disc(0.0095, 0.004, 0.0045, 0.020, 0.5), 0.5 * who.skin)  # sides of the nose bridge
    for mx, my, radius in who.moles:
        paint(front * step(radius - np.hypot(x - mx, y - my), -0.0008, 0.0008), 0.25 * who.skin)
    if who.beard:
        grown = front * step(who.beard_top - 0.35 * (0.05 - ax).clip(0) - y, -0.006, 0.006)
        if who.moustache:
            grown = np.maximum(
                grown, front * step(0.027 - ax, -0.002, 0.002) * between(y, MOUTH + 0.004, -0.020, 0.002)
            )
        paint(who.beard * grown, 0.85 * who.hair_rgb)
    along = np.clip((ax - 0.014) / 0.042, 0, 1)
    brow = 0.0445 + 0.022 * along * (1 - along) - 0.002 * along
    thick = who.brow_thickness * (1.15 - 0.5 * along)
    brow = between(y, brow - thick, brow + thick, 0.0012) * between(ax, 0.013, 0.058, 0.002)
    paint(0.9 * front * brow, 0.6 * who.hair_rgb)

    (ex, ey), (rx, ry) = EYE, EYE_RADII
    paint(disc(ex, ey, 1.14 * rx, 1.32 * ry, 0.08), 0.30 * who.skin)  # edges of the eyelids
    white = disc(ex, ey, rx, ry, 0.08)
    paint(white, (0.96, 0.96, 0.95))
    paint(white * disc(ex, ey + 0.0003, 0.0060, 0.0060), who.iris)
    paint(white * disc(ex, ey + 0.0003, 0.0028, 0.0028), (0.03, 0.03, 0.03))
    paint(hair, who.hair_rgb)
    if who.glasses is not None:
        lens = np.sqrt(((ax - ex) / 0.0215) ** 2 + ((y - ey + 0.001) / who.glasses_round) ** 2)
        frame = between(lens, 0.90, 1.14, 0.06)
        frame = np.maximum(frame, between(y, ey - 0.0005, ey + 0.0030, 0.0008) * (ax < 0.0115))
        frame = np.maximum(frame, between(y, ey - 0.0005, ey + 0.0030, 0.0008) * (ax > 0.052) * (z > -0.03))
        paint(frame * step(z, -0.035, -0.025), who.glasses)
    return colour


def _hair_weight(rest: np.ndarray, who: Any) -> np.ndarray:
    """Return the hair's weight [V]: 1 where hair grows."""
    if who.hair == "bald":
        return np.zeros(len(rest))
    x, y, z = rest.T
    edge = who.hairline - 0.25 * (x / 0.07) ** 2 * 0.03  # the hairline is lower towards the temples
    behind = who.hairline - 1.55 * np.clip(0.028 - z, 0, None)  # the sides hang behind the ears
    reach = np.minimum(edge, behind)
    floor = -0.04 if who.hair == "short" else -0.12
    return step(y - np.maximum(reach, floor), -0.005, 0.005)


def _backdrop(who: Any, scene: Scene, side: int) -> np.ndarray:
    """Paint what is behind the head, [S,S,3]: a plain background, shoulders and long hair."""
    scale, *shift = scene.cam
    across = (np.arange(side) + 0.5) * (2 / side) - 1
    x = across[None] / scale - shift[0]
    y = -across[:, None] / scale - shift[1]
    shade = 1.04 - 0.12 * (across[:, None] + 1) / 2
    picture = (np.array(COLOURS[scene.background]) * shade[..., None]).astype(np.float32).repeat(side, 1)
    _, yaw, roll = scene.pose[:3]

    def paint(cover: np.ndarray, rgb: np.ndarray) -> None:
        picture[:] += np.clip(cover, 0, 1)[..., None] * (rgb - picture)

    dark = 0.85 * scene.ambient + 0.1
    if who.hair == "long":
        width = 0.082 + who.hair_volume
        middle = 0.02 * np.sin(-yaw) + np.sin(roll) * (-0.02 - y)
        hanging = step(width - np.abs(x - middle) * (1 + 0.5 * np.clip(y - 0.05, 0, None) / 0.1), -0.002, 0.002)
        paint(hanging * step(0.11 - y, -0.003, 0.003), dark * who.hair_rgb)
    neck = 0.042
    paint(step(neck - np.abs(x), -0.002, 0.002) * step(-0.05 - y, 0, 0.003), 0.8 * who.skin)
    shoulders = step(-0.104 - 2.2 * np.clip(np.abs(x) - 0.02, 0, None) ** 2 * 4 - y, -0.002, 0.002)
    paint(shoulders, np.array(COLOURS[scene.clothes]) * (0.97 - 0.6 * (-0.104 - y).clip(0)[..., None]))
    return picture


if __name__ == "__main__":
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(description="Render a sheet of people of the miniature world, one row per person.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--shots", type=int, default=12)
    parser.add_argument("--side", type=int, default=96)
    options = parser.parse_args()
    everybody = [person(options.split, index) for index in range(options.people)]
    rows = [
        np.concatenate(
            [
                r.picture
                for r in render([who] * options.shots, [scene(who, i) for i in range(options.shots)], options.side)
            ],
            axis=1,
        )
        for who in everybody
    ]
    Image.fromarray(np.concatenate(rows)).save(options.out)
