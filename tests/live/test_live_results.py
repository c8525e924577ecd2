"""The settings for finished images: order, selection, strips, and the likeness to each person.

With a random checkpoint, no image has a face, so all images are kept in the order in which they are made.
"""

from __future__ import annotations

import json

import pytest

from tests.live.live_host import PLAIN, Host, Job, decode, encode, equal, with_facesnap
from tests.live.test_live_plot import plot

THREE = {"n_iter": 3}


def run(host: Host, job: Job, **settings: object) -> tuple[list, Job]:
    """The images of a job with these settings, and the host's information about them."""
    options = {f"facesnap_{name}": value for name, value in settings.items()}
    answer = host.post("/sdapi/v1/txt2img", {**PLAIN, **job, "override_settings": options})
    return [decode(image) for image in answer["images"]], json.loads(answer["info"])


@pytest.mark.parametrize("settings", [{"best_first": True}, {"keep_best": 1}, {"keep_best": 2, "best_first": True}])
@pytest.mark.parametrize("save", [False, True])
def test_images_without_a_face_are_all_kept_in_order(host: Host, settings: Job, save: bool) -> None:
    job = with_facesnap({**THREE, "save_images": save})
    expected, before = run(host, job)
    images, info = run(host, job, **settings)
    first, start = info["index_of_first_image"], before["index_of_first_image"]
    assert equal(images[first:], expected[start:])
    assert info["all_seeds"] == before["all_seeds"]
    assert info["infotexts"][first:] == before["infotexts"][start:]
    assert len(info["infotexts"]) == len(images)


def test_a_strip_follows_its_image_with_the_same_infotext(host: Host) -> None:
    job = with_facesnap({"n_iter": 2, "save_images": False})
    expected, before = run(host, job)
    images, info = run(host, job, strip=True)
    count, first = len(expected), info["index_of_first_image"]
    assert equal(images[:count], expected)
    strips = images[count:]
    assert [strip.shape for strip in strips] == [(256, 2 * 256 + 3, 3)] * 2
    assert equal([strip[:, -256:] for strip in strips], images[first:count])
    assert info["infotexts"][count:] == info["infotexts"][first:count] == before["infotexts"][first:]
    [picture] = host.images(
        {"init_images": [encode(strips[0])], "width": 256, "height": 256, "denoising_strength": 0.5}
    )
    assert picture.shape == (256, 256, 3)


def test_plots_are_not_changed(host: Host) -> None:
    axis = ("[FaceSnap] weight", "0.4, 1.5")
    expected = plot(host, with_facesnap({}), axis)
    options = {"facesnap_keep_best": 1, "facesnap_best_first": True, "facesnap_strip": True}
    assert equal(plot(host, with_facesnap({"override_settings": options}), axis), expected)


def test_jobs_without_facesnap_are_not_changed(host: Host) -> None:
    expected, _ = run(host, THREE)
    images, info = run(host, THREE, keep_best=1, best_first=True, strip=True, likeness=True)
    assert equal(images, expected)
    assert "FaceSnap" not in "".join(info["infotexts"])
