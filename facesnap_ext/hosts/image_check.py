"""Check finished images with an image classifier, and blur those that it rejects."""

from __future__ import annotations

import logging
from typing import Any

from PIL import Image

from facesnap_ext.hosts.finished import FinishedImage
from facesnap_ext.settings.infotext import MARK
from facesnap_ext.weights.image_classifier import ImageClassifier, rejection

BLURRED = f"{MARK} blurred"  # this parameter records why an image was blurred, also for the API
NOT_CHECKED = "not checked"  # the reason if the classifier fails
CELLS = 12
"""Number of cells along the longer side of a blurred image. The mean colour of each cell is all that remains."""

log = logging.getLogger("facesnap")


def check(p: Any, image: Image.Image, finished: FinishedImage, classifier: ImageClassifier | None) -> Image.Image:
    """Return a finished image, blurred if the classifier rejects it or cannot check it.

    An image that was checked before is returned unchanged. The reason for blurring is written into infotext.
    """
    if classifier is None or image is finished.checked or finished.rejected:
        return image
    p.extra_generation_params.pop(BLURRED, None)  # may be left from the previous image
    try:
        found = rejection(classifier.scores(image))
        finished.rejected = "" if found is None else f"{found[0]} {found[1]:.2f}"
    except Exception as error:  # such as too little memory: an image that was not checked must not be shown
        log.error("FaceSnap: an image could not be checked", exc_info=error)
        finished.rejected = NOT_CHECKED
    if finished.rejected:
        p.extra_generation_params[BLURRED] = finished.rejected
        image = blur(image)
    finished.checked = image
    return image


def blur(image: Image.Image) -> Image.Image:
    """Return an image of the same size in which only large patches of colour can be seen."""
    scale = CELLS / max(image.size)
    cells = image.convert("RGB").resize(
        (max(1, round(scale * image.width)), max(1, round(scale * image.height))), Image.Resampling.BOX
    )
    return cells.resize(image.size, Image.Resampling.BICUBIC)


def sentence(numbers: dict[int, FinishedImage]) -> str:
    """Return the message about blurred images, by their number in the gallery; empty if no image was blurred."""
    blurred = {number: image.rejected for number, image in numbers.items() if image.rejected}
    unchecked = [f"image {number}" for number, reason in blurred.items() if reason == NOT_CHECKED]
    rejected = [f"image {number} ({reason})" for number, reason in blurred.items() if reason != NOT_CHECKED]
    sentences = []
    if rejected:
        was = "was" if len(rejected) == 1 else "were"
        sentences.append(
            f"The image classifier rejected {', '.join(rejected)}, which {was} blurred; the check can be turned off in "
            "Settings under FaceSnap."
        )
    if unchecked:
        was = "was" if len(unchecked) == 1 else "were"
        sentences.append(
            f"The image classifier failed for {', '.join(unchecked)}, which {was} therefore blurred; the console shows "
            "the reason."
        )
    return " ".join(sentences)
