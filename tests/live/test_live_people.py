"""Two people in one job, in one pass and in the two of hires fix, and what the infotext says of it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from tests.live.live_host import (
    PLAIN,
    Host,
    Job,
    Pictures,
    astronaut,
    differ,
    encode,
    equal,
    grace_hopper,
    with_facesnap,
    with_people,
)
from tests.live.test_live_errors import refusal
from tests.live.test_live_pictures import HIRES, HIRES_FORGE

Baseline = Callable[[Job], Pictures]

HALF = {"region": "mask"}
ASTRONAUT = {**HALF, "references": [encode(astronaut())]}
HOPPER = {**HALF, "references": [encode(grace_hopper())]}


def half(side: int) -> str:
    """A region: the left or the right half of the picture."""
    mask = np.zeros((256, 256, 3), np.uint8)
    mask[:, 128 * side : 128 * (side + 1)] = 255
    return encode(mask)


@pytest.fixture(scope="module")
def left() -> Job:
    return {**ASTRONAUT, "mask": half(0)}


@pytest.fixture(scope="module")
def right() -> Job:
    return {**HOPPER, "mask": half(1)}


def test_each_of_two_people_counts(host: Host, baseline: Baseline, left: Job, right: Job) -> None:
    alone = [host.pictures(with_people({}, person)) for person in (left, right)]
    both = host.pictures(with_people({}, left, right))
    for other in (*alone, baseline({}), host.pictures(with_people({}, {**left, "mask": half(1)}, right))):
        assert differ(both, other)
    for nothing in ({"enabled": False}, {"weight": 0}):
        assert equal(host.pictures(with_people({}, left, {**right, **nothing})), alone[0])
        assert equal(host.pictures(with_people({}, {**left, **nothing}, right)), alone[1])
    assert equal(host.pictures({}), baseline({}))


def test_each_in_the_passes_of_their_own(host: Host, left: Job, right: Job) -> None:
    """Whoever is in no pass is as if not there, and the passes of hires fix tell people apart."""
    hires = {**HIRES, **HIRES_FORGE} if host.forge else HIRES
    one_each = host.pictures(with_people(hires, {**left, "hires": "first"}, {**right, "hires": "second"}))
    assert one_each[0].shape[:2] == (1.5 * PLAIN["height"], 1.5 * PLAIN["width"])
    assert differ(one_each, host.pictures(with_people(hires, {**left, "hires": "second"}, {**right, "hires": "first"})))
    assert differ(one_each, host.pictures(with_people(hires, {**left, "hires": "first"})))
    without_hires = with_people({}, left, {**right, "hires": "second"})
    assert equal(host.pictures(without_hires), host.pictures(with_people({}, left)))


def test_a_message_says_of_whom_it_is(host: Host, left: Job, right: Job) -> None:
    refused = refusal(host, with_people({}, left, {**right, "references": []}))
    assert re.search("Person 2: .*without a reference photo", refused.message)


def test_the_infotext_names_both(host: Host, left: Job, right: Job) -> None:
    text = host.infotext(with_people({}, {**left, "weight": 0.5}, right))
    assert re.search(r"\bFaceSnap: \d", text)
    assert "FaceSnap weight: 0.5" in text
    assert "FaceSnap 2 weight: 1.0" in text
    assert "FaceSnap" not in host.infotext({})


def test_the_likeness_stands_in_the_infotext_where_there_is_a_face(host: Host) -> None:
    """On request only. A random checkpoint draws no faces, or such as a detector takes for one."""
    job = with_facesnap({"override_settings": {"facesnap_likeness": True}})
    picture = host.pictures(job)[0]
    faces = host.post("/facesnap/detect", {"photos": [encode(picture)]})["photos"][0]["faces"]
    assert ("FaceSnap likeness: " in host.infotext(job)) == bool(faces)
    assert "FaceSnap likeness" not in host.infotext(with_facesnap({}))


def test_photos_of_a_person_each_are_jobs_one_after_the_other(host: Host) -> None:
    """With the seeds that the host counts up: each picture is that of a job with this photo and this seed alone."""
    photos = [encode(astronaut()), encode(grace_hopper())]
    together = host.pictures(with_facesnap({}, references=photos, reference_mode="batch"))[-2:]
    alone = [host.pictures(with_facesnap({"seed": 1 + i}, references=[photo]))[0] for i, photo in enumerate(photos)]
    assert equal(together, alone)
    assert differ(together[:1], together[1:])
