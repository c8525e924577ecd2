"""Two people in one job, with and without hires fix, and the infotext of such jobs."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from tests.live.live_host import (
    PLAIN,
    Host,
    Images,
    Job,
    astronaut,
    differ,
    encode,
    equal,
    grace_hopper,
    with_facesnap,
    with_people,
)
from tests.live.test_live_errors import refusal
from tests.live.test_live_images import hires_job

Baseline = Callable[[Job], Images]

MASKED = {"region": "mask"}
ASTRONAUT = {**MASKED, "references": [encode(astronaut())]}
HOPPER = {**MASKED, "references": [encode(grace_hopper())]}


def half(side: int) -> str:
    """A mask of the left (0) or right (1) half of the image."""
    mask = np.zeros((256, 256, 3), np.uint8)
    mask[:, 128 * side : 128 * (side + 1)] = 255
    return encode(mask)


@pytest.fixture(scope="module")
def left() -> Job:
    return {**ASTRONAUT, "mask": half(0)}


@pytest.fixture(scope="module")
def right() -> Job:
    return {**HOPPER, "mask": half(1)}


def test_each_of_two_people_changes_the_image(host: Host, baseline: Baseline, left: Job, right: Job) -> None:
    alone = [host.images(with_people({}, person)) for person in (left, right)]
    both = host.images(with_people({}, left, right))
    for other in (*alone, baseline({}), host.images(with_people({}, {**left, "mask": half(1)}, right))):
        assert differ(both, other)
    for off in ({"enabled": False}, {"weight": 0}):
        assert equal(host.images(with_people({}, left, {**right, **off})), alone[0])
        assert equal(host.images(with_people({}, {**left, **off}, right)), alone[1])
    assert equal(host.images({}), baseline({}))


def test_each_person_acts_only_in_their_passes_of_hires_fix(host: Host, left: Job, right: Job) -> None:
    """A person who is not active in any of the job's passes has no effect."""
    hires = hires_job(host)
    passes = host.images(with_people(hires, {**left, "hires": "first"}, {**right, "hires": "second"}))
    assert passes[0].shape[:2] == (1.5 * PLAIN["height"], 1.5 * PLAIN["width"])
    assert differ(passes, host.images(with_people(hires, {**left, "hires": "second"}, {**right, "hires": "first"})))
    assert differ(passes, host.images(with_people(hires, {**left, "hires": "first"})))
    without_hires = with_people({}, left, {**right, "hires": "second"})
    assert equal(host.images(without_hires), host.images(with_people({}, left)))


def test_a_message_names_the_person(host: Host, left: Job, right: Job) -> None:
    refused = refusal(host, with_people({}, left, {**right, "references": []}))
    assert re.search("Person 2: .*without a reference photo", refused.message)


def test_infotext_contains_both_people(host: Host, left: Job, right: Job) -> None:
    text = host.infotext(with_people({}, {**left, "weight": 0.5}, right))
    assert re.search(r"\bFaceSnap: \d", text)
    assert "FaceSnap weight: 0.5" in text
    assert "FaceSnap 2 weight: 1.0" in text
    assert "FaceSnap" not in host.infotext({})


def test_infotext_contains_the_likeness_if_the_image_has_a_face(host: Host) -> None:
    """Likeness is measured only if enabled in the settings. With a random checkpoint, a face is detected only by
    accident."""
    job = with_facesnap({"override_settings": {"facesnap_likeness": True}})
    image = host.images(job)[0]
    faces = host.post("/facesnap/detect", {"photos": [encode(image)]})["photos"][0]["faces"]
    assert ("FaceSnap likeness: " in host.infotext(job)) == bool(faces)
    assert "FaceSnap likeness" not in host.infotext(with_facesnap({}))


def test_batch_mode_equals_separate_jobs_for_each_photo(host: Host) -> None:
    """The host increments the seed for each photo."""
    photos = [encode(astronaut()), encode(grace_hopper())]
    together = host.images(with_facesnap({}, references=photos, reference_mode="batch"))[-2:]
    alone = [host.images(with_facesnap({"seed": 1 + i}, references=[photo]))[0] for i, photo in enumerate(photos)]
    assert equal(together, alone)
    assert differ(together[:1], together[1:])
