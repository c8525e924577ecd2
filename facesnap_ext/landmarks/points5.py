"""InstantID's control image: the five keypoints of a face detector, each joined to the tip of the nose.

Source: `draw_kps` of github.com/InstantID/InstantID. IdentityNet was trained on exactly these images, so their aliased
edges and truncated coordinates are reproduced here. The image is drawn at the size of the sampling pass and never
resized.
"""

from __future__ import annotations

import math

import numpy as np

from facesnap_ext.landmarks.points72 import Landmarks, five_points

# RGB of left eye, right eye, nose and the two corners of the mouth, in the order of `five_points`
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NOSE = 2
POINT_RADIUS = 10  # pixels
STICK_HALF_WIDTH = 4  # pixels; the minor semi-axis of the ellipse that joins two points
STICK_BRIGHTNESS = 0.6  # brightness of a stick, relative to the colour of its point


def draw_five(landmarks: Landmarks, width: int, height: int) -> np.ndarray:
    """Draw the five points on black.

    A slim ellipse joins the nose to each other point, in a darker shade of that point's colour. A disc with a radius of
    10 pixels marks each point, on top of all ellipses.

    Args:
        landmarks: 72 or five points.
        width: width of the image in pixels; the points are scaled to it.
        height: height of the image in pixels; the points are scaled to it.

    Returns:
        [height,width,3] uint8 RGB.
    """
    import cv2

    points = landmarks.scaled(width, height).points.astype(np.float64)
    points = points if len(points) == len(COLOURS) else five_points(points)
    image = np.zeros((height, width, 3), np.uint8)
    for point, colour in zip(points, COLOURS):
        across, down = point - points[NOSE]
        if across == down == 0:  # the nose is not joined to itself
            continue
        x, y = ((point + points[NOSE]) / 2).astype(int).tolist()
        axes = (int(math.hypot(across, down) / 2), STICK_HALF_WIDTH)
        outline = cv2.ellipse2Poly((x, y), axes, int(math.degrees(math.atan2(down, across))), 0, 360, 1)
        cv2.fillConvexPoly(image, np.asarray(outline), [int(STICK_BRIGHTNESS * channel) for channel in colour])
    for point, colour in zip(points, COLOURS):
        cv2.circle(image, tuple(point.astype(int).tolist()), POINT_RADIUS, colour, -1)
    return image
