"""Shards: what is written, what is read, in which order, and what happens to damaged ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.points72 import Landmarks, draw, five_points
from facesnap_lab.training.data import Pictures, Shapes, batch_rows, read_batches
from facesnap_lab.training.shards import read_index, write_shards
from tests.support.training_world import SIDE, samples

SHAPES = Shapes(resolution=SIDE, latent_side=8, drawing_side=64, clip_side=28)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"), samples(), per_shard=4)


def pictures(shards, shapes=SHAPES, seed=0, reference="other", landmarks="drawn", jitter=0.0) -> Pictures:
    return Pictures(read_index(shards), shapes, seed, reference, landmarks, jitter)


def test_equal_samples_give_equal_bytes(shards, tmp_path):
    again = write_shards(tmp_path, samples(), per_shard=4)
    assert [path.name for path in again] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


def test_webdataset_reads_them_and_people_stay_together(shards):
    import webdataset

    stored = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False).decode("rgb8"))
    for sample, read in zip(samples(), stored, strict=True):
        assert read["__key__"] == sample.key
        np.testing.assert_array_equal(read["png"], sample.picture)
        np.testing.assert_array_equal(read["npy"], sample.embedding)
        assert read["json"]["caption"] == sample.caption
        np.testing.assert_allclose(read["json"]["points"], sample.points, atol=1e-4)
    homes = {(read["json"]["person"], read["__url__"]) for read in stored}
    assert len(homes) == 5  # nobody is in two shards


def test_a_sample_comes_back_whole(shards):
    data = pictures(shards)
    for number, sample in enumerate(samples()):
        read = data.read(number)
        np.testing.assert_array_equal(read.picture, sample.picture)
        np.testing.assert_array_equal(read.mask, sample.mask)
        np.testing.assert_array_equal(read.embedding, sample.embedding)
        np.testing.assert_allclose(read.points, sample.points, atol=1e-4)
        assert (read.caption, read.person) == (sample.caption, sample.person)


def test_jpegs_are_read(shards, tmp_path):
    from webdataset import TarWriter

    from facesnap_lab.training.shards import _members

    sample = next(samples())
    members = _members(sample)
    Image.fromarray(sample.picture).save(tmp_path / "p.jpg", quality=95)
    members["jpg"] = (tmp_path / "p.jpg").read_bytes()
    del members["png"]
    with TarWriter(str(tmp_path / "jpeg.tar"), encoder=False) as tar:
        tar.write({"__key__": "000000-00", **members})
    read = pictures([tmp_path / "jpeg.tar"]).read(0)
    assert np.abs(read.picture.astype(int) - sample.picture).mean() < 3


def test_an_epoch_has_every_picture_once_in_an_order_of_its_own(shards):
    data = pictures(shards)
    epochs = [[tuple(data[row]["points"].flatten().tolist()) for row in range(15 * e, 15 * e + 15)] for e in (0, 1)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 15
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_the_reference_is_another_picture_of_the_same_person(shards):
    stored = list(samples())
    by_embedding = {sample.embedding.tobytes(): sample for sample in stored}
    data, seen = pictures(shards), set()
    for row in range(60):
        item = data[row]
        reference = by_embedding[item["embeddings"].numpy().tobytes()]
        own = next(sample for sample in stored if np.allclose(sample.points, item["points"].numpy(), atol=1e-3))
        assert reference.person == own.person
        assert reference.key != own.key
        np.testing.assert_array_equal(item["references"].numpy(), reference.picture)
        seen.add((own.key, reference.key))
    assert len({pair for pair in seen if pair[0] == "000000-00"}) == 2  # both others have their turn
    same = pictures(shards, reference="same")[7]
    np.testing.assert_array_equal(
        same["references"].numpy(), ((same["pictures"] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    )


def test_a_person_with_one_picture_is_their_own_reference(tmp_path):
    item = pictures(write_shards(tmp_path, samples(people=2, each=1), per_shard=4))[0]
    np.testing.assert_array_equal(
        item["references"].numpy(), ((item["pictures"] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    )


def test_what_the_networks_see(shards):
    data = pictures(shards)
    item = data[3]
    sample = next(s for s in samples() if np.allclose(s.points, item["points"].numpy(), atol=1e-3))
    assert item["pictures"].shape == (3, SIDE, SIDE)
    np.testing.assert_array_equal(((item["pictures"] + 1) * 127.5).round().permute(1, 2, 0).numpy(), sample.picture)
    cells = sample.mask.reshape(8, 4, 8, 4).mean((1, 3)) / 255
    np.testing.assert_allclose(item["masks"][0].numpy(), cells, atol=1e-6)
    assert (item["masks"][0].numpy()[cells == 0] == 0).all()
    drawn = draw(Landmarks(item["points"].numpy(), SIDE, SIDE), 64, 64)
    np.testing.assert_array_equal((255 * item["drawings"]).round().permute(1, 2, 0).numpy(), drawn)
    np.testing.assert_allclose(item["keypoints"].numpy(), five_points(sample.points) - 0.5, atol=1e-3)
    assert item["clip_pixels"].shape == (3, 28, 28)


def test_points_follow_the_resolution(shards):
    small, large = (pictures(shards, Shapes(side, side // 4, side, 28))[0] for side in (SIDE, 2 * SIDE))
    torch.testing.assert_close(2 * small["points"], large["points"])
    assert large["pictures"].shape == (3, 2 * SIDE, 2 * SIDE)
    assert large["references"].shape == (2 * SIDE, 2 * SIDE, 3)


def test_jitter_moves_the_drawing_alone(shards):
    still, moved, again = (pictures(shards, jitter=jitter)[2] for jitter in (0.0, 1.0, 1.0))
    assert not still["drawings"].equal(moved["drawings"])
    assert moved["drawings"].equal(again["drawings"])
    torch.testing.assert_close(still["keypoints"], moved["keypoints"])


def test_without_landmarks_the_drawing_is_black(shards):
    assert pictures(shards, landmarks="none")[0]["drawings"].abs().max() == 0


@given(batch_size=st.integers(1, 5), first=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_two_processes_see_what_one_with_twice_the_batch_sees(batch_size, first):
    one = list(batch_rows(2 * batch_size, 0, 1, first, first + 3))
    two = [list(batch_rows(batch_size, process, 2, first, first + 3)) for process in (0, 1)]
    assert one == [left + right for left, right in zip(*two)]


def test_workers_and_place_change_nothing(shards):
    data = pictures(shards, jitter=1.0)
    own = list(read_batches(data, batch_rows(2, 0, 1, 5, 8), workers=0))
    others = list(read_batches(pictures(shards, jitter=1.0), batch_rows(2, 0, 1, 6, 8), workers=1))
    for one, other in zip(own[1:], others, strict=True):
        assert one.captions == other.captions
        for name, tensor in vars(one).items():
            if name != "captions":
                assert torch.equal(tensor, getattr(other, name)), name


class Deadly(Pictures):
    def read(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_for_the_user(shards):
    data = Deadly(read_index(shards), SHAPES, 0, "other", "drawn", 0.0)
    with pytest.raises(FaceSnapError, match="A process that reads pictures died"):
        next(read_batches(data, batch_rows(1, 0, 1, 0, 2), workers=1))


@given(part=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_a_shard_cut_anywhere_is_refused_by_name(shards, tmp_path_factory, part):
    whole = shards[0].read_bytes()
    end = len(whole.rstrip(b"\0"))
    cut = tmp_path_factory.mktemp("cut") / "cut.tar"
    cut.write_bytes(whole[: int(part * end)])
    with pytest.raises(FaceSnapError, match=r"cut\.tar"):
        read_index([cut])


def test_a_shard_cut_between_two_samples_is_refused(shards, tmp_path):
    index = read_index(shards[:1])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shards[0].read_bytes()[: index.end[2]])
    with pytest.raises(FaceSnapError, match=r"cut\.tar is cut short"):
        read_index([cut])


@pytest.mark.parametrize("missing", ["png", "mask.png", "npy", "json"])
def test_a_sample_without_a_part_is_refused(missing, tmp_path):
    from webdataset import TarWriter

    from facesnap_lab.training.shards import _members

    members = _members(next(samples()))
    del members[missing]
    with TarWriter(str(tmp_path / "odd.tar"), encoder=False) as tar:
        tar.write({"__key__": "000000-00", **members})
    with pytest.raises(FaceSnapError, match=rf"000000-00 in .*odd\.tar has no {missing}"):
        read_index([tmp_path / "odd.tar"])


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    from webdataset import TarWriter

    with pytest.raises(FaceSnapError, match=r"no shard .*none\.tar"):
        read_index([tmp_path / "none.tar"])
    TarWriter(str(tmp_path / "empty.tar")).close()
    (tmp_path / "text.tar").write_text("not a tar, but long enough to be looked at " * 40)
    for name in ("empty", "text"):
        with pytest.raises(FaceSnapError, match=rf"{name}\.tar"):
            read_index([tmp_path / f"{name}.tar"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_an_error_that_names_the_shard_in_one_line(shards, tmp_path, workers):
    index = read_index(shards[:1])
    content = bytearray(shards[0].read_bytes())
    picture = content.find(b"\x89PNG")
    content[picture : picture + 64] = bytes(64)
    bad = tmp_path / "bad.tar"
    bad.write_bytes(content)
    data = Pictures(read_index([bad]), SHAPES, 0, "same", "drawn", 0.0)
    with pytest.raises(FaceSnapError, match=r"bad\.tar, is damaged") as error:
        list(read_batches(data, batch_rows(len(index), 0, 1, 0, 1), workers))
    assert "\n" not in str(error.value)
