"""The second edition's world: reproducible, with looks that change and people who stay, and traits that can be seen."""

import dataclasses

import numpy as np
import pytest

from facesnap_lab.miniature.captions import HAIR_COLOURS
from facesnap_lab.miniature.head import MOUTH, SHAPES
from facesnap_lab.miniature.second.dataset import caption
from facesnap_lab.miniature.second.render import render
from facesnap_lab.miniature.second.world import (
    FRAME_CONTRAST,
    LOOK_TRAITS,
    MOLE_GAP,
    NAMED_SHAPES,
    PERSON_TRAITS,
    SHOTS_PER_LOOK,
    differs,
    dress,
    exchange,
    look,
    person,
    scene,
    subject,
)
from facesnap_lab.miniature.world import SPLITS

SIDE = 64
PEOPLE = [person(split, index) for split in SPLITS for index in range(100)]


def same(one, other):
    return all(np.array_equal(value, getattr(other, name)) for name, value in vars(one).items())


@pytest.fixture(scope="module")
def plain():
    """A person with a plain look, seen from the front at rest, and the scene."""
    who = person("test", 3)
    style = dataclasses.replace(look(who, 0), hair="bald", glasses=None, beard=0.0, lipstick=None, eye_shadow=None)
    what = scene(who, 0)
    return dress(who, style), dataclasses.replace(what, codes=0 * what.codes, pose=0 * what.pose)


def difference(one, other, what):
    first, second = (r.picture.astype(float) for r in render([one, other], [what, what], SIDE))
    return np.abs(first - second).mean(2)


def test_people_looks_and_images_are_reproducible():
    for split in SPLITS:
        assert same(person(split, 7), person(split, 7))
        assert same(subject(split, 7, 4), subject(split, 7, 4))
    who, what = subject("train", 5, 2), scene(person("train", 5), 2)
    one, other = render([who, who], [what, what], SIDE)
    assert np.array_equal(one.picture, other.picture)
    assert one.picture.std() > 20


def test_splits_share_no_people():
    assert len({who.shape.tobytes() for who in PEOPLE}) == len(PEOPLE)


def test_person_stays_while_the_look_changes():
    who = person("train", 1)
    shots = [subject("train", 1, shot) for shot in range(8 * SHOTS_PER_LOOK)]
    for name in vars(who):
        if name != "lips":  # lipstick covers them
            assert all(np.array_equal(getattr(one, name), getattr(who, name)) for one in shots), name
    looks = {(one.hair_rgb.tobytes(), one.hairline) for one in shots}
    assert len(looks) == 8
    assert all(same(one, shots[0]) for one in shots[:SHOTS_PER_LOOK])
    assert len({scene(who, shot).pose.tobytes() for shot in range(SHOTS_PER_LOOK)}) == SHOTS_PER_LOOK


def test_looks_do_not_reveal_the_person():
    """Between people, the share of each part of a look differs no more than chance allows."""
    looks = [[look(who, number) for number in range(40)] for who in PEOPLE[:60]]
    for present in (lambda x: x.glasses is not None, lambda x: x.beard > 0, lambda x: x.hair == "long"):
        shares = np.array([[present(one) for one in row] for row in looks]).mean(1)
        chance = np.sqrt(shares.mean() * (1 - shares.mean()) / 40)
        assert 0.7 * chance < shares.std() < 1.3 * chance


def test_moles_have_their_size_and_keep_clear_of_mouth_eyes_and_each_other():
    counts = set()
    for who in PEOPLE:
        counts.add(len(who.moles))
        x, y, radius = who.moles.T
        assert radius.min() >= 0.0035
        assert radius.max() <= 0.006
        assert not ((np.abs(x) < 0.025 + 0.006) & (np.abs(y - MOUTH) < 0.011 + 0.006)).any()
        assert y.max() < 0.024 - 0.0082 - 0.006
        gaps = np.hypot(x[:, None] - x, y[:, None] - y) + np.eye(len(x))
        assert gaps.min() >= MOLE_GAP
    assert counts == {1, 2, 3, 4}


def test_frames_contrast_with_the_skin():
    frames = [(who, look(who, number).glasses) for who in PEOPLE for number in range(5)]
    distances = [np.linalg.norm(frame - who.skin) for who, frame in frames if frame is not None]
    assert len(distances) > 100
    assert min(distances) >= FRAME_CONTRAST


def test_irises_are_continuous():
    assert len({tuple(who.iris.round(3)) for who in PEOPLE}) > 0.95 * len(PEOPLE)


@pytest.mark.parametrize("name", [name for name in NAMED_SHAPES if name not in SHAPES])
def test_new_shapes_can_be_seen_from_the_front(plain, name):
    who, what = plain
    shapes = np.zeros((2, len(who.shape)))
    shapes[:, list(NAMED_SHAPES).index(name)] = (-1.5, 1.5)
    one, other = (dataclasses.replace(who, shape=shape) for shape in shapes)
    assert (difference(one, other, what) > 20).sum() >= 8


@pytest.mark.parametrize("trait", PERSON_TRAITS + LOOK_TRAITS)
def test_exchanged_trait_can_be_seen_and_others_stay(plain, trait):
    who, what = plain
    visible = []
    for index in range(10, 16):
        dressed = (dress(person("test", index), look(person("test", index), number)) for number in range(99))
        changed = exchange(who, next(one for one in dressed if differs(who, one, trait)), trait)
        visible.append((difference(who, changed, what) > 20).sum())
        kept = [name for name in vars(who) if np.array_equal(getattr(changed, name), getattr(who, name))]
        assert len(kept) >= len(vars(who)) - 5
    assert np.median(visible) >= 8, visible


def test_mole_can_be_seen_on_a_beard(plain):
    who, what = plain
    bearded = dataclasses.replace(
        who, beard=0.9, beard_top=-0.02, hair_rgb=np.array([0.08, 0.07, 0.07]), moles=np.array([[0.012, -0.068, 0.004]])
    )
    shaved = dataclasses.replace(bearded, moles=np.zeros((0, 3)))
    assert (difference(bearded, shaved, what) > 20).sum() >= 4


def test_captions_do_not_describe_the_person():
    texts = [caption("train", index, shot) for index in range(30) for shot in range(3)]
    assert len(set(texts)) > 60
    words = {word for text in texts for word in text.replace(",", "").split()}
    assert not words & {"hair", "beard", "glasses", "bald", "brown", "blonde"}
    assert "brown" in HAIR_COLOURS
