"""The arguments of the script, from the page or the API, as units: one `Unit` for each enabled person."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL.Image import Image

from facesnap_ext.errors import FaceSnapError, error_prefix
from facesnap_ext.photos import NamedFile, Photo, PhotoReader, TooManyPhotosError, check_number, titles_of
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.unit import Unit, defaults, from_values, short_repr

# one person's components on the page, in the order in which the script returns them
UI_ORDER = (
    *("enabled", "references", "driving", "driving_more", "mask"),
    "settings",  # all others, see `page_settings`
)


def from_script_args(args: Sequence[Any]) -> dict[int, Unit]:
    """The enabled units from the script's arguments, by their number on the page, counted from 1.

    Args:
        args: from the page, the components of all people in the order of `UI_ORDER`; from the API, one dictionary per
            person, `{"references": ["<base64>", …], "driving": "<base64>", "weight": 1.0, …}`.

    Raises:
        FaceSnapError: a name is unknown, a value is out of range, a photo cannot be read, or there are too many of
            them. With several enabled units, the message names the person.
    """
    by_name = bool(args) and isinstance(args[0], dict)
    _check_form(args)
    if by_name:
        # the host fills in missing arguments with the components' default values
        given = [{"enabled": True, **values} for values in takewhile(lambda value: isinstance(value, dict), args)]
    else:
        size = len(UI_ORDER)
        given = [dict(zip(UI_ORDER, args[i : i + size])) for i in range(0, len(args), size)]
        if not (given and given[0]["enabled"]):
            return {}  # the accordion's checkbox enables the first person
    enabled = {number: values for number, values in enumerate(given, 1) if values.get("enabled") is not False}
    if not by_name:
        enabled = {number: values for number, values in enabled.items() if values.get("enabled")}
    units, reader = {}, PhotoReader()
    for number, values in enabled.items():
        with error_prefix(person_prefix(number, enabled)):
            units[number] = _unit(values if by_name else _from_page(values), reader)
    return units


def check_intervals(units: Mapping[int, Unit]) -> None:
    """Check that every enabled person is active in a part of sampling.

    Raises:
        FaceSnapError: a person with a weight above 0 has a start that is not before the end.
    """
    for number, unit in units.items():
        strength = unit.strength
        if unit.enabled and strength.weight > 0 and strength.start >= strength.end:
            raise FaceSnapError(
                f"{person_prefix(number, units)}FaceSnap's start ({strength.start:g}) is not before its end "
                f"({strength.end:g}), so this person would never be active; lower start or raise end."
            )


def _check_form(args: Sequence[Any]) -> None:
    """Check that the arguments are one dictionary per person, or the page's components.

    Raises:
        FaceSnapError: the arguments have neither form.
    """
    people = [i for i, value in enumerate(args) if isinstance(value, dict)]
    if people != list(range(len(people))):
        raise FaceSnapError(
            f"FaceSnap's argument {people[-1] + 1} is a dictionary, but argument {_first_other(args)} is not; send one "
            "dictionary per person, with no other values before or between them."
        )
    if args and not people and not isinstance(args[0], bool):
        raise FaceSnapError(
            f"FaceSnap's first argument is {short_repr(args[0])}; send one dictionary per person, such as "
            '{"references": ["<base64>"]}.'
        )


def _first_other(args: Sequence[Any]) -> int:
    return next(i for i, value in enumerate(args, 1) if not isinstance(value, dict))


def unit_from_page(values: Sequence[Any]) -> Unit:
    """One person's settings as the page shows them, enabled or not.

    Args:
        values: of the person's components, in the order of `UI_ORDER`.

    Raises:
        FaceSnapError: as `from_script_args`.
    """
    return _unit(_from_page({**dict(zip(UI_ORDER, values)), "enabled": True}), PhotoReader())


def batches_by_photo(units: Mapping[int, Unit]) -> list[dict[int, Unit]]:
    """The units of each batch of a job, by number.

    There is one batch per reference photo in "batch" mode, one per driving photo if there are several in use, one for
    each pair with both, and otherwise one.

    Raises:
        FaceSnapError: a person other than the first has several batches, or a saved identity is combined with
            reference photos in batch mode.
    """
    first = min(units, default=0)
    for number, unit in units.items():
        batch = unit.reference_mode == "batch" and len(unit.references) > 1
        driven = isinstance(unit.driving, tuple) and unit.uses_driving
        if number != first and (batch or driven):
            title, advice = ("photo (batch)", "combine this person's photos (fused) or average them (averaged)")
            if driven:
                title, advice = ("driving photo", "remove all but one of this person's driving photos")
            raise FaceSnapError(
                f"{person_prefix(number, units)}Only the first person can use one image per {title}; {advice}."
            )
        if batch and unit.identity:
            raise FaceSnapError(
                f"{person_prefix(number, units)}One image per photo cannot be combined with the saved identity "
                f"{unit.identity}; remove the photos or the saved identity."
            )
    return [{**units, first: one} for one in _one_by_one(units[first])] if units else []


def _one_by_one(unit: Unit) -> list[Unit]:
    """The unit once for each reference photo in batch mode and for each driving photo that is in use."""
    batch = unit.reference_mode == "batch" and len(unit.references) > 1
    references = [(photo,) for photo in unit.references] if batch else [unit.references]
    driving = unit.driving if isinstance(unit.driving, tuple) else (unit.driving,)
    if not unit.uses_driving:
        driving = driving[:1]
    check_number(len(references) * len(driving))
    return [replace(unit, references=some, driving=one) for some in references for one in driving]


def person_prefix(number: int, people: Collection[int]) -> str:
    """The start of a message about one person: "Person 2: ", or empty if there is only one person."""
    return f"Person {number}: " if len(people) > 1 else ""


def reference_photos(
    values: Sequence[Any] | None, reader: PhotoReader | None = None, title: str = "Reference photo"
) -> tuple[Photo, ...]:
    """Read the reference photos that the page or the API sent, or other photos; empty entries are skipped.

    Args:
        reader: counts the photos of the job.
        title: what photos without a file name are called in messages.

    Raises:
        FaceSnapError: some photos cannot be read, and the message names each of them; or there are too many photos.
    """
    given = list(filter(None, values or ()))
    check_number(len(given))
    reader = reader or PhotoReader()
    results = [_photo_or_error(value, name, reader) for value, name in zip(given, titles_of(given, title))]
    if errors := [str(result) for result in results if isinstance(result, FaceSnapError)]:
        raise FaceSnapError(" ".join(errors))
    return tuple([result for result in results if isinstance(result, Photo)])


def _from_page(values: dict[str, Any]) -> dict[str, Any]:
    """A unit's values under their API names; an emptied component counts as unchanged."""
    values = {name: value for name, value in values.items() if value is not None}
    values |= page_settings.parse(values.pop("settings", None))
    if more := values.pop("driving_more", None):
        values["driving"] = [values.get("driving"), *more]
    return values


def _unit(values: dict[str, Any], reader: PhotoReader) -> Unit:
    known = defaults()
    if unknown := sorted(set(values) - set(known)):
        raise FaceSnapError(
            f"FaceSnap has no setting named {short_repr(unknown[0])}; its settings are {', '.join(sorted(known))}."
        )
    for name in ("references", "block_weights", "driving", "mask"):
        if values.get(name) is False or type(values.get(name)) in (int, float, dict):
            raise FaceSnapError(
                f"FaceSnap's {name} is {short_repr(values[name])}; leave it out or send "
                f"{'a list of numbers' if name == 'block_weights' else 'base64'}."
            )
    references, weights = values.get("references") or [], values.get("block_weights") or ()
    parsed = {
        "references": reference_photos(references if isinstance(references, (list, tuple)) else [references], reader),
        "block_weights": tuple(weights) if isinstance(weights, (list, tuple)) else (weights,),
    }
    mask = read_photo(values["mask"], "Region mask", reader) if values.get("mask") else None
    return from_values({**values, **parsed, "driving": _driving(values.get("driving"), reader), "mask": mask})


def _driving(value: Any, reader: PhotoReader) -> Photo | tuple[Photo, ...] | None:
    """The driving photo, or several of them."""
    given = list(filter(None, value)) if isinstance(value, (list, tuple)) else [value] if value else []
    if len(given) > 1:
        return reference_photos(given, reader, "Driving photo")
    return read_photo(given[0], titles_of(given, "Driving photo")[0], reader) if given else None


def _photo_or_error(value: Any, name: str, reader: PhotoReader) -> Photo | FaceSnapError:
    try:
        return read_photo(value, name, reader)
    except TooManyPhotosError:
        raise
    except FaceSnapError as error:
        return error


def read_photo(value: Any, name: str, reader: PhotoReader) -> Photo:
    """Read one photo that the page or the API sent.

    Raises:
        FaceSnapError: it cannot be read, is not an image, or there are too many photos.
    """
    if isinstance(value, NamedFile):
        value = value.content
    if isinstance(value, FaceSnapError):  # the reason why the page rejected it
        raise value
    if isinstance(value, (str, bytes, Path, Image)):  # text from the API is base64, never a path or a URL
        return reader.read(value, name)
    raise FaceSnapError(f"{name} is {short_repr(value)}, which is not an image; send an image file encoded in base64.")
