"""What cannot be done stops the job with one sentence for people, and does nothing to the next job."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable

import pytest

from tests.live.live_host import (
    OTHER_WIDTHS,
    Host,
    Job,
    Pictures,
    Refused,
    cut_jpeg,
    encode,
    equal,
    grey,
    with_facesnap,
)

Baseline = Callable[[Job], Pictures]


def settings_of(error: str) -> Job:
    """FaceSnap's settings that cannot be followed."""
    return {
        "no face": {"references": [encode(grey())]},
        "no face to drive": {"driving": encode(grey())},
        "cut photo": {"references": [base64.b64encode(cut_jpeg()).decode()]},
        "no base64": {"references": ["/etc/passwd"]},
        "no photo": {"references": []},
        "unknown setting": {"wieght": 1},
        "weight out of range": {"weight": 3},
        "other widths": {"model": OTHER_WIDTHS},
        "no such file": {"model": "absent.safetensors"},
        "several files": {"model": ""},
    }[error]


# what happened, what to do
SENTENCES = {
    "no face": (r"No face .*photo 1", r"use a photo with"),
    "no face to drive": (r"No face .*[Dd]riving photo", r"use a photo with"),
    "cut photo": (r"photo 1 is damaged", r"save it anew"),
    "no base64": (r"photo 1 is not (base64|a picture)", r"send|give"),
    "no photo": (r"without a reference photo", r"add one or disable"),
    "unknown setting": (r"no setting named 'wieght'", r"it has .*weight"),
    "weight out of range": (r"weight is 3", r"from 0 to 2"),
    "other widths": (rf"{OTHER_WIDTHS} was made for .*widths", r"choose a FaceSnap file"),
    "no such file": (r"no FaceSnap file absent\.safetensors", r"there is .*random"),
    "several files": (r"several FaceSnap files", r"choose one"),
}


@pytest.mark.parametrize("error", SENTENCES)
def test_a_sentence_and_no_harm(host: Host, baseline: Baseline, error: str) -> None:
    assert_one_sentence(refusal(host, with_facesnap({}, **settings_of(error))), *SENTENCES[error])
    assert equal(host.pictures({}), baseline({}))


def test_another_checkpoint(host: Host, baseline: Baseline) -> None:
    if (sd15 := host.checkpoint("sd15")) is None:
        pytest.skip("the host has no checkpoint with sd15 in its name")
    refused = refusal(host, with_facesnap({"override_settings": {"sd_model_checkpoint": sd15}}))
    assert_one_sentence(refused, rf"needs an SDXL checkpoint and {sd15}.* is none", r"choose an SDXL checkpoint")
    assert equal(host.pictures({}), baseline({}))


def test_forges_multidiffusion(host: Host, baseline: Baseline) -> None:
    if not host.forge:
        pytest.skip("only Forge has MultiDiffusion built in")
    tiles = {"alwayson_scripts": {"MultiDiffusion Integrated": {"args": [True, "MultiDiffusion", 192, 192, 64, 2]}}}
    assert_one_sentence(refusal(host, with_facesnap(tiles)), r"cannot act in MultiDiffusion's tiles", r"switch one")
    assert equal(host.pictures({}), baseline({}))


def test_img2img_and_hires_too(host: Host) -> None:
    for job in ({"init_images": [encode(grey())]}, {"n_iter": 2}):
        assert_one_sentence(refusal(host, with_facesnap(job, references=[encode(grey())])), r"[Nn]o face", r"take one")


def test_a_driving_init_picture_without_a_face_is_no_error(host: Host) -> None:
    """It is the default only; the reference's own pose is taken."""
    assert host.pictures(with_facesnap({"init_images": [encode(grey())], "denoising_strength": 0.6}))


def test_no_model_files(empty_host: Host) -> None:
    message = refusal(empty_host, with_facesnap({}, model=""))
    assert_one_sentence(message, r"no FaceSnap file in", r"put one there, see models/README\.md")


def refusal(host: Host, job: Job) -> Refused:
    with pytest.raises(Refused) as caught:
        host.pictures(job)
    return caught.value


def assert_one_sentence(refused: Refused, reason: str, advice: str) -> None:
    assert refused.status >= 400
    assert re.search(f"({reason}).*({advice})", refused.message), refused.message
    assert not re.search(r"[.!?] [A-Z]", refused.message), f"more than one sentence: {refused.message}"
    assert "Traceback" not in refused.message
