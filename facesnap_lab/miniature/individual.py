"""Whether pictures keep the individual, or only the type: traits, identification and look-alikes.

A likeness far above that of two random people may come from skin, hair, beard and glasses alone. Three tests tell the
difference, and a real second photo of the person passes each of them as far as the judge can:

- Forced choice: is the picture closer to the reference, or to the same photo with one trait replaced by a different
  person's? Chance is 0.5.
- Identification: is the picture's own reference the closest of all references? Chance is one in the number of people.
- Look-alike: is the picture closer to the reference than a photo of a person who has the same skin, hair, beard,
  glasses and brows, but a different face?

Closeness is the cosine of a judge, a face recognition network that is never used for conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import Person, person, scene
from facesnap_lab.statistics import rounded_interval

Embed = Callable[[np.ndarray], "np.ndarray | None"]
"""Embeds an image [H,W,3] uint8 as a unit vector; None if it has no face."""

TRAITS = {
    "hair": ("hair", "hair_colour", "hair_rgb", "hairline", "hair_volume"),
    "skin": ("skin", "lips"),
    "beard": ("beard", "beard_top", "moustache"),
    "glasses": ("glasses", "glasses_round"),
    "shape": ("shape",),
    "iris": ("iris",),
    "moles": ("moles",),
    "brows": ("brow_thickness",),
}
"""The fields of `Person` that belong to a trait. Together they are everything that two people differ in."""
TYPE = ("hair", "skin", "beard", "glasses", "brows")
"""The traits that a look-alike shares with a person."""
DONORS = 10_000  # number of the first person in the test split whose traits are used for exchanges
DIGITS = 3  # of shares and cosines
TRIES = 100  # more than enough to find a person with a different trait: the rarest difference has a share of 1 in 4


def exchanged(who: Person, trait: str, donor: int) -> Person:
    """Return a person with one trait of the first person of the test split, from number `donor` on, who differs in it
    visibly."""
    for number in range(donor, donor + TRIES):
        other = person("test", number)
        if _differs(who, other, trait):
            return replace(who, **{name: getattr(other, name) for name in TRAITS[trait]})
    raise ValueError(f"no person differs from {who.name} in {trait}")


def look_alike(who: Person, donor: int) -> Person:
    """Return person `donor` of the test split with the type of a person; see `TYPE`."""
    return replace(person("test", donor), **{name: getattr(who, name) for trait in TYPE for name in TRAITS[trait]})


def measure_individual(
    embed: Embed, pictures: Sequence[np.ndarray], first: int = 0, references: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """Test pictures, one of each person in the test split from number `first` on.

    Args:
        pictures: images [S,S,3] uint8.
        references: the photos that the pictures were made from; by default each person's photo 0.

    Returns:
        Means with bootstrap 95 % intervals over people, for the pictures and for a real second photo of each person. A
        picture without a face fails every test.
    """
    people = [person("test", first + i) for i in range(len(pictures))]
    photos = list(references) if references is not None else [_photo(who, 0) for who in people]
    second = [_photo(who, 2) for who in people]
    known = [_required(embed(photo)) for photo in photos]
    seen = {"pictures": [embed(picture) for picture in pictures], "second_photo": [embed(photo) for photo in second]}

    result: dict[str, Any] = {"people": len(people)}
    traits: dict[str, dict[str, Any]] = {name: {} for name in seen}
    for trait in TRAITS:
        replaced = [
            _required(embed(_photo(exchanged(who, trait, DONORS + TRIES * i), 0, who))) for i, who in enumerate(people)
        ]
        for name, found in seen.items():
            choices = [_chosen(one, own, other) for one, own, other in zip(found, known, replaced)]
            traits[name][trait] = rounded_interval(choices, DIGITS)
    result["forced_choice"] = traits
    for name, found in seen.items():
        identified = [_identified(one, known, i) for i, one in enumerate(found)]
        result[f"identified_{name}"] = rounded_interval(identified, DIGITS)
    alike = [embed(_photo(look_alike(who, DONORS + TRIES * i), 2)) for i, who in enumerate(people)]
    own = [_cosine(one, reference) for one, reference in zip(seen["pictures"], known)]
    theirs = [_cosine(one, reference) for one, reference in zip(alike, known)]
    result["likeness_pictures"] = rounded_interval(own, DIGITS)
    result["likeness_look_alike"] = rounded_interval(theirs, DIGITS)
    result["above_look_alike"] = rounded_interval(np.subtract(own, theirs), DIGITS)
    result["closer_than_look_alike"] = rounded_interval([float(a > b) for a, b in zip(own, theirs)], DIGITS)
    return result


def _differs(who: Person, other: Person, trait: str) -> bool:
    if trait == "beard":
        return (who.beard > 0) != (other.beard > 0)
    if trait == "glasses":
        return (who.glasses is None) != (other.glasses is None)
    if trait == "hair":
        return (who.hair, who.hair_colour) != (other.hair, other.hair_colour)
    if trait == "moles":
        return len(who.moles) != len(other.moles)
    if trait == "brows":
        return abs(who.brow_thickness - other.brow_thickness) > 0.001
    name = TRAITS[trait][0]
    return bool(np.abs(getattr(who, name) - getattr(other, name)).max() > 0.1)


def _photo(who: Person, shot: int, scene_of: Person | None = None) -> np.ndarray:
    return render([who], [scene(scene_of or who, shot)], SIDE)[0].picture


def _required(embedding: np.ndarray | None) -> np.ndarray:
    if embedding is None:
        raise ValueError("the judge finds no face in a photo of the world")
    return embedding


def _cosine(a: np.ndarray | None, b: np.ndarray) -> float:
    return 0.0 if a is None else float(a @ b)


def _chosen(picture: np.ndarray | None, own: np.ndarray, other: np.ndarray) -> float:
    return 0.0 if picture is None else float(picture @ own > picture @ other)


def _identified(picture: np.ndarray | None, known: Sequence[np.ndarray], index: int) -> float:
    return 0.0 if picture is None else float(np.argmax(np.stack(known) @ picture) == index)
