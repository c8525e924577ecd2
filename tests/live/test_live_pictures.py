"""What FaceSnap does to pictures, and what it leaves alone to the last bit, beside all else that a job can be."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from facesnap_ext.settings.unit import BLOCKS
from tests.live.live_host import (
    INIT,
    Host,
    Job,
    Pictures,
    astronaut,
    differ,
    encode,
    equal,
    grace_hopper,
    never_seen,
    rectangle,
    small,
    with_facesnap,
)

Baseline = Callable[[Job], Pictures]

INSTANTID = "InstantID"

CASES = [
    "plain",
    "batch_size 2",
    "n_iter 2",
    "CFG 1",
    "A AND B",
    "over 75 tokens, no negative",
    "264x328",
    "hires",
    "img2img",
    "inpaint only masked",
    "LoRA",
    "ControlNet",
]
HIRES = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 2,
    "denoising_strength": 0.6,
}
HIRES_FORGE = {"hr_cfg": 5, "hr_additional_modules": ["Use same choices"]}
INPAINT = {"mask_blur": 4, "inpainting_fill": 1, "inpaint_full_res": True, "inpaint_full_res_padding": 32}


def img2img_job() -> Job:
    return {"init_images": [encode(small(astronaut()))], "denoising_strength": 0.6, "steps": 4}


@pytest.fixture(params=CASES)
def job(request: pytest.FixtureRequest, host: Host) -> Job:
    """Each kind of job, without FaceSnap."""
    case = request.param
    if case == "LoRA" and host.lora is None:
        pytest.skip("the host has no LoRA")
    if case == "ControlNet" and host.controlnet is None:
        pytest.skip("the host has no ControlNet that works")
    img2img = img2img_job()
    return {
        "plain": {},
        "batch_size 2": {"batch_size": 2},
        "n_iter 2": {"n_iter": 2},
        "CFG 1": {"cfg_scale": 1},
        "A AND B": {"prompt": "a photo of a red house AND a blue car"},
        "over 75 tokens, no negative": {
            "prompt": ", ".join(["portrait of a smiling person in a red shirt"] * 12),
            "negative_prompt": "",
        },
        "264x328": {"width": 264, "height": 328},
        "hires": {**HIRES, **HIRES_FORGE} if host.forge else HIRES,
        "img2img": img2img,
        "inpaint only masked": {**img2img, **INPAINT, "mask": encode(rectangle())},
        "LoRA": {"prompt": f"a photo of a red house <lora:{host.lora}:1>"},
        "ControlNet": {"alwayson_scripts": host.controlnet},
    }[case]


def test_it_changes_the_picture(host: Host, baseline: Baseline, job: Job) -> None:
    pictures, plain = host.pictures(with_facesnap(job)), baseline(job)
    if "alwayson_scripts" in job:
        pictures, plain = pictures[:1], plain[:1]  # the other one is what the ControlNet was given
    assert differ(pictures, plain)


@pytest.mark.parametrize(
    "settings", [{"enabled": False}, {"weight": 0}, {"model": INIT}], ids=["disabled", "weight 0", "zero convolutions"]
)
def test_it_leaves_the_picture_alone(host: Host, baseline: Baseline, job: Job, settings: Job) -> None:
    assert equal(host.pictures(with_facesnap(job, **settings)), baseline(job))


def test_preparing_takes_none_of_the_hosts_random_numbers(host: Host, baseline: Baseline) -> None:
    """A photo that is new and a file that is loaded anew, before the host draws the init picture's latent."""
    host.pictures(with_facesnap({}))
    new = with_facesnap(img2img_job(), model=INIT, references=[encode(never_seen())])
    assert equal(host.pictures(new), baseline(img2img_job()))


FOUR_STEPS = {"steps": 4}


@pytest.fixture(scope="module")
def whole(host: Host) -> Pictures:
    """FaceSnap from the first step to the last, on all rows."""
    return host.pictures(with_facesnap(FOUR_STEPS))


@pytest.mark.parametrize(
    "settings", [{"start": 0.5}, {"end": 0.5}, {"cond_only": True}], ids=["second half", "first half", "cond_only"]
)
def test_a_part_of_it_is_neither_all_nor_nothing(
    host: Host, baseline: Baseline, whole: Pictures, settings: Job
) -> None:
    pictures = host.pictures(with_facesnap(FOUR_STEPS, **settings))
    assert differ(pictures, baseline(FOUR_STEPS))
    assert differ(pictures, whole)


def test_the_halves_differ(host: Host) -> None:
    first, second = ({"end": 0.5}, {"start": 0.5})
    assert differ(host.pictures(with_facesnap(FOUR_STEPS, **first)), host.pictures(with_facesnap(FOUR_STEPS, **second)))


def test_an_empty_window_leaves_the_picture_alone(host: Host, baseline: Baseline) -> None:
    assert equal(host.pictures(with_facesnap(FOUR_STEPS, start=0.5, end=0.5)), baseline(FOUR_STEPS))


def test_a_window_is_a_part_of_img2imgs_pass_too(host: Host, baseline: Baseline) -> None:
    """Of low denoising: that pass sees the end of the noise schedule alone."""
    job = {**img2img_job(), "denoising_strength": 0.3, "steps": 10}
    assert differ(host.pictures(with_facesnap(job, end=0.5)), baseline(job))


def test_a_refiner_is_followed(host: Host, baseline: Baseline) -> None:
    """With FaceSnap in the refiner's part alone."""
    if (refiner := host.checkpoint("refiner")) is None:
        pytest.skip("the host has no checkpoint with 'refiner' in its name")
    job = {"steps": 4, "refiner_checkpoint": refiner, "refiner_switch_at": 0.5}
    assert differ(baseline(job), baseline({"steps": 4})), "the refiner does something"
    for _ in range(2):  # the second time the host loads the first checkpoint again
        assert differ(host.pictures(with_facesnap(job, start=0.5)), baseline(job))
        assert equal(host.pictures(job), baseline(job))


def test_the_same_job_twice_gives_the_same_picture(host: Host, whole: Pictures) -> None:
    assert equal(host.pictures(with_facesnap(FOUR_STEPS)), whole)


def test_residuals_may_stay_for_a_step(host: Host, baseline: Baseline, whole: Pictures) -> None:
    every_second = host.pictures(with_facesnap(FOUR_STEPS, ffrnet_interval=2))
    assert differ(every_second, whole)
    assert differ(every_second, baseline(FOUR_STEPS))
    assert equal(host.pictures(with_facesnap(FOUR_STEPS, ffrnet_interval=1)), whole)


def test_a_picture_without_a_face_is_not_drawn_again(host: Host, whole: Pictures) -> None:
    """As random networks draw it; the seeds and settings of the job stay as they were."""
    assert equal(host.pictures(with_facesnap(FOUR_STEPS, redraw=0.4)), whole)


def test_another_person_changes_the_picture_and_the_first_one_comes_back(host: Host, whole: Pictures) -> None:
    other = host.pictures(with_facesnap(FOUR_STEPS, references=[encode(grace_hopper())]))
    assert differ(other, whole)
    assert equal(host.pictures(with_facesnap(FOUR_STEPS)), whole)


def test_a_driving_photo_changes_the_picture(host: Host, whole: Pictures) -> None:
    driven = host.pictures(with_facesnap(FOUR_STEPS, driving=encode(grace_hopper())))
    assert differ(driven, whole)
    assert equal(host.pictures(with_facesnap(FOUR_STEPS)), whole)


def test_more_photos_are_mixed_or_averaged(host: Host, whole: Pictures) -> None:
    both = {"references": [encode(astronaut()), encode(grace_hopper())]}
    mixed = host.pictures(with_facesnap(FOUR_STEPS, **both))
    averaged = host.pictures(with_facesnap(FOUR_STEPS, **both, reference_mode="averaged"))
    assert differ(mixed, whole)
    assert differ(averaged, whole)
    assert differ(averaged, mixed)


def test_the_weight_is_one_by_default_and_counts(host: Host, whole: Pictures) -> None:
    assert equal(host.pictures(with_facesnap(FOUR_STEPS, weight=1.0)), whole)
    assert differ(host.pictures(with_facesnap(FOUR_STEPS, weight=0.5)), whole)


def test_instantids_files_guide_a_picture(host: Host, baseline: Baseline) -> None:
    """ControlNet and adapter, each alone and both, as they are published and with no FaceSnap file."""
    if INSTANTID not in host.get("/facesnap/models")["facesnap"]:
        pytest.skip("the host's models/facesnap has no ControlNetModel and ip-adapter.bin")
    both, net, adapter = (
        host.pictures(with_facesnap({}, model=INSTANTID, **weights))
        for weights in ({}, {"adapter_weight": 0}, {"block_weights": [0] * BLOCKS})
    )
    for one, other in itertools.combinations((both, net, adapter, baseline({})), 2):
        assert differ(one, other)
    assert equal(host.pictures(with_facesnap({}, model=INSTANTID)), both)
    assert equal(host.pictures({}), baseline({}))
