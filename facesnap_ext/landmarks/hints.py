"""The kinds of landmark image that FFRNet is trained on. The metadata of a weight file names the kind it needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from facesnap_ext.landmarks.points5 import draw_five
from facesnap_ext.landmarks.points72 import Landmarks, draw
from facesnap_ext.weights.facesnap_file import POINTS5, POINTS72

HINTS: dict[str, Callable[[Landmarks, int, int], np.ndarray]] = {POINTS72: draw, POINTS5: draw_five}
"""Drawing functions by kind: (landmarks, width and height in pixels) → landmark image [height, width, 3] uint8 RGB."""
