"""Measure how well FaceSnap preserves the identity of people that no network was trained on.

    python -m facesnap_lab.miniature.measure --people 100 --out out/miniature

The judge is a network that is never used for conditioning. Its cosines are compared with two limits: two photos of one
person, and photos of two people.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from facesnap_ext.engine import Engine, Prepared
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.identity import faces
from facesnap_ext.identity.clip import preprocess
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import NoFaceError
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit
from facesnap_lab.miniature import clip_pair, shipped
from facesnap_lab.miniature.captions import COLOURS, EXPRESSIONS, LIGHTS, scene_caption
from facesnap_lab.miniature.dataset import SIDE, words_for
from facesnap_lab.miniature.individual import measure_individual
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.miniature.world import Scene, person, scene
from facesnap_lab.sheet import Panel, sheet
from facesnap_lab.statistics import rounded_interval

JUDGES = ("judge", "judge_inner")  # the second one sees neither hair nor outline


@dataclass(frozen=True, eq=False)
class Portrait:
    """A generated image and its measurements. Similarities are cosines between the judge's embeddings of this image and
    of the reference."""

    reference: np.ndarray  # [S,S,3] uint8
    driving: np.ndarray
    picture: np.ndarray  # generated with FaceSnap
    plain: np.ndarray  # generated without FaceSnap
    caption: str  # the prompt, followed by CLIP's description of the reference
    similarity: float
    similarity_off: float
    same: float  # similarity of another photo of the same person
    different: float  # similarity of the driving photo, which shows another person
    pose_error: float  # degrees between DECA's estimate in the image and the driving scene's pose; nan without a face
    regressor_error: float  # the same error for the driving photo


class Judge:
    """A face recognition network used for measuring only.

    Args:
        name: one of `JUDGES`.
    """

    def __init__(self, name: str = JUDGES[0]):
        from insightface.model_zoo import get_model

        detector = faces.load_pack(shipped.MODELS / "identity")
        recognition = get_model(str(shipped.JUDGES / f"{name}.onnx"), providers=detector.providers)
        self.pack = replace(detector, recognition=recognition)

    def embedding(self, picture: np.ndarray) -> np.ndarray | None:
        """Embed an image [H,W,3] uint8 as a unit vector; None if it has no face."""
        try:
            found = faces.find_faces(self.pack, Photo(picture, "Picture"))
        except NoFaceError:
            return None
        return found[0].embedding / np.linalg.norm(found[0].embedding)


def likeness(first: np.ndarray | None, second: np.ndarray | None) -> float:
    """Return the cosine between two of the judge's embeddings; 0 if either image has no face."""
    return 0.0 if first is None or second is None else float(first @ second)


def photo(split: str, index: int, shot: int) -> tuple[np.ndarray, Scene]:
    """Render a photo of a person of the world and return it with its scene."""
    who = person(split, index)
    what = scene(who, shot)
    return render([who], [what], SIDE)[0].picture, what


def random_prompt(random: np.random.Generator) -> str:
    return scene_caption(
        *(str(random.choice(list(words))) for words in (EXPRESSIONS[:2], COLOURS, COLOURS, LIGHTS)), None
    )


def draw(sampler: Sampler, prompt: str, seed: int, prepared: Prepared | None, side: int = SIDE) -> np.ndarray:
    """Generate an image [S,S,3] uint8 with the miniature's SDXL, and with FaceSnap if `prepared` is given."""

    def run() -> np.ndarray:
        image = sampler.pipe(
            prompt,
            width=side,
            height=side,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        return np.asarray(image)

    if prepared is None:
        return run()
    with conditioned(sampler.pipe, prepared.conditioning):
        return run()


def measure(
    sampler: Sampler,
    people: int,
    progress: Callable[[str], None] = print,
    first: int = 0,
    seed: int = 0,
    model: Path = shipped.FACESNAP,
    **settings: Any,
) -> list[Portrait]:
    """Generate one image of each person in the test split in another person's pose, and judge it.

    Args:
        model: a FaceSnap file for the miniature.
        settings: fields of `Unit` that differ from the defaults.
    """
    judge = Judge()
    portraits = []
    with tempfile.TemporaryDirectory() as folder:
        files = replace(shipped.write_models(Path(folder)), facesnap={model.name: model})
        engine = Engine(lambda: files)
        encoders = engine.encoders(files)
        for index in range(first, first + people):
            random = np.random.default_rng([seed, index])
            who = person("test", index)
            reference, _ = photo("test", index, 0)
            driving, truth = photo("test", first + (index - first + people // 2) % people, 1)
            again, _ = photo("test", index, 2)
            unit = Unit(
                enabled=True,
                references=(Photo(reference, "Reference"),),
                driving=Photo(driving, "Driving photo"),
                **settings,
            )
            prepared = engine.prepare(unit, SIDE, SIDE)
            prompt = random_prompt(random)
            picture = draw(sampler, prompt, seed + index, prepared)
            plain = draw(sampler, prompt, seed + index, None)
            own, *others = (judge.embedding(seen) for seen in (reference, picture, plain, again, driving))
            similarity, similarity_off, same, different = (likeness(own, other) for other in others)
            portraits.append(
                Portrait(
                    reference=reference,
                    driving=driving,
                    picture=picture,
                    plain=plain,
                    caption=f"{prompt}, {words_for(who)}",
                    similarity=similarity,
                    similarity_off=similarity_off,
                    same=same,
                    different=different,
                    pose_error=pose_error(encoders, picture, truth),
                    regressor_error=pose_error(encoders, driving, truth),
                )
            )
            if len(portraits) % 10 == 0:
                progress(f"{len(portraits)} of {people}")
    return portraits


def pose_error(encoders: Encoders, picture: np.ndarray, truth: Scene) -> float:
    """Return the angle in degrees between the head pose that DECA estimates and the scene's head pose."""
    try:
        face = encoders.face(Photo(picture, "Picture"))
    except NoFaceError:
        return float("nan")
    return angle(encoders.predictor().encode(picture, face.box).pose[:3].numpy(), np.asarray(truth.pose[:3]))


def angle(first: np.ndarray, second: np.ndarray) -> float:
    """Return the angle between two rotations, axis-angle [3] each, in degrees."""
    from facesnap_ext.landmarks.flame import rotation_matrices

    a, b = rotation_matrices(torch.tensor(np.stack([first, second]), dtype=torch.float32))
    return float(torch.rad2deg(torch.acos((((a.T @ b).trace() - 1) / 2).clamp(-1, 1))))


def summary(portraits: Sequence[Portrait]) -> dict[str, Any]:
    """Return means with bootstrap 95 % intervals over people, and FaceSnap's position between the two limits (0…1)."""
    columns = {
        name: np.array([getattr(portrait, name) for portrait in portraits])
        for name in ("same", "different", "similarity", "similarity_off", "pose_error", "regressor_error")
    }

    low, high = columns["different"].mean(), columns["same"].mean()
    return {
        "people": len(portraits),
        "upper_limit": rounded_interval(columns["same"], 4),
        "lower_limit": rounded_interval(columns["different"], 4),
        "lower_limit_spread": round(float(columns["different"].std()), 4),
        "with_facesnap": rounded_interval(columns["similarity"], 4),
        "without_facesnap": rounded_interval(columns["similarity_off"], 4),
        "position_between_limits": rounded_interval((columns["similarity"] - low) / (high - low), 4),
        "pose_error_degrees": rounded_interval(columns["pose_error"], 4),
        "regressor_error_degrees": rounded_interval(columns["regressor_error"], 4),
        "pictures_without_a_face": int(np.isnan(columns["pose_error"]).sum()),
    }


def caption_accuracy(portraits: Sequence[Portrait]) -> dict[str, dict[str, float]]:
    """Return how often CLIP recognises the prompt's words and the reference's hair, with and without FaceSnap."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(shipped.MODELS / "clip", dtype=torch.float32, local_files_only=True)
    captions = [clip_pair.parse_caption(portrait.caption) for portrait in portraits]

    def words_in(pictures: Sequence[np.ndarray]) -> dict[str, float]:
        pixels = preprocess(pictures, clip_pair.IMAGE_SIZE)
        return {word: round(part, 4) for word, part in clip_pair.word_accuracy(clip, pixels, captions).items()}

    return {
        "words_found": words_in([portrait.picture for portrait in portraits]),
        "words_found_without_facesnap": words_in([portrait.plain for portrait in portraits]),
    }


def people_sheet(portraits: Sequence[Portrait], columns: int = 8) -> Image.Image:
    """Show each reference next to its image."""
    panels = []
    for portrait in portraits:
        pair = np.concatenate([portrait.reference, portrait.picture], axis=1)
        panels.append(Panel(f"{portrait.similarity:.2f}", Image.fromarray(pair), "reference, FaceSnap"))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return sheet("People of the test split: reference, and FaceSnap's image in another pose", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure FaceSnap on people that no network was trained on.")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/miniature"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = {}
    for name, load in (("few_steps", shipped.few_step_sampler), ("base", shipped.base_sampler)):
        began = time.time()
        measured = measure(load(), options.people)
        result[name] = summary(measured) | caption_accuracy(measured) | {"seconds": round(time.time() - began, 1)}
        pictures = [portrait.picture for portrait in measured]
        result[name]["individual"] = {judge: measure_individual(Judge(judge).embedding, pictures) for judge in JUDGES}
        people_sheet(measured[:32]).save(options.out / f"people-{name}.png")
    (options.out / "measure.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(json.dumps(result, indent=2))
