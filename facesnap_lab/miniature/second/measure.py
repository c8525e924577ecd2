"""Measure FaceSnap in the second edition: the individual, not the type.

    python -m facesnap_lab.miniature.second.measure --out DIR --people 80 --seeds 3

Each person of the test split is drawn from one photo, in another person's pose and expression. The judges never
condition:

- `judge` and `judge_inner` recognise a person in any look; the second one sees neither hair nor outline. A picture is
  compared with photos of the person in *other* looks, so hair, glasses and beard do not count.
- `details` recognises a person in a look. A picture is compared with another photo in the reference's look.

Each measurement is also taken of a second real photo in the reference's look, which is the limit, and of a look-alike:
a different person with the reference's look, skin and brows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.files import atomic_write
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.search import find_models
from facesnap_lab.miniature.captions import COLOURS, EXPRESSIONS, LIGHTS, scene_caption
from facesnap_lab.miniature.head import EXPRESSIONS as EXPRESSION_NAMES
from facesnap_lab.miniature.measure import angle, likeness
from facesnap_lab.miniature.measure import draw as draw_picture
from facesnap_lab.miniature.second import lightning
from facesnap_lab.miniature.second.deca import write_flame
from facesnap_lab.miniature.second.judges import (
    JUDGES,
    SCENE_PARTS,
    Judges,
    Seen,
    expression_and_pose,
    words_found,
)
from facesnap_lab.miniature.second.render import SIDE, render
from facesnap_lab.miniature.second.world import (
    LOOK_TRAITS,
    PERSON_TRAITS,
    SHOTS_PER_LOOK,
    Subject,
    dress,
    exchange,
    exchange_visibly,
    look,
    person,
    scene,
    subject,
)
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.miniature.world import Scene
from facesnap_lab.sheet import Panel, sheet
from facesnap_lab.statistics import crossed_bootstrap

REFERENCE, DRIVING, SECOND = 0, 1, 2  # shots of the first look
OTHER_LOOKS = (SHOTS_PER_LOOK, 2 * SHOTS_PER_LOOK, 3 * SHOTS_PER_LOOK)  # a shot of each
DONORS = 10_000  # number of the first person whose traits are used for exchanges and look-alikes
TYPE = ("skin", "brows")  # traits that a look-alike shares in addition to the look
MOVES = ("mouth open", "smile", "eyes closed")  # parts of the expression that are followed
PEOPLE, SEEDS = 80, 3
VISIBLE = 6  # smallest difference of a pixel, 0…255, that an exchanged trait has to make

Embeddings = dict[str, "np.ndarray | None"]
"""A face's embedding by each judge."""


@dataclass(frozen=True, eq=False)
class Known:
    """The real photos of a person, and their embeddings."""

    reference: np.ndarray
    alike: np.ndarray  # photo of the look-alike
    embedded: dict[str, Embeddings]  # "reference", "second", "driving", "alike"
    other_looks: list[Embeddings]
    exchanged: dict[str, Embeddings | None]  # the reference with a trait exchanged; None if that cannot be seen


@dataclass(frozen=True, eq=False)
class Drawn:
    """A person's picture with one seed, with and without FaceSnap."""

    picture: np.ndarray
    plain: np.ndarray
    answers: tuple[int, ...]  # index of the right word of each of `SCENE_PARTS`
    driving: Scene


def write_models(out: Path, model: Path, folder: Path) -> ModelFiles:
    """Copy what the engine needs from the folder of all stages, with one FaceSnap file."""
    shutil.copytree(out / "identity", folder / "identity", ignore=shutil.ignore_patterns("*.pt"))
    shutil.copytree(out / "clip" / "model", folder / "clip")
    shutil.copyfile(out / "deca" / "deca.safetensors", folder / "deca.safetensors")
    write_flame(folder / "flame.safetensors")
    shutil.copyfile(model, folder / "facesnap.safetensors")
    return find_models(folder)


def photo(index: int, shot: int) -> np.ndarray:
    return rendered(subject("test", index, shot), index, shot)


def rendered(who: Subject, index: int, shot: int) -> np.ndarray:
    """Render a subject in the scene of a test person's shot."""
    return render([who], [scene(person("test", index), shot)], SIDE)[0].picture


def look_alike(index: int) -> Subject:
    """Return a different person with the look, skin and brows of a test person's reference."""
    who = subject("test", index, REFERENCE)
    alike = dress(person("test", DONORS + index), look(person("test", index), 0))
    for trait in TYPE:
        alike = exchange(alike, who, trait)
    return alike


def exchanged(index: int, trait: str) -> Subject:
    """Return the subject of a test person's reference with one trait of a person who differs in it visibly."""
    return exchange_visibly(subject("test", index, REFERENCE), person("test", DONORS + index), trait)


def know(judges: Judges, index: int, driver: int) -> Known:
    """Render and embed the real photos of a test person.

    Args:
        driver: number of the person whose pose is used, and whose photo shows a different person.
    """

    def embed(picture: np.ndarray) -> Embeddings:
        seen = judges.find(picture)
        return {name: judges.embed(name, seen) for name in JUDGES}

    reference, alike = photo(index, REFERENCE), rendered(look_alike(index), index, SECOND)
    changed: dict[str, Embeddings | None] = {}
    for trait in PERSON_TRAITS + LOOK_TRAITS:
        picture = rendered(exchanged(index, trait), index, REFERENCE)
        visible = np.abs(picture.astype(int) - reference).max() > VISIBLE
        changed[trait] = embed(picture) if visible else None
    photos = {"reference": reference, "second": photo(index, SECOND), "driving": photo(driver, DRIVING), "alike": alike}
    return Known(
        reference=reference,
        alike=alike,
        embedded={name: embed(picture) for name, picture in photos.items()},
        other_looks=[embed(photo(index, shot)) for shot in OTHER_LOOKS],
        exchanged=changed,
    )


def draw(sampler: Sampler, engine: Engine, index: int, driver: int, seed: int, **settings: Any) -> Drawn:
    """Draw a test person in another one's pose, and the same without FaceSnap."""
    random = np.random.default_rng([seed, index])
    values = (EXPRESSIONS[:2], tuple(COLOURS), tuple(COLOURS), LIGHTS)
    answers = tuple(int(random.integers(len(words))) for words in values)
    prompt = scene_caption(*(words[answer] for words, answer in zip(values, answers)), None)
    unit = Unit(
        enabled=True,
        references=(Photo(photo(index, REFERENCE), "Reference"),),
        driving=Photo(photo(driver, DRIVING), "Driving photo"),
        **settings,
    )
    prepared = engine.prepare(unit, SIDE, SIDE)

    noise = 1000 * seed + index
    plain, picture = (draw_picture(sampler, prompt, noise, one, SIDE) for one in (None, prepared))
    return Drawn(picture, plain, answers, scene(person("test", driver), DRIVING))


def to_reference(found: Embeddings, known: Known, name: str) -> float:
    return likeness(found[name], known.embedded["reference"][name])


def to_other_looks(found: Embeddings, known: Known, name: str) -> float:
    return float(np.mean([likeness(found[name], other[name]) for other in known.other_looks]))


def choices(found: Embeddings, known: Known, name: str) -> dict[str, float]:
    """Return for each trait that the judge knows whether a picture is closer to the reference than to the reference
    with that trait exchanged; NaN where the exchange cannot be seen."""
    result = {}
    for trait in PERSON_TRAITS + LOOK_TRAITS if name == "details" else PERSON_TRAITS:
        if (other := known.exchanged[trait]) is None:
            result[trait] = np.nan
        else:
            closer = to_reference(found, known, name) > likeness(found[name], other[name])
            result[trait] = float(closer and found[name] is not None)
    return result


def identified(found: Embeddings, everybody: Sequence[Known], index: int, name: str) -> float:
    """Return whether a picture's own person is the closest of all, in another look."""
    if found[name] is None:
        return 0.0
    return float(np.argmax([likeness(found[name], known.other_looks[0][name]) for known in everybody]) == index)


def recognition_rows(everybody: Sequence[Known], pictures: Sequence[Sequence[Embeddings]], name: str) -> dict[str, Any]:
    """Return the measurements of one judge, as values [S,P] by name.

    Args:
        pictures: the embeddings of each person's picture, by seed.
    """
    kinds = {
        "picture": pictures,
        "second photo": [[known.embedded["second"] for known in everybody]],
        "look-alike": [[known.embedded["alike"] for known in everybody]],
        "different person": [[known.embedded["driving"] for known in everybody]],
    }
    rows: dict[str, Any] = {}
    for kind, found in kinds.items():
        compare = to_reference if name == "details" else to_other_looks
        rows[f"{kind}, similarity"] = np.array([[compare(f, k, name) for f, k in zip(one, everybody)] for one in found])
        rows[f"{kind}, identified"] = np.array(
            [[identified(f, everybody, i, name) for i, f in enumerate(one)] for one in found]
        )
        chosen = [[choices(f, k, name) for f, k in zip(one, everybody)] for one in found]
        for trait in chosen[0][0]:
            rows[f"{kind}, {trait}"] = np.array([[values[trait] for values in one] for one in chosen])
    rows["picture above look-alike"] = rows["picture, similarity"] - rows["look-alike, similarity"]
    low, high = rows["different person, similarity"].mean(), rows["second photo, similarity"].mean()
    rows["position"] = (rows["picture, similarity"] - low) / (high - low)
    return rows


def pose_rows(
    encoders: Encoders, drawn: Sequence[Sequence[Drawn]], seen: Sequence[Sequence[Seen | None]]
) -> dict[str, Any]:
    """Return the head pose's error in degrees [S,P], and for each of `MOVES` the correlation with the driving scene and
    the slope, or None if fewer than two faces were found."""
    errors = np.full((len(drawn), len(drawn[0])), np.nan)
    codes: list[tuple[np.ndarray, np.ndarray]] = []
    for s, (row, faces_seen) in enumerate(zip(drawn, seen)):
        for i, (one, face) in enumerate(zip(row, faces_seen)):
            if (estimate := expression_and_pose(encoders, face)) is not None:
                expression, pose = estimate
                errors[s, i] = angle(pose, np.asarray(one.driving.pose[:3]))
                codes.append((expression, np.asarray(one.driving.codes)))
    rows: dict[str, Any] = {"pose error": errors}
    measurable = len(codes) > 1
    for move in MOVES:
        column = list(EXPRESSION_NAMES).index(move)
        found, wanted = (np.array([pair[k][column] for pair in codes]) for k in (0, 1))
        rows[f"{move}, correlation"] = float(np.corrcoef(found, wanted)[0, 1]) if measurable else None
        rows[f"{move}, slope"] = float(np.polyfit(wanted, found, 1)[0]) if measurable else None
    return rows


def measure(
    sampler: Sampler,
    out: Path,
    model: Path,
    people: int,
    seeds: int,
    progress: Callable[[str], None] = print,
    **settings: Any,
) -> tuple[dict[str, Any], Image.Image]:
    """Draw each person with each seed, and judge the pictures.

    Args:
        out: folder of all stages.
        model: the FaceSnap file.
        settings: fields of `Unit` that differ from the defaults.

    Returns:
        Means with 95 % intervals over people and seeds, and a sheet of the first 32 people.
    """
    from transformers import CLIPModel

    judges = Judges(out)
    clip = CLIPModel.from_pretrained(out / "clip" / "model", local_files_only=True)
    drivers = [(i + people // 2) % people for i in range(people)]
    everybody = [know(judges, i, driver) for i, driver in enumerate(drivers)]
    progress(f"{people} people rendered")
    drawn: list[list[Drawn]] = []
    with tempfile.TemporaryDirectory() as temporary:
        files = write_models(out, model, Path(temporary))
        engine = Engine(lambda: files)
        encoders = engine.encoders(files)
        for seed in range(seeds):
            drawn.append([draw(sampler, engine, i, driver, seed, **settings) for i, driver in enumerate(drivers)])
            progress(f"seed {seed + 1} of {seeds} drawn")
        found = {
            kind: [[judges.find(getattr(one, kind)) for one in row] for row in drawn] for kind in ("picture", "plain")
        }
        rows = pose_rows(encoders, drawn, found["picture"])
    embedded = [[{name: judges.embed(name, seen) for name in JUDGES} for seen in row] for row in found["picture"]]
    answers = [[one.answers for one in row] for row in drawn]
    for kind, title in (("picture", "with FaceSnap"), ("plain", "without FaceSnap")):
        rows[f"faces {title}"] = np.array([[float(seen is not None) for seen in row] for row in found[kind]])
        right = np.array([words_found(clip, row, asked) for row, asked in zip(found[kind], answers)])
        for k, part in enumerate(SCENE_PARTS):
            rows[f"{part} {title}"] = right[:, :, k].astype(float)
    figures: dict[str, Any] = {"people": people, "seeds": seeds, "picture": _estimates(rows)}
    for name in JUDGES:
        figures[name] = _estimates(recognition_rows(everybody, embedded, name))
    return figures, people_sheet(everybody, drawn[0])


def _estimates(rows: dict[str, Any]) -> dict[str, Any]:
    """Return each number rounded, and each array's mean and bounds."""
    return {
        name: _estimate(value) if isinstance(value, np.ndarray) else _rounded(value) for name, value in rows.items()
    }


def _estimate(values: np.ndarray) -> list[float | None]:
    return [_rounded(value) for value in dataclasses.asdict(crossed_bootstrap(values)).values()]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def people_sheet(everybody: Sequence[Known], drawn: Sequence[Drawn], count: int = 32, columns: int = 4) -> Image.Image:
    """Show reference, picture and look-alike of the first people."""
    panels = []
    for i, (known, one) in enumerate(zip(everybody[:count], drawn)):
        parts = np.concatenate([known.reference, one.picture, known.alike], axis=1)
        panels.append(Panel(str(i + 1), Image.fromarray(parts), "reference, FaceSnap, look-alike"))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return sheet("People of the test split: reference, FaceSnap's picture, and a look-alike's photo", rows)


def measure_files(out: Path, model: Path, people: int, seeds: int, device: str = "cpu") -> dict[str, Any]:
    """Measure with the networks of a folder of all stages, and write `measure.json` and `people.png` into it."""
    result, picture = measure(lightning.load_few_step(out, device), out, model, people, seeds)
    picture.save(out / "people.png")
    with atomic_write(out / "measure.json") as part:
        part.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure FaceSnap on people that no network was trained on.")
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages")
    parser.add_argument("--model", type=Path, required=True, help="FaceSnap file")
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found = measure_files(options.out, options.model, options.people, options.seeds, options.device)
    print(json.dumps(found, indent=2))
