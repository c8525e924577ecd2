"""A job that cannot be completed is stopped with one sentence for the user, and does not affect the next job."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable

import pytest

from tests.live.live_host import (
    OTHER_WIDTHS,
    Host,
    Images,
    Job,
    Refused,
    enabled,
    encode,
    equal,
    grey,
    truncated_jpeg,
    with_facesnap,
)
from tests.live.test_live_images import img2img_job

Baseline = Callable[[Job], Images]


def settings_of(error: str) -> Job:
    """The settings of FaceSnap that cause an error."""
    return {
        "no face": {"references": [encode(grey())]},
        "no face in driving photo": {"driving": encode(grey())},
        "truncated photo": {"references": [base64.b64encode(truncated_jpeg()).decode()]},
        "not base64": {"references": ["/etc/passwd"]},
        "no photo": {"references": []},
        "unknown setting": {"wieght": 1},
        "weight out of range": {"weight": 3},
        "other widths": {"model": OTHER_WIDTHS},
        "no such file": {"model": "absent.safetensors"},
        "several files": {"model": ""},
        "empty interval": {"start": 0.5, "end": 0.5},
    }[error]


# what is wrong, and what to do
SENTENCES = {
    "no face": (r"No face .*photo 1", r"use a photo with"),
    "no face in driving photo": (r"No face .*[Dd]riving photo", r"use a photo with"),
    "truncated photo": (r"photo 1 is damaged", r"save it again"),
    "not base64": (r"photo 1 is not (base64|a readable image)", r"send|use"),
    "no photo": (r"without a reference photo", r"add one or disable"),
    "unknown setting": (r"no setting named 'wieght'", r"its settings are .*weight"),
    "weight out of range": (r"weight is 3", r"from 0 to 2"),
    "other widths": (rf"{OTHER_WIDTHS} was made for .*widths", r"choose a FaceSnap file"),
    "no such file": (r"no FaceSnap file absent\.safetensors", r"choose one of .*random"),
    "several files": (r"several FaceSnap files", r"choose one"),
    "empty interval": (r"start \(0\.5\) is not before its end", r"lower start or raise end"),
}


@pytest.mark.parametrize("error", SENTENCES)
def test_an_error_is_one_sentence_and_leaves_the_next_job_unchanged(host: Host, baseline: Baseline, error: str) -> None:
    assert_one_sentence(refusal(host, with_facesnap({}, **settings_of(error))), *SENTENCES[error])
    assert equal(host.images({}), baseline({}))


def test_anything_before_a_persons_dictionary_is_refused(host: Host) -> None:
    job = with_facesnap({})
    job["alwayson_scripts"]["FaceSnap"]["args"].insert(0, None)
    assert_one_sentence(
        refusal(host, job), r"argument 2 is a dictionary, but argument 1 is not", r"send one dictionary"
    )


def test_an_sd15_checkpoint_is_refused(host: Host, baseline: Baseline) -> None:
    if (sd15 := host.checkpoint("sd15")) is None:
        pytest.skip("the host has no checkpoint with sd15 in its name")
    refused = refusal(host, with_facesnap({"override_settings": {"sd_model_checkpoint": sd15}}))
    assert_one_sentence(refused, rf"needs an SDXL checkpoint and {sd15}.* is not one", r"choose an SDXL checkpoint")
    assert equal(host.images({}), baseline({}))


@pytest.mark.parametrize("img2img", [False, True], ids=["txt2img", "img2img"])
def test_a_built_in_multidiffusion_is_refused(host: Host, baseline: Baseline, img2img: bool) -> None:
    title = "MultiDiffusion Integrated"
    if (script := host.script(title, img2img)) is None:
        pytest.skip(f"{host.webui['name']} has no {title} here")
    job = enabled(script, {"Method": "MultiDiffusion", "Tile Width": 192, "Tile Height": 192})
    job |= img2img_job() if img2img else {}
    assert_one_sentence(
        refusal(host, with_facesnap(job)), r"cannot be applied to MultiDiffusion's tiles", r"disable one"
    )
    assert equal(host.images({}), baseline({}))


def test_img2img_and_several_iterations_are_refused_as_well(host: Host) -> None:
    for job in ({"init_images": [encode(grey())]}, {"n_iter": 2}):
        assert_one_sentence(
            refusal(host, with_facesnap(job, references=[encode(grey())])), r"[Nn]o face", r"use a photo with"
        )


def test_an_init_image_without_a_face_is_not_an_error(host: Host) -> None:
    """The reference's own pose is used instead."""
    assert host.images(with_facesnap({"init_images": [encode(grey())], "denoising_strength": 0.6}))


def test_missing_model_files(empty_host: Host) -> None:
    message = refusal(empty_host, with_facesnap({}, model=""))
    assert_one_sentence(
        message,
        r"neither InstantID nor a FaceSnap file in",
        r"download InstantID .* at the top of the FaceSnap accordion",
    )


def refusal(host: Host, job: Job) -> Refused:
    with pytest.raises(Refused) as caught:
        host.images(job)
    return caught.value


def assert_one_sentence(refused: Refused, reason: str, advice: str) -> None:
    assert refused.status >= 400
    assert re.search(f"({reason}).*({advice})", refused.message), refused.message
    assert not re.search(r"[.!?] [A-Z]", refused.message), f"more than one sentence: {refused.message}"
    assert "Traceback" not in refused.message
