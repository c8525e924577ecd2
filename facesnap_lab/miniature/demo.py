"""The demo: FaceSnap on a person whom none of its networks has seen, with every stage in one sheet.

It runs in the miniature world with networks that were really trained on it (docs/training.md).
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.framing import annotate_faces
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.landmarks.points72 import draw as draw_points
from facesnap_ext.photos import Photo
from facesnap_ext.residuals import landmark_image
from facesnap_ext.settings.unit import Unit
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.measure import Judge, draw, likeness, photo
from facesnap_lab.sheet import Panel, heatmap, sheet

PERSON, DRIVER = 3, 8  # indices of people in the test split
PROMPT = "portrait of a smiling person in a red shirt, blue background, light from front"
OTHER_PROMPTS = (
    "portrait of a neutral person in a white shirt, green background, light from left",
    "portrait of a sad person in a black shirt, yellow background, light from right",
    "portrait of a surprised person in a purple shirt, grey background, light from above",
)
SEED = 11


def demo(out: Path, progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    """Run every stage and write a sheet of the results.

    Args:
        progress: called with the name of each stage as it begins.
    """
    _quieten_libraries()
    stages = iter(range(1, 8))

    def begin(stage: str) -> None:
        progress(f"[{next(stages)}/7] {stage}")

    begin("loading the miniature")
    sampler = shipped.few_step_sampler()
    judge = Judge()
    reference, _ = photo("test", PERSON, 0)
    driving, _ = photo("test", DRIVER, 1)
    unit = Unit(enabled=True, references=(Photo(reference, "Reference"),), driving=Photo(driving, "Driving"))
    with tempfile.TemporaryDirectory() as folder:
        files = shipped.write_models(Path(folder))
        engine = Engine(lambda: files)
        prepared = engine.prepare(unit, SIDE, SIDE, progress=begin)
        face, drive = prepared.references[0], prepared.driving
        encoders = engine.encoders(files)
        own_points = encoders.landmarks(encoders.codes(face).shape, face)
        driving_points = encoders.landmarks(encoders.codes(drive).shape, drive)
        clip_tokens = encoders.clip_tokens([face])[0]
    conditioning = prepared.conditioning

    begin("sampling without and with FaceSnap")
    plain, picture = draw(sampler, PROMPT, SEED, None), draw(sampler, PROMPT, SEED, prepared)
    others = [draw(sampler, prompt, SEED, prepared) for prompt in OTHER_PROMPTS]

    begin("judging and composing the sheet")

    own = judge.embedding(reference)

    def judged(title: str, pixels: np.ndarray, caption: str) -> Panel:
        similarity = likeness(own, judge.embedding(pixels))
        return Panel(f"{title}: {similarity:.2f}", Image.fromarray(pixels), caption)

    with torch.no_grad():
        ffrnet = conditioning.ffrnet
        x = torch.randn(1, 4, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(0))
        scale = ffrnet.config.pixels_per_latent * SIDE // 4
        features = ffrnet.embed_landmarks(landmark_image(conditioning.landmarks, scale, scale))
        residuals = ffrnet(x, torch.tensor([500.0]), ffrnet.embed_tokens(conditioning.tokens), features)
    strongest = max(residuals[:3], key=lambda residual: float(residual.abs().mean()))
    rows = [
        [
            Panel("Reference photo", annotate_faces(face.photo, [face]), "a person from the test split"),
            Panel("ArcFace embedding", heatmap(_square(face.embedding)), f"{face.embedding.size} numbers"),
            Panel("CLIP tokens", heatmap(clip_tokens.numpy()), " x ".join(map(str, clip_tokens.shape))),
            Panel(
                "Identity tokens",
                heatmap(conditioning.tokens[0].numpy()),
                " x ".join(map(str, conditioning.tokens[0].shape)),
            ),
            Panel("FFRNet residual", heatmap(strongest[0].abs().mean(0).numpy()), f"one of {len(residuals)}"),
        ],
        [
            Panel("Driving photo", annotate_faces(drive.photo, [drive]), "another person: pose and expression"),
            Panel("Reference's landmarks", _overlay(face, own_points), "estimated by DECA"),
            Panel("Driving person's landmarks", _overlay(drive, driving_points), "not used: another face"),
            Panel("Predicted landmarks", _overlay(drive, conditioning.landmarks), "the reference's face in this pose"),
            Panel(
                "Landmark image",
                Image.fromarray(draw_points(conditioning.landmarks, 4 * SIDE, 4 * SIDE)),
                "FFRNet's control image",
            ),
        ],
        [
            judged("Without FaceSnap", plain, "same seed and prompt"),
            judged("With FaceSnap", picture, "smiling, red shirt, blue background"),
            judged("With FaceSnap", others[0], "neutral, white shirt, green background"),
            judged("With FaceSnap", others[1], "sad, black shirt, yellow background"),
            judged("With FaceSnap", others[2], "surprised, purple shirt, grey background"),
        ],
    ]
    same = likeness(own, judge.embedding(photo("test", PERSON, 2)[0]))
    different = likeness(own, judge.embedding(driving))
    title = f"FaceSnap in the miniature. Similarity by an independent judge: two photos of this person {same:.2f}"
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(f"{title}, photos of these two people {different:.2f}", rows).save(out)


def _overlay(face: Face, landmarks: Landmarks) -> Image.Image:
    """Draw landmarks, in the photo's own pixels, over the darkened photo."""
    height, width = face.photo.pixels.shape[:2]
    return Image.fromarray(face.photo.pixels // 2 + draw_points(landmarks, width, height) // 2)


def _square(values: np.ndarray) -> np.ndarray:
    rows = 2 ** (values.size.bit_length() // 2)
    return values.reshape(rows, -1)


def _quieten_libraries() -> None:
    """Suppress messages of other libraries, which are not meant for users of the demo."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
