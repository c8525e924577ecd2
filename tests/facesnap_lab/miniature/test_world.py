"""The miniature world: reproducible, consistent with its landmarks, and with captions that do not reveal identity."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.landmarks.points72 import five_points
from facesnap_lab.miniature import dataset
from facesnap_lab.miniature.captions import EXPRESSIONS, HAIR, HAIR_COLOURS, LIGHTS, WORDS
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.words import BEGIN, END, UNKNOWN, tokenise, vocabulary_ids, write_tokenizer
from facesnap_lab.miniature.world import SPLITS, person, scene

SIDE = 64


def arrays(thing):
    return {name: np.asarray(value) for name, value in vars(thing).items() if value is not None}


@given(st.sampled_from(sorted(SPLITS)), st.integers(0, 10**6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_people_and_scenes_are_reproducible(split, index, shot):
    who, again = person(split, index), person(split, index)
    for first, second in ((who, again), (scene(who, shot), scene(again, shot))):
        assert all(np.array_equal(value, arrays(second)[name]) for name, value in arrays(first).items())


def test_splits_share_no_people_and_scenes_vary():
    shapes = [person(split, index).shape for split in SPLITS for index in range(40)]
    assert len({shape.tobytes() for shape in shapes}) == len(shapes)
    who = person("test", 0)
    poses = [scene(who, shot).pose for shot in range(8)]
    assert np.ptp(poses, axis=0)[:3].min() > 0.05


def test_same_scene_gives_the_same_image():
    who = person("train", 5)
    what = scene(who, 2)
    one, other = render([who, who], [what, what], SIDE)
    assert np.array_equal(one.picture, other.picture)
    assert one.picture.std() > 20


@pytest.fixture(scope="module")
def pictures():
    people = [person("train", index) for index in range(24)]
    scenes = [scene(who, 0) for who in people]
    return people, scenes, render(people, scenes, SIDE)


def test_landmarks_match_the_features_in_the_image(pictures):
    """In the eyes, the pupil is darker than the white next to it along the eye's axis."""
    people, _, renderings = pictures
    darker = []
    for who, rendering in zip(people, renderings):
        if who.glasses is not None:
            continue
        grey = rendering.picture.astype(float).mean(2)
        for left, right, middle in ((36, 40, 0), (44, 48, 1)):
            centre = five_points(rendering.points)[middle]
            white = centre + 0.62 * (rendering.points[left] - rendering.points[right]) / 2
            darker.append(_at(grey, white) - _at(grey, centre))
    assert np.mean(np.array(darker) > 0) > 0.9


def _at(grey, point):
    x, y = np.clip(point.astype(int), 0, SIDE - 1)
    return grey[y, x]


def test_mask_covers_the_head(pictures):
    """All points except the jaw line are inside the mask; the corners of the image are outside."""
    _, _, renderings = pictures
    for rendering in renderings:
        inner = np.clip(rendering.points[17:].astype(int), 0, SIDE - 1)
        assert (rendering.mask[inner[:, 1], inner[:, 0]] == 255).mean() > 0.97
        assert rendering.mask[SIDE - 1, 0] == 0
        left, top, right, bottom = rendering.box
        assert (rendering.points >= (left - 1e-3, top)).all()
        assert (rendering.points <= (right + 1e-3, bottom + 1e-3)).all()


def test_image_follows_the_pose_of_its_scene(pictures):
    """Turning the head moves the tip of the nose."""
    people, scenes, _ = pictures
    turned = [dataclasses.replace(what, pose=what.pose * (1, 0, 1, 1, 1, 1) + (0, 0.3, 0, 0, 0, 0)) for what in scenes]
    back = [dataclasses.replace(what, pose=what.pose * (1, 0, 1, 1, 1, 1) - (0, 0.3, 0, 0, 0, 0)) for what in scenes]
    one, other = (render(people, how, SIDE) for how in (turned, back))
    moved = [a.points[30, 0] - b.points[30, 0] for a, b in zip(one, other)]
    assert min(moved) > 5


def test_captions_describe_the_scene_but_not_the_person():
    personal = set(HAIR) | (set(HAIR_COLOURS) - {"black", "red", "grey"}) | {"hair", "beard", "glasses"}
    for index in range(200):
        who = person("train", index)
        for shot in range(2):
            what = scene(who, shot)
            caption, for_clip = dataset.captions_of(who, what, shot)
            words = set(caption.replace(",", "").split())
            assert not words & personal
            assert for_clip.split(" with ")[-1].split()[0] in HAIR
    # the scene is drawn from its own seed, so captions hardly differ between people
    counts = np.zeros((2, len(EXPRESSIONS)))
    for half in range(2):
        for index in range(half * 400, half * 400 + 400):
            counts[half, EXPRESSIONS.index(scene(person("train", index), 0).expression)] += 1
    assert np.abs(counts[0] - counts[1]).max() < 60
    assert {scene(person("train", index), 0).light for index in range(60)} == set(LIGHTS)


def test_every_word_is_one_token_in_both_tokenizers(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    ids = vocabulary_ids()
    for word in WORDS:
        assert tokenizer(word).input_ids == [ids[BEGIN], ids[f"{word}</w>"], ids[END]]
    caption = "portrait of a smiling person in a red shirt, blue background, light from left"
    assert tokenizer(caption).input_ids == tokenise(caption)
    assert ids[UNKNOWN] in tokenise("portrait of a zebra")
    # transformers treats an end token with id 2 differently
    assert ids[END] != 2


def test_dataset_holds_the_renderings(tmp_path):
    dataset.build(tmp_path, "test", people=3, shots=2, workers=1)
    world = dataset.load(tmp_path)
    who = person("test", 2)
    rendering = render([who] * 2, [scene(who, shot) for shot in range(2)], dataset.SIDE)[
        1
    ]  # rounding depends on the batch
    assert np.array_equal(world.pictures[5], rendering.picture)
    assert np.array_equal(world.masks[5], rendering.mask)
    np.testing.assert_allclose(world.points[5], rendering.points, atol=1e-3)
    assert world.people.tolist() == [0, 0, 1, 1, 2, 2]
    assert (world.captions[5], world.clip_captions[5]) == dataset.captions_of(who, scene(who, 1), 1)
