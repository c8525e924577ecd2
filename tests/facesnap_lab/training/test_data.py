"""Shards: what is written and read, in which order, and what happens if they are damaged."""

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
from facesnap_ext.landmarks.points5 import draw_five
from facesnap_ext.landmarks.points72 import Landmarks, draw, five_points
from facesnap_ext.weights.facesnap_file import POINTS5
from facesnap_lab.training.data import ImageSizes, TrainingImages, batch_rows, read_batches
from facesnap_lab.training.shard_writer import write_shards
from facesnap_lab.training.shards import read_shard_index
from tests.support.training_world import SIDE, samples

SIZES = ImageSizes(resolution=SIDE, latent_side=8, landmark_side=64, clip_side=28)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"), samples(), per_shard=4)


def training_images(shards, sizes=SIZES, seed=0, reference="other", landmarks="drawn", jitter=0.0) -> TrainingImages:
    return TrainingImages(read_shard_index(shards), sizes, seed, reference, landmarks, jitter)


def test_equal_samples_give_identical_shards(shards, tmp_path):
    again = write_shards(tmp_path, samples(), per_shard=4)
    assert [path.name for path in again] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


def test_webdataset_reads_shards_and_people_are_not_split(shards):
    import webdataset

    stored = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False).decode("rgb8"))
    for sample, read in zip(samples(), stored, strict=True):
        assert read["__key__"] == sample.key
        np.testing.assert_array_equal(read["png"], sample.image)
        np.testing.assert_array_equal(read["npy"], sample.embedding)
        assert read["json"]["caption"] == sample.caption
        np.testing.assert_allclose(read["json"]["points"], sample.points, atol=1e-4)
    shard_of_person = {(read["json"]["person"], read["__url__"]) for read in stored}
    assert len(shard_of_person) == 5  # no person is in two shards


def test_sample_is_read_as_it_was_written(shards):
    data = training_images(shards)
    for number, sample in enumerate(samples()):
        read = data.read(number)
        np.testing.assert_array_equal(read.image, sample.image)
        np.testing.assert_array_equal(read.mask, sample.mask)
        np.testing.assert_array_equal(read.embedding, sample.embedding)
        np.testing.assert_allclose(read.points, sample.points, atol=1e-4)
        assert (read.caption, read.person) == (sample.caption, sample.person)


def test_jpeg_images_are_read(shards, tmp_path):
    from webdataset import TarWriter

    from facesnap_lab.training.shard_writer import _members

    sample = next(samples())
    members = _members(sample)
    Image.fromarray(sample.image).save(tmp_path / "p.jpg", quality=95)
    members["jpg"] = (tmp_path / "p.jpg").read_bytes()
    del members["png"]
    with TarWriter(str(tmp_path / "jpeg.tar"), encoder=False) as tar:
        tar.write({"__key__": "000000-00", **members})
    read = training_images([tmp_path / "jpeg.tar"]).read(0)
    assert np.abs(read.image.astype(int) - sample.image).mean() < 3


def test_each_epoch_contains_every_image_once_in_a_different_order(shards):
    data = training_images(shards)
    epochs = [[tuple(data[row]["points"].flatten().tolist()) for row in range(15 * e, 15 * e + 15)] for e in (0, 1)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 15
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_reference_is_another_image_of_the_same_person(shards):
    stored = list(samples())
    by_embedding = {sample.embedding.tobytes(): sample for sample in stored}
    data, seen = training_images(shards), set()
    for row in range(60):
        item = data[row]
        reference = by_embedding[item["embeddings"].numpy().tobytes()]
        own = next(sample for sample in stored if np.allclose(sample.points, item["points"].numpy(), atol=1e-3))
        assert reference.person == own.person
        assert reference.key != own.key
        np.testing.assert_array_equal(item["references"].numpy(), reference.image)
        np.testing.assert_allclose(item["reference_points"].numpy(), reference.points, atol=1e-3)
        seen.add((own.key, reference.key))
    assert len({pair for pair in seen if pair[0] == "000000-00"}) == 2  # both other images of the person occur
    same = training_images(shards, reference="same")[7]
    np.testing.assert_array_equal(
        same["references"].numpy(), ((same["images"] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    )


def test_only_image_of_a_person_is_its_own_reference(tmp_path):
    item = training_images(write_shards(tmp_path, samples(people=2, images_each=1), per_shard=4))[0]
    np.testing.assert_array_equal(
        item["references"].numpy(), ((item["images"] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    )


def test_inputs_of_the_networks_match_the_sample(shards):
    data = training_images(shards)
    item = data[3]
    sample = next(s for s in samples() if np.allclose(s.points, item["points"].numpy(), atol=1e-3))
    assert item["images"].shape == (3, SIDE, SIDE)
    np.testing.assert_array_equal(((item["images"] + 1) * 127.5).round().permute(1, 2, 0).numpy(), sample.image)
    cells = sample.mask.reshape(8, 4, 8, 4).mean((1, 3)) / 255
    np.testing.assert_allclose(item["masks"][0].numpy(), cells, atol=1e-6)
    assert (item["masks"][0].numpy()[cells == 0] == 0).all()
    expected = draw(Landmarks(item["points"].numpy(), SIDE, SIDE), 64, 64)
    np.testing.assert_array_equal((255 * item["landmark_images"]).round().permute(1, 2, 0).numpy(), expected)
    np.testing.assert_allclose(item["keypoints"].numpy(), five_points(sample.points) - 0.5, atol=1e-3)
    assert item["clip_pixels"].shape == (3, 28, 28)


def test_points_scale_with_the_resolution(shards):
    small, large = (training_images(shards, ImageSizes(side, side // 4, side, 28))[0] for side in (SIDE, 2 * SIDE))
    torch.testing.assert_close(2 * small["points"], large["points"])
    torch.testing.assert_close(2 * small["reference_points"], large["reference_points"])
    assert large["images"].shape == (3, 2 * SIDE, 2 * SIDE)
    assert large["references"].shape == (2 * SIDE, 2 * SIDE, 3)


def test_jitter_changes_only_the_landmark_image(shards):
    still, moved, again = (training_images(shards, jitter=jitter)[2] for jitter in (0.0, 1.0, 1.0))
    assert not still["landmark_images"].equal(moved["landmark_images"])
    assert moved["landmark_images"].equal(again["landmark_images"])
    torch.testing.assert_close(still["keypoints"], moved["keypoints"])


def test_landmark_image_is_of_the_kind_that_the_network_takes(shards):
    item = TrainingImages(read_shard_index(shards), SIZES, 0, "other", "drawn", 0.0, POINTS5)[0]
    expected = draw_five(Landmarks(item["points"].numpy(), SIDE, SIDE), 64, 64)
    np.testing.assert_array_equal((255 * item["landmark_images"]).round().permute(1, 2, 0).numpy(), expected)


def test_landmark_image_is_black_without_landmarks(shards):
    assert training_images(shards, landmarks="none")[0]["landmark_images"].abs().max() == 0


@given(batch_size=st.integers(1, 5), first=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_two_processes_get_the_same_rows_as_one_with_twice_the_batch_size(batch_size, first):
    one = list(batch_rows(2 * batch_size, 0, 1, first, first + 3))
    two = [list(batch_rows(batch_size, process, 2, first, first + 3)) for process in (0, 1)]
    assert one == [left + right for left, right in zip(*two)]


def test_batches_do_not_depend_on_workers_or_first_batch(shards):
    data = training_images(shards, jitter=1.0)
    own = list(read_batches(data, batch_rows(2, 0, 1, 5, 8), workers=0))
    others = list(read_batches(training_images(shards, jitter=1.0), batch_rows(2, 0, 1, 6, 8), workers=1))
    for one, other in zip(own[1:], others, strict=True):
        assert one.captions == other.captions
        for name, tensor in vars(one).items():
            if name != "captions":
                assert torch.equal(tensor, getattr(other, name)), name


class KilledWhileReading(TrainingImages):
    def read(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_gives_a_facesnap_error(shards):
    data = KilledWhileReading(read_shard_index(shards), SIZES, 0, "other", "drawn", 0.0)
    with pytest.raises(FaceSnapError, match="A process that reads images died"):
        next(read_batches(data, batch_rows(1, 0, 1, 0, 2), workers=1))


@given(part=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_shard_truncated_anywhere_is_rejected_by_name(shards, tmp_path_factory, part):
    whole = shards[0].read_bytes()
    end = len(whole.rstrip(b"\0"))
    cut = tmp_path_factory.mktemp("cut") / "cut.tar"
    cut.write_bytes(whole[: int(part * end)])
    with pytest.raises(FaceSnapError, match=r"cut\.tar"):
        read_shard_index([cut])


def test_shard_truncated_between_two_samples_is_rejected(shards, tmp_path):
    index = read_shard_index(shards[:1])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shards[0].read_bytes()[: index.end[2]])
    with pytest.raises(FaceSnapError, match=r"cut\.tar is truncated"):
        read_shard_index([cut])


@pytest.mark.parametrize("missing", ["png", "mask.png", "npy", "json"])
def test_incomplete_sample_is_rejected(missing, tmp_path):
    from webdataset import TarWriter

    from facesnap_lab.training.shard_writer import _members

    members = _members(next(samples()))
    del members[missing]
    with TarWriter(str(tmp_path / "odd.tar"), encoder=False) as tar:
        tar.write({"__key__": "000000-00", **members})
    with pytest.raises(FaceSnapError, match=rf"000000-00 in .*odd\.tar has no {missing}"):
        read_shard_index([tmp_path / "odd.tar"])


def test_missing_empty_and_foreign_files_are_rejected(tmp_path):
    from webdataset import TarWriter

    with pytest.raises(FaceSnapError, match=r"The shard .*none\.tar does not exist"):
        read_shard_index([tmp_path / "none.tar"])
    TarWriter(str(tmp_path / "empty.tar")).close()
    (tmp_path / "text.tar").write_text("not a tar, but long enough to be read " * 40)
    for name in ("empty", "text"):
        with pytest.raises(FaceSnapError, match=rf"{name}\.tar"):
            read_shard_index([tmp_path / f"{name}.tar"])


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_gives_a_one_line_error_that_names_the_shard(shards, tmp_path, workers):
    index = read_shard_index(shards[:1])
    content = bytearray(shards[0].read_bytes())
    start = content.find(b"\x89PNG")
    content[start : start + 64] = bytes(64)
    bad = tmp_path / "bad.tar"
    bad.write_bytes(content)
    data = TrainingImages(read_shard_index([bad]), SIZES, 0, "same", "drawn", 0.0)
    with pytest.raises(FaceSnapError, match=r"bad\.tar, is damaged") as error:
        list(read_batches(data, batch_rows(len(index), 0, 1, 0, 1), workers))
    assert "\n" not in str(error.value)
