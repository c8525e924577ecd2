"""InstantID's control picture: a face detector's five points, joined to the tip of the nose.

Formula: `draw_kps` of github.com/InstantID/InstantID. Its pixels are what IdentityNet was trained on, jagged edges and
whole-numbered places too, so here they are drawn just so, at whatever size a pass has.
"""

from __future__ import annotations

import math

import numpy as np

from facesnap_ext.landmarks.points72 import Landmarks, five_points

# RGB of eyes, nose and corners of the mouth, in `five_points`' order
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NOSE = 2
RADIUS = 10  # of a point, in pixels
STICK = 4  # half the width of what joins two points
FAINT = 0.6  # of a point's colour, that of its stick


def draw_five(landmarks: Landmarks, width: int, height: int) -> np.ndarray:
    """Draw the five points on black: slim ellipses from the nose to each other point in that one's colour, darkened,
    later ones over earlier; over them a disc for each point.

    Args:
        landmarks: of 72 points, or of the five alone.
        width, height: of the drawing in pixels; the points are stretched to it.

    Returns:
        [height,width,3] uint8 RGB.
    """
    import cv2

    points = landmarks.scaled(width, height).points.astype(np.float64)
    points = points if len(points) == len(COLOURS) else five_points(points)
    picture = np.zeros((height, width, 3), np.uint8)
    for point, colour in zip(points, COLOURS):
        across, down = point - points[NOSE]
        if across == down == 0:  # the nose itself
            continue
        x, y = ((point + points[NOSE]) / 2).astype(int).tolist()
        axes = (int(math.hypot(across, down) / 2), STICK)
        outline = cv2.ellipse2Poly((x, y), axes, int(math.degrees(math.atan2(down, across))), 0, 360, 1)
        cv2.fillConvexPoly(picture, outline, tuple(int(FAINT * part) for part in colour))
    for point, colour in zip(points, COLOURS):
        cv2.circle(picture, tuple(point.astype(int).tolist()), RADIUS, colour, -1)
    return picture
