"""Which jobs FaceSnap changes and which stay bit-identical, together with other features of the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.live.live_host import (
    INIT,
    Host,
    Images,
    Job,
    astronaut,
    differ,
    encode,
    equal,
    grace_hopper,
    new_photo,
    rectangle,
    small,
    stripes,
    with_facesnap,
)

Baseline = Callable[[Job], Images]

INSTANTID = "InstantID"
SDXL_RESIDUALS = 10

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
    "hr_second_pass_steps": 2,
    "denoising_strength": 0.6,
}
HIRES_FORGE = {"hr_cfg": 5, "hr_additional_modules": ["Use same choices"]}


def hires_job(host: Host) -> Job:
    return {**HIRES, "hr_upscaler": host.upscaler, **(HIRES_FORGE if host.forge else {})}


INPAINT = {"mask_blur": 4, "inpainting_fill": 1, "inpaint_full_res": True, "inpaint_full_res_padding": 32}


def img2img_job() -> Job:
    return {"init_images": [encode(small(astronaut()))], "denoising_strength": 0.6, "steps": 4}


@pytest.fixture(params=CASES)
def job(request: pytest.FixtureRequest, host: Host) -> Job:
    """A job of each kind, without FaceSnap."""
    case = request.param
    if case == "LoRA" and host.lora is None:
        pytest.skip("the host has no LoRA")
    if case == "ControlNet" and host.controlnet is None:
        pytest.skip("the host has no ControlNet that changes the image")
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
        "hires": hires_job(host),
        "img2img": img2img,
        "inpaint only masked": {**img2img, **INPAINT, "mask": encode(rectangle())},
        "LoRA": {"prompt": f"a photo of a red house <lora:{host.lora}:1>"},
        "ControlNet": {"alwayson_scripts": host.controlnet},
    }[case]


def test_facesnap_changes_the_image(host: Host, baseline: Baseline, job: Job) -> None:
    images, plain = host.images(with_facesnap(job)), baseline(job)
    if "alwayson_scripts" in job:
        images, plain = images[:1], plain[:1]  # the second image is the control image
    assert differ(images, plain)


@pytest.mark.parametrize(
    "settings", [{"enabled": False}, {"weight": 0}, {"model": INIT}], ids=["disabled", "weight 0", "zero convolutions"]
)
def test_facesnap_without_effect_leaves_the_image_unchanged(
    host: Host, baseline: Baseline, job: Job, settings: Job
) -> None:
    assert equal(host.images(with_facesnap(job, **settings)), baseline(job))


def test_preparing_does_not_use_the_hosts_random_numbers(host: Host, baseline: Baseline) -> None:
    """A new photo is encoded and a different file is loaded before the host samples the latent of the init image."""
    host.images(with_facesnap({}))
    new = with_facesnap(img2img_job(), model=INIT, references=[encode(new_photo())])
    assert equal(host.images(new), baseline(img2img_job()))


FOUR_STEPS = {"steps": 4}


@pytest.fixture(scope="module")
def full(host: Host) -> Images:
    """FaceSnap in all steps, on conditional and unconditional rows."""
    return host.images(with_facesnap(FOUR_STEPS))


@pytest.mark.parametrize(
    "settings", [{"start": 0.5}, {"end": 0.5}, {"cond_only": True}], ids=["second half", "first half", "cond_only"]
)
def test_a_partial_effect_differs_from_none_and_from_the_full_one(
    host: Host, baseline: Baseline, full: Images, settings: Job
) -> None:
    images = host.images(with_facesnap(FOUR_STEPS, **settings))
    assert differ(images, baseline(FOUR_STEPS))
    assert differ(images, full)


def test_the_halves_differ(host: Host) -> None:
    first, second = ({"end": 0.5}, {"start": 0.5})
    assert differ(host.images(with_facesnap(FOUR_STEPS, **first)), host.images(with_facesnap(FOUR_STEPS, **second)))


def test_the_interval_is_a_fraction_of_the_pass_in_img2img_as_well(host: Host, baseline: Baseline) -> None:
    """At low denoising strength, the pass covers only the end of the noise schedule."""
    job = {**img2img_job(), "denoising_strength": 0.3, "steps": 10}
    assert differ(host.images(with_facesnap(job, end=0.5)), baseline(job))


def test_each_image_of_a_batch_follows_its_own_init_image(host: Host, baseline: Baseline) -> None:
    """The first init image has no influence on the second image."""
    flipped = small(astronaut()[:, ::-1])
    jobs = [
        {**img2img_job(), "init_images": [encode(first), encode(small(grace_hopper()))], "batch_size": 2}
        for first in (small(astronaut()), flipped)
    ]
    one, other = (host.images(with_facesnap(job))[-2:] for job in jobs)
    assert differ(one[:1], other[:1])
    assert equal(one[1:], other[1:])
    assert differ(one, baseline(jobs[0])[-2:])


def test_a_tile_without_a_face_stays_as_it_is(host: Host, baseline: Baseline) -> None:
    """SD upscale makes one tile, as large as the init image, which has no face."""
    values = {"tile overlap": 64, "upscaler": "None", "scale factor": 1.0}
    described = host.script("SD upscale", img2img=True)["args"]  # Forge Neo has the same ones and more
    arguments = [values.get(str(argument["label"]).lower(), argument["value"]) for argument in described]
    job = {**img2img_job(), "script_name": "SD upscale", "script_args": arguments}
    faceless = {**job, "init_images": [encode(stripes())]}
    assert equal(host.images(with_facesnap(faceless)), baseline(faceless))
    assert differ(host.images(with_facesnap(job)), baseline(job))


def test_facesnap_acts_in_the_refiner(host: Host, baseline: Baseline) -> None:
    """FaceSnap is active only while the refiner is."""
    if (refiner := host.checkpoint("refiner")) is None:
        pytest.skip("the host has no checkpoint with 'refiner' in its name")
    job = {"steps": 4, "refiner_checkpoint": refiner, "refiner_switch_at": 0.5}
    assert differ(baseline(job), baseline({"steps": 4})), "the refiner has an effect"
    for _ in range(2):  # the second time, the host reloads the first checkpoint
        assert differ(host.images(with_facesnap(job, start=0.5)), baseline(job))
        assert equal(host.images(job), baseline(job))


def test_the_same_job_gives_the_same_image_again(host: Host, full: Images) -> None:
    assert equal(host.images(with_facesnap(FOUR_STEPS)), full)


def test_ffrnet_can_run_every_second_step(host: Host, baseline: Baseline, full: Images) -> None:
    every_second = host.images(with_facesnap(FOUR_STEPS, ffrnet_interval=2))
    assert differ(every_second, full)
    assert differ(every_second, baseline(FOUR_STEPS))
    assert equal(host.images(with_facesnap(FOUR_STEPS, ffrnet_interval=1)), full)


def test_an_image_without_a_face_is_not_redrawn(host: Host, full: Images) -> None:
    """Random networks generate no faces. The seeds and settings of the job stay the same."""
    assert equal(host.images(with_facesnap(FOUR_STEPS, redraw_strength=0.4)), full)


def test_another_person_changes_the_image_and_not_the_next_job(host: Host, full: Images) -> None:
    other = host.images(with_facesnap(FOUR_STEPS, references=[encode(grace_hopper())]))
    assert differ(other, full)
    assert equal(host.images(with_facesnap(FOUR_STEPS)), full)


def test_a_driving_photo_changes_the_image(host: Host, full: Images) -> None:
    driven = host.images(with_facesnap(FOUR_STEPS, driving=encode(grace_hopper())))
    assert differ(driven, full)
    assert equal(host.images(with_facesnap(FOUR_STEPS)), full)


def test_several_photos_are_fused_or_averaged(host: Host, full: Images) -> None:
    both = {"references": [encode(astronaut()), encode(grace_hopper())]}
    fused = host.images(with_facesnap(FOUR_STEPS, **both))
    averaged = host.images(with_facesnap(FOUR_STEPS, **both, reference_mode="averaged"))
    assert differ(fused, full)
    assert differ(averaged, full)
    assert differ(averaged, fused)


def test_the_weight_is_1_by_default_and_scales_the_effect(host: Host, full: Images) -> None:
    assert equal(host.images(with_facesnap(FOUR_STEPS, weight=1.0)), full)
    assert differ(host.images(with_facesnap(FOUR_STEPS, weight=0.5)), full)


def test_instantid_files_change_the_image(host: Host, baseline: Baseline) -> None:
    """The ControlNet and the adapter as published, each on its own and both together."""
    if INSTANTID not in host.get("/facesnap/models")["facesnap"]:
        pytest.skip("the host's models/facesnap has no ControlNetModel and ip-adapter.bin")
    both, net, adapter = (
        host.images(with_facesnap({}, model=INSTANTID, **weights))
        for weights in ({}, {"adapter_weight": 0}, {"block_weights": [0] * SDXL_RESIDUALS})
    )
    for one, other in itertools.combinations((both, net, adapter, baseline({})), 2):
        assert differ(one, other)
    assert equal(host.images(with_facesnap({}, model=INSTANTID)), both)
    assert equal(host.images({}), baseline({}))
