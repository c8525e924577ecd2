"""Detect faces of any orientation and size in a photo.

Detectors are trained on upright faces with some surroundings, and see the whole photo shrunk to 640 pixels. The photo
is therefore searched in all four orientations, again with a border if the face fills the photo, and in tiles if no face
is found in a large photo. A small or tilted face is detected again in a larger, level crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from facesnap_ext.identity import face_networks
from facesnap_ext.turns import roll_of, turn_box, turn_points, turned

DETECTOR_SIZES = (640, 576, 512, 448, 384, 320, 256, 192)
"""Side of the detector's square input in pixels. The smaller sizes are only used for padded photos."""

CLOSE_UP = 0.7
"""A face that fills more than this fraction of the photo's longer side is detected again with padding, which makes the
keypoints more accurate."""

TURN_MARGIN = 0.1
"""How much more upright (`Detection.uprightness`) a face must look in a rotated photo than in the original photo."""

CONFIDENT = 0.7
"""Minimum uprightness of a face that was found only in a rotated photo, if there are upright faces too."""

LEVEL_FROM = 30.0
"""Faces with a larger tilt, in degrees, are levelled. Heads are rarely held at a larger angle."""

SMALL = 48
"""Faces with a longer side below this number of pixels in the detector's input are detected again in a crop, if the
photo was shrunk."""

CROP_SCALE = 4.0
"""Side of this crop, relative to the longer side of the face's box."""

TURNS = (0, 90, 180, 270)
MAX_LOOKS = 8
"""Maximum number of faces per photo that are detected again, starting with the largest."""

OVERLAP = 1 / 8
"""Overlap of the tiles of a large photo, relative to their side. A face that is larger than the overlap was large
enough to be found in the whole photo, or in the larger tiles."""

REDUCED = 2 * DETECTOR_SIZES[0]
"""Longer side in pixels to which a larger photo is shrunk before it is searched with a border."""

MAX_TILES = 16
"""The side of a long photo's tiles is at least its longer side divided by this number, which limits the number of
tiles."""


@dataclass(frozen=True, eq=False)
class Detection:
    """A face in a photo, in pixels of the original photo.

    Attributes:
        box: [4] float32 left, top, right, bottom.
        keypoints: [5, 2] float32 eyes, nose and corners of the mouth; left and right refer to the upright face.
        score: the detector's confidence, 0…1.
        turn: clockwise rotation of the photo at this face, in degrees: 0, 90, 180 or 270.
        padded: whether a border was added to the photo.
        size: side in pixels of the detector's input.
        scale: pixels of the detector's input per pixel of the photo.
    """

    box: np.ndarray
    keypoints: np.ndarray
    score: float
    turn: int = 0
    padded: bool = False
    size: int = DETECTOR_SIZES[0]
    scale: float = 1.0

    @property
    def uprightness(self) -> float:
        """The score, reduced by the tilt of the keypoints in the photo that the detector saw."""
        return self.score * math.cos(math.radians(roll_of(self.keypoints, self.turn)))


def detect_faces(detector: Any, bgr: np.ndarray) -> list[Detection]:
    """All faces of a photo [H, W, 3], the largest box first; empty if none is found."""
    plain = partial(_detect, detector)
    found = _in_turns(bgr, DETECTOR_SIZES[0], plain)
    close = not found or longer_side(found[0].box) > CLOSE_UP * max(bgr.shape[:2])
    if close:
        small = _shrink(bgr, REDUCED)
        if padded := _with_border(partial(_detect_padded, detector), small):
            return [replace(_enlarged(one, small, bgr), padded=True) for one in padded]
    if not found and max(bgr.shape[:2]) > 2 * DETECTOR_SIZES[0]:
        found = _in_tiles(plain, bgr)
    again = [_levelled(plain, bgr, _closer(plain, bgr, one)) for one in found[:MAX_LOOKS]]
    return _largest_first([*again, *found[MAX_LOOKS:]])


def longer_side(box: np.ndarray) -> float:
    """The longer side of a box [4], in the unit of the box."""
    return float(max(box[2] - box[0], box[3] - box[1]))


Raw = list[tuple[np.ndarray, np.ndarray, float]]
Detect = Callable[[np.ndarray, int], Raw]


def _in_turns(
    bgr: np.ndarray, size: int, detect: Detect, turns: Sequence[int] = TURNS, known: Raw | None = None
) -> list[Detection]:
    """The faces of a photo in several orientations; each face is returned once, in the orientation in which it looks
    most upright.

    Args:
        known: the result of `detect` for the original photo, if it has been called.
    """
    height, width = bgr.shape[:2]
    scale = size / max(height, width)
    plain = [] if 0 not in turns else detect(bgr, size) if known is None else known
    upright = [Detection(*raw, size=size, scale=scale) for raw in plain]
    if tuple(turns) == TURNS[:1]:
        return _largest_first(_merged(upright, []))
    small = _shrink(bgr, size)
    back = np.array([width / small.shape[1], height / small.shape[0]])
    others = []
    for turn in turns:
        if not turn:
            continue
        image = np.ascontiguousarray(turned(small, turn))
        for box, keypoints, score in detect(image, size):
            box = turn_box(box, -turn, image.shape[1], image.shape[0]) * np.tile(back, 2)
            keypoints = turn_points(keypoints, -turn, image.shape[1], image.shape[0]) * back
            others.append(
                Detection(box.astype(np.float32), keypoints.astype(np.float32), score, turn, size=size, scale=scale)
            )
    return _largest_first(_merged(upright, others))


def _with_border(detect: Detect, bgr: np.ndarray) -> list[Detection]:
    """The faces of a photo with a border, at the first of `DETECTOR_SIZES` that finds any; upright faces are
    preferred."""
    for size in DETECTOR_SIZES:
        if known := detect(bgr, size):
            return _in_turns(bgr, size, detect, known=known)
    for size in DETECTOR_SIZES[::3]:
        if found := _in_turns(bgr, size, detect, TURNS[1:]):
            return found
    return []


def _merged(upright: Sequence[Detection], others: Sequence[Detection]) -> list[Detection]:
    kept = list(upright)
    best = max((one.uprightness for one in upright), default=-1.0)
    for other in sorted(others, key=lambda one: -one.uprightness):
        same = _same_face(kept, other)
        if same is None:
            if other.uprightness >= min(CONFIDENT, best + TURN_MARGIN):
                kept.append(other)
        elif kept[same].turn == 0 and other.uprightness > kept[same].uprightness + TURN_MARGIN:
            kept[same] = other
    return kept


def _in_tiles(detect: Detect, bgr: np.ndarray) -> list[Detection]:
    """Faces of a large photo in overlapping square tiles; upright faces are preferred.

    A long photo is first cut into tiles whose side is its shorter side, which overlap by half, because faces may be as
    large as that. Two and then four smaller tiles cover the shorter side. There are too many of the smallest tiles to
    rotate them as well.
    """
    height, width = bgr.shape[:2]
    shorter, longer = sorted((height, width))
    smallest = max(DETECTOR_SIZES[0], longer // 8)
    levels: list[tuple[int, float, Sequence[int]]] = []  # side, overlap and orientations
    if longer >= 2 * shorter:
        levels.append((max(shorter, -(-longer // MAX_TILES)), 1 / 2, TURNS))
    for count, ways in ((2, TURNS), (4, TURNS[:1])):
        side = math.ceil(shorter / (count - (count - 1) * OVERLAP))
        if side >= smallest:
            levels.append((side, OVERLAP, ways))
    for side, overlap, turns in levels:
        corners = [(left, top) for top in _starts(height, side, overlap) for left in _starts(width, side, overlap)]
        tiles = [bgr[top : top + side, left : left + side] for left, top in corners]
        shrunk = [_shrink(tile, DETECTOR_SIZES[0]) for tile in tiles]
        for some in filter(None, (turns[:1], turns[1:])):
            found: list[Detection] = []
            for (left, top), tile, small in zip(corners, tiles, shrunk):
                for one in _in_turns(small, DETECTOR_SIZES[0], detect, some):
                    if len(found) < face_networks.MAX_FACES:
                        _add(found, _moved(_enlarged(one, small, tile), left, top))
            if found:
                return _largest_first(found)
    return []


def _add(found: list[Detection], face: Detection) -> None:
    """Add a face from a further tile, unless the face was already found in a tile in which it looks more upright."""
    same = _same_face(found, face)
    if same is None:
        found.append(face)
    elif face.uprightness > found[same].uprightness:
        found[same] = face


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """The first pixels of tiles that cover a length and overlap by at least this fraction of their side; the last tile
    reaches its end."""
    last = max(length - side, 0)
    steps = math.ceil(last / (side * (1 - overlap)) - 1e-9)
    return [round(i * last / max(1, steps)) for i in range(steps + 1)]


def _closer(detect: Detect, bgr: np.ndarray, face: Detection) -> Detection:
    """Detect a face again in a crop of the photo if it was small for the detector; return it unchanged if that
    fails."""
    if longer_side(face.box) * face.scale >= SMALL or face.scale >= 1:
        return face
    half = CROP_SCALE / 2 * longer_side(face.box)
    height, width = bgr.shape[:2]
    x, y = face.box.reshape(2, 2).mean(0)
    left, right = (int(np.clip(round(x + side), 0, width)) for side in (-half, half))
    top, bottom = (int(np.clip(round(y + side), 0, height)) for side in (-half, half))
    crop = np.ascontiguousarray(bgr[top:bottom, left:right])
    faces = [_moved(one, left, top) for one in _in_turns(crop, DETECTOR_SIZES[0], detect)]
    best = max(faces, key=lambda one: _overlap(one.box, face.box), default=face)
    return best if _overlap(best.box, face.box) > 0.3 else face


def _levelled(detect: Detect, bgr: np.ndarray, face: Detection) -> Detection:
    """Detect a tilted face again in a levelled crop of the photo; return it unchanged if that fails.

    The returned box has the size of the box in the levelled crop, around the same centre.
    """
    import cv2

    roll = roll_of(face.keypoints, face.turn)
    if abs(roll) <= LEVEL_FROM:
        return face
    side = CROP_SCALE * longer_side(face.box)
    scale = min(1.0, DETECTOR_SIZES[0] / side)
    x, y = (float(value) for value in face.box.reshape(2, 2).mean(0))
    transform = cv2.getRotationMatrix2D((x, y), face.turn + roll, scale)
    pixels = max(1, round(side * scale))
    transform[0, 2] += pixels / 2 - x
    transform[1, 2] += pixels / 2 - y
    back = cv2.invertAffineTransform(transform)
    candidates = []
    for box, keypoints, score in detect(cv2.warpAffine(bgr, transform, (pixels, pixels)), DETECTOR_SIZES[0]):
        centre = back @ [*box.reshape(2, 2).mean(0), 1]
        half = (box[2:] - box[:2]) / 2 / scale
        box = np.concatenate([centre - half, centre + half]).astype(np.float32)
        keypoints = (keypoints @ back[:, :2].T + back[:, 2]).astype(np.float32)
        candidates.append(replace(face, box=box, keypoints=keypoints, score=score))
    best = max(candidates, key=lambda one: _overlap(one.box, face.box), default=face)
    return best if _overlap(best.box, face.box) > 0.3 else face


def _enlarged(face: Detection, small: np.ndarray, bgr: np.ndarray) -> Detection:
    """A face in a shrunk photo, in pixels of the photo."""
    if small.shape == bgr.shape:
        return face
    back = np.array([bgr.shape[1] / small.shape[1], bgr.shape[0] / small.shape[0]], np.float32)
    scale = face.scale * max(small.shape[:2]) / max(bgr.shape[:2])
    return replace(face, box=face.box * np.tile(back, 2), keypoints=face.keypoints * back, scale=scale)


def _moved(face: Detection, left: int, top: int) -> Detection:
    corner = np.array([left, top], np.float32)
    return replace(face, box=face.box + np.tile(corner, 2), keypoints=face.keypoints + corner)


def _same_face(found: Sequence[Detection], face: Detection) -> int | None:
    """The index of the first detection that overlaps a face so far that both show the same one."""
    if not found:
        return None
    overlapping = np.flatnonzero(_overlaps(np.stack([one.box for one in found]), face.box) > 0.3)
    return int(overlapping[0]) if len(overlapping) else None


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes [4]."""
    return float(_overlaps(a[None], b)[0])


def _overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union [N] of each of `boxes` [N, 4] and a box [4]."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    both = np.maximum(sides, 0).astype(np.float64).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - both
    return np.divide(both, union, out=np.zeros(len(boxes)), where=union > 0)


def _largest_first(found: Sequence[Detection]) -> list[Detection]:
    return sorted(found, key=lambda one: -float((one.box[2:] - one.box[:2]).prod()))


def _shrink(bgr: np.ndarray, size: int) -> np.ndarray:
    """Shrink a photo [H, W, 3] to at most `size` pixels on its longer side and at least one pixel on the other."""
    import cv2

    shrink = min(1.0, size / max(bgr.shape[:2]))
    height, width = (max(1, round(side * shrink)) for side in bgr.shape[:2])
    return bgr if shrink == 1 else cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA)


def _detect(detector: Any, bgr: np.ndarray, size: int) -> Raw:
    """Return box, keypoints and score of each face in `bgr` [H, W, 3], largest box first."""
    if min(bgr.shape[:2]) * size < max(bgr.shape[:2]):
        return []  # insightface would shrink the shorter side to zero pixels
    boxes, keypoints = face_networks.detect(detector, bgr, size)
    return [(box[:4], points, float(box[4])) for box, points in zip(boxes, keypoints)]


def _detect_padded(detector: Any, bgr: np.ndarray, size: int) -> Raw:
    """Like `_detect`, on the photo surrounded by a black border as wide and high as the photo."""
    import cv2

    # The detector would shrink a larger photo anyway. Adding the border at full size would need too much memory.
    shrink = min(1.0, size / max(bgr.shape[:2]))
    height, width = (max(1, round(side * shrink)) for side in bgr.shape[:2])
    small = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA)
    small = cv2.copyMakeBorder(small, height, height, width, width, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    scale = np.array([bgr.shape[1] / width, bgr.shape[0] / height], np.float32)
    corner = np.array([width, height], np.float32)
    return [
        ((box.reshape(2, 2) - corner).reshape(4) * np.tile(scale, 2), (keypoints - corner) * scale, score)
        for box, keypoints, score in _detect(detector, small, size)
    ]
