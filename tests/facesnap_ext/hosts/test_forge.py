"""The host adapter for Forge and reForge, on stand-ins with their signatures around a real LDM UNet."""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import controls, forge, fork
from facesnap_ext.hosts.errors import Refusal
from facesnap_ext.hosts.forge import FaceSnapControl
from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_ext.residuals import landmark_image
from tests.support import tiny
from tests.support.ldm_unet import inputs, ldm_unet, reference_walk
from tests.support.units import changed


class Predictor:
    """A variance-exploding eps predictor, which scales the UNet's input and converts sigma to a timestep."""

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise / (sigma[:, None, None, None] ** 2 + 1) ** 0.5

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma * 60).round()

    def percent_to_sigma(self, percent: float) -> float:
        raise NotImplementedError("use the progress of the pass instead")


class Model:
    computation_dtype = torch.float32

    def __init__(self, unet: nn.Module, reforge: bool):
        self.diffusion_model = unet
        setattr(self, "model_sampling" if reforge else "predictor", Predictor())


class ModelPatcher:
    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device

    def model_dtype(self):
        return torch.float32


class UnetPatcher(ModelPatcher):
    def __init__(self, model):
        super().__init__(model, "cpu", "cpu")
        self.controlnet_linked_list = None

    def clone(self):
        other = UnetPatcher(self.model)
        other.controlnet_linked_list = self.controlnet_linked_list
        return other

    def add_patched_controlnet(self, control):
        control.set_previous_controlnet(self.controlnet_linked_list)
        self.controlnet_linked_list = control

    def list_controlnets(self):
        links, link = [], self.controlnet_linked_list
        while link is not None:
            links.append(link)
            link = link.previous_controlnet
        return links


class OtherControl:
    """A ControlNet of the host, with constant residuals for some blocks and none for others."""

    def __init__(self, control):
        self.control, self.previous_controlnet, self.runs = control, None, []

    def set_previous_controlnet(self, control):
        self.previous_controlnet = control

    def pre_run(self, model, percent_to_sigma):
        self.runs.append("pre_run")
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_sigma)

    def cleanup(self):
        self.runs.append("cleanup")

    def get_models(self):
        return ["other"] + (self.previous_controlnet.get_models() if self.previous_controlnet else [])

    def inference_memory_requirements(self, dtype):
        return 77

    def get_control(self, *args):
        own = {part: list(residuals) for part, residuals in self.control.items()}
        previous = self.previous_controlnet.get_control(*args) if self.previous_controlnet else None
        return controls.merge(own, previous)


class Job(SimpleNamespace):
    """A job that can be weakly referenced, like the host's."""

    def comment(self, text: str) -> None:
        self.comments.append(text)


class Loaded(SimpleNamespace):
    """A model that can be weakly referenced, like the host's."""


def make_job(unet: nn.Module, reforge: bool = False, is_sdxl: bool = True):
    return Job(sd_model=load(unet, reforge, is_sdxl), reforge=reforge, comments=[], extra_generation_params={})


def load(unet: nn.Module, reforge: bool = False, is_sdxl: bool = True) -> Loaded:
    objects = SimpleNamespace(unet=UnetPatcher(Model(unet, reforge)))
    return Loaded(
        is_sdxl=is_sdxl, forge_objects=objects, sd_checkpoint_info=SimpleNamespace(title="loaded.safetensors")
    )


def announce(job, x: Tensor, progress: float, parts: int = 1, sigma: Tensor | None = None) -> None:
    """Do what the host does before each evaluation of images [N, C, h, w] whose prompts have this number of parts."""
    sampler = SimpleNamespace(sampler_extra_args={"cond": SimpleNamespace(batch=[[None] * parts] * len(x))})
    denoiser = SimpleNamespace(p=job, step=round(100 * progress), steps=100, total_steps=100, sampler=sampler)
    forge.on_cfg_denoiser(SimpleNamespace(x=x, sigma=sigma, denoiser=denoiser))


@torch.no_grad()
def sample_once(
    job,
    x: Tensor,
    sigmas: Tensor,
    context: Tensor,
    y: Tensor,
    calls: list[list[tuple[int, int]]],
    progress: float = 0.0,
):
    """Run one step as the host does.

    Args:
        calls: the chunks of each UNet call as (cond_or_uncond, first row). A chunk has one row per image.
    """
    parts = sum(side == 0 for chunks in calls for side, _ in chunks)
    announce(job, x[: len(sigmas)], progress, parts, sigmas)
    patcher = job.sd_model.forge_objects.unet
    model = patcher.model
    for control in patcher.list_controlnets():
        control.pre_run(model, Predictor().percent_to_sigma)
    images = len(sigmas)
    out = {}
    for chunks in calls:
        rows = [row for _, first in chunks for row in range(first, first + images)]
        sides = [side for side, _ in chunks]
        t = torch.cat([sigmas] * len(chunks))
        options = {"cond_or_uncond": sides, **getattr(job, "options", {})}
        cond = {"c_crossattn": context[rows], "y": y[rows]}
        control = None
        if (head := patcher.controlnet_linked_list) is not None:
            if job.reforge:
                control = head.get_control(x[rows], t, cond, len(chunks), options)
            else:
                options["sigmas"] = sigmas
                cond["transformer_options"] = options
                for link in patcher.list_controlnets():
                    link.transformer_options = cond["transformer_options"]
                control = head.get_control(x[rows], t, cond.copy(), len(chunks))
        scaled, timesteps = Predictor().calculate_input(t, x[rows]), Predictor().timestep(t)
        result = forge_walk(model.diffusion_model, scaled, timesteps, context[rows], y[rows], control, options)
        out.update(zip(rows, result))
    for control in patcher.list_controlnets():
        control.cleanup()
    return torch.stack([out[row] for row in sorted(out)])


def forge_walk(unet, x, timesteps, context, y, control, options, resizing=False) -> Tensor:
    """The forward pass of Forge's UNet, which pops residuals from the ends of the control's lists, and runs patches.

    Args:
        resizing: resize residuals that do not fit; the host drops them.
    """
    from ldm.modules.diffusionmodules.util import timestep_embedding

    def apply(h, part):
        residual = control[part].pop() if control and control[part] else None
        if residual is not None and residual.dim() == 4 and residual.shape[2:] != h.shape[2:]:
            if not resizing:
                return h  # the host drops it
            residual = nn.functional.interpolate(residual, h.shape[2:], mode="bilinear")
        return h if residual is None else h + residual

    def patched(kind, block, *features):
        options["block"] = block
        for patch in options.get("patches", {}).get(kind, []):
            features = patch(*features, options)
            features = features if isinstance(features, tuple) else (features,)
        return features

    emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels)) + unet.label_emb(y)
    h, hs = x, []
    for i, block in enumerate(unet.input_blocks):
        (h,) = patched("input_block_patch", ("input", i), apply(block(h, emb, context), "input"))
        hs.append(h)
        (h,) = patched("input_block_patch_after_skip", ("input", i), h)
    h = apply(unet.middle_block(h, emb, context), "middle")
    for i, block in enumerate(unet.output_blocks):
        h, skip = patched("output_block_patch", ("output", i), h, apply(hs.pop(), "output"))
        h = block(torch.cat([h, skip], dim=1), emb, context)
    return unet.out(h)


@torch.no_grad()
def expected_output(unet, conditionings, x, sigmas, context, y, is_cond) -> Tensor:
    """Compute each row separately with each FFRNet and `reference_walk`, for one person or several side by side."""
    rows = []
    scale = Predictor()
    for row in range(len(x)):
        one, sigma = x[row : row + 1], sigmas[row : row + 1]
        latent, timestep = scale.calculate_input(sigma, one), scale.timestep(sigma)
        residuals = [torch.zeros(1)] * 10
        for conditioning in conditionings:
            if not is_cond[row] and conditioning.strength.cond_only:
                continue
            picture = landmark_image(conditioning.landmarks, 8 * x.shape[3], 8 * x.shape[2])
            features = conditioning.ffrnet.embed_landmarks(picture)
            own = [
                conditioning.strength.weight * r
                for r in conditioning.ffrnet(
                    latent, timestep, conditioning.ffrnet.embed_tokens(conditioning.tokens), features
                )
            ]
            if conditioning.region is not None:
                masks = [conditioning.region.sample(r.shape[3], r.shape[2]) for r in own]
                own = [r * torch.from_numpy(mask) for r, mask in zip(own, masks)]
            residuals = [a + b for a, b in zip(residuals, own)]
        rows.append(reference_walk(unet, latent, timestep, context[row : row + 1], y[row : row + 1], residuals))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def unet():
    return ldm_unet()


# groupings seen in hosts: number of images, and each call's chunks as (0 cond | 1 uncond, first row)
GROUPINGS = {
    "normal, unconditional first": (1, [[(1, 0), (0, 1)]]),
    "CFG 1": (1, [[(0, 0)]]),
    "A AND B": (1, [[(1, 0), (0, 1), (0, 2)]]),
    "batch of two": (2, [[(1, 0), (0, 2)]]),
    "batch of two, A AND B": (2, [[(1, 0), (0, 2), (0, 4)]]),
    "two calls of one chunk": (1, [[(0, 0)], [(1, 1)]]),
    "two calls of one chunk, batch of two": (2, [[(0, 0)], [(1, 2)]]),
}


# reForge passes the same rows to the same functions, so the groupings with most calls and rows suffice
REFORGE = ("batch of two, A AND B", "two calls of one chunk, batch of two")
each_grouping = pytest.mark.parametrize(
    ("grouping", "reforge"),
    [
        *(pytest.param(grouping, False, id=f"forge-{grouping}") for grouping in GROUPINGS),
        *(pytest.param(grouping, True, id=f"reforge-{grouping}") for grouping in REFORGE),
    ],
)


@pytest.mark.parametrize("people", tiny.PEOPLE)
@each_grouping
def test_each_row_gets_its_own_residuals_in_every_grouping(unet, grouping, reforge, people):
    images, calls = GROUPINGS[grouping]
    chunks = [chunk for call in calls for chunk in call]
    conditionings = tiny.PEOPLE[people]()
    x, _, context, y = inputs(images * len(chunks))
    x = torch.cat([x[:images]] * len(chunks))
    sigmas = torch.linspace(2.0, 2.0, images)
    is_cond = [side == 0 for side, _ in sorted(chunks, key=lambda chunk: chunk[1]) for _ in range(images)]
    job = make_job(unet, reforge)
    forge.attach(job, conditionings)
    got = sample_once(job, x, sigmas, context, y, calls)
    expected = expected_output(unet, conditionings, x, torch.cat([sigmas] * len(chunks)), context, y, is_cond)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ["before", "after"])
def test_it_adds_to_the_hosts_controlnets_before_and_after_it(unet, order):
    """The other control has gaps and a shorter list."""
    conditioning = tiny.conditioning()
    x, _, context, y = inputs(1)
    other = {
        "input": [],
        "middle": [torch.full((1, 96, 4, 4), 0.3)],
        "output": [None, torch.full((1, 32, 16, 16), 0.2)],
    }
    job = make_job(unet)
    if order == "before":
        job.sd_model.forge_objects.unet.add_patched_controlnet(OtherControl(other))
        forge.attach(job, (conditioning,))
    else:
        forge.attach(job, (conditioning,))
        job.sd_model.forge_objects.unet.add_patched_controlnet(OtherControl(other))
    sigmas = torch.tensor([2.0])
    got = sample_once(job, x, sigmas, context, y, [[(0, 0)]])

    latent, timestep = Predictor().calculate_input(sigmas, x), Predictor().timestep(sigmas)
    with torch.no_grad():
        features = conditioning.ffrnet.embed_landmarks(landmark_image(conditioning.landmarks, 128, 128))
        residuals = conditioning.ffrnet(
            latent, timestep, conditioning.ffrnet.embed_tokens(conditioning.tokens), features
        )
        residuals[1] = residuals[1] + 0.2
        residuals[-1] = residuals[-1] + 0.3
        expected = reference_walk(unet, latent, timestep, context, y, residuals)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    models = job.sd_model.forge_objects.unet.controlnet_linked_list.get_models()
    assert "other" in models
    assert sum(isinstance(model, ModelPatcher) for model in models) == 1
    assert job.sd_model.forge_objects.unet.controlnet_linked_list.inference_memory_requirements(None) == 77


@pytest.mark.parametrize("people", tiny.PEOPLE)
def test_further_calls_of_an_extension_get_the_residuals_of_their_own_latents(unet, people):
    """Self-attention guidance calls the UNet again with blurred latents, as if they were conditional rows. Perturbed
    attention guidance repeats the conditional rows."""
    conditionings, job = tiny.PEOPLE[people](), make_job(unet)
    x, _, context, y = inputs(3)
    x[1], sigmas = x[0], torch.tensor([2.0])
    forge.attach(job, conditionings)
    announce(job, x[:1], 0.0)
    expected = expected_output(unet, conditionings, x, sigmas.expand(3), context, y, [False, True, True])
    patcher = job.sd_model.forge_objects.unet
    patcher.controlnet_linked_list.pre_run(patcher.model, None)
    for chunks, rows in (([1, 0], [0, 1]), ([0], [2]), ([0], [1]), ([0], [2])):
        options, t = {"cond_or_uncond": chunks}, sigmas.expand(len(rows))
        cond = {"y": y[rows], "transformer_options": options}
        control = patcher.controlnet_linked_list.get_control(x[rows], t, cond, len(chunks))
        scaled, timesteps = Predictor().calculate_input(t, x[rows]), Predictor().timestep(t)
        with torch.no_grad():
            got = forge_walk(unet, scaled, timesteps, context[rows], y[rows], control, options)
        torch.testing.assert_close(got, expected[rows], atol=1e-4, rtol=1e-4)


def kohya_hrfix(block: int, factor: float, after_skip: bool):
    """The patches of Forge's Kohya HRFix, which shrink the features from a given block on."""

    def shrink(h, options):
        if options["block"][1] != block:
            return h
        return nn.functional.interpolate(h, [round(side / factor) for side in h.shape[2:]], mode="bilinear")

    def enlarge(h, skip, options):
        return nn.functional.interpolate(h, skip.shape[2:], mode="bilinear"), skip

    name = "input_block_patch_after_skip" if after_skip else "input_block_patch"
    return {"patches": {name: [shrink], "output_block_patch": [enlarge]}}


@pytest.mark.parametrize("with_controlnet", [False, True], ids=["alone", "ControlNet"])
@pytest.mark.parametrize("after_skip", [True, False], ids=["after skip", "before skip"])
@pytest.mark.parametrize(
    ("block", "factor", "reforge"),
    [
        *((block, factor, False) for block, factor in [(1, 2), (3, 2), (3, 1.4), (5, 2), (8, 2), (3, 0.6)]),
        *((block, factor, True) for block, factor in [(3, 1.4), (8, 2)]),
    ],
)
def test_residuals_take_the_size_of_what_they_are_added_to(unet, block, factor, after_skip, with_controlnet, reforge):
    """Forge itself drops residuals that do not fit."""
    conditioning, options = tiny.conditioning(), kohya_hrfix(block, factor, after_skip)
    x, _, context, y = inputs(1)
    job, sigmas = make_job(unet, reforge), torch.tensor([2.0])
    job.options = options
    if with_controlnet:
        other = {"input": [], "middle": [torch.full((1, 96, 4, 4), 0.3)], "output": [None] * 9}
        job.sd_model.forge_objects.unet.add_patched_controlnet(OtherControl(other))
    forge.attach(job, (conditioning,))
    got = sample_once(job, x, sigmas, context, y, [[(0, 0)]])

    latent, timestep = Predictor().calculate_input(sigmas, x), Predictor().timestep(sigmas)
    with torch.no_grad():
        features = conditioning.ffrnet.embed_landmarks(landmark_image(conditioning.landmarks, 128, 128))
        tokens = conditioning.ffrnet.embed_tokens(conditioning.tokens)
        *skips, middle = conditioning.ffrnet(latent, timestep, tokens, features)
        control = {"input": [], "middle": [middle + 0.3 * with_controlnet], "output": skips}
        expected = forge_walk(unet, latent, timestep, context, y, control, dict(options), resizing=True)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert len(options["patches"]["output_block_patch"]) == 1, "the patches are shared by all calls"


@pytest.mark.parametrize("people", tiny.PEOPLE)
@pytest.mark.parametrize("images", [1, 2])
def test_rows_that_a_wrapper_of_the_unet_sends_in_parts_get_their_own_residuals(unet, images, people):
    """An example is Regional Prompter's latent mode, whose calls come after the control was computed for all rows."""
    conditionings, sides = tiny.PEOPLE[people](), [1, 0, 0]
    x, _, context, y = inputs(3 * images)
    x, sigmas = torch.cat([x[:images]] * 3), torch.full((3 * images,), 2.0)
    job = make_job(unet)
    forge.attach(job, conditionings)
    announce(job, x[:images], 0.0, 2)
    patcher = job.sd_model.forge_objects.unet
    patcher.controlnet_linked_list.pre_run(patcher.model, None)
    options = {"cond_or_uncond": sides}
    cond = {"y": y, "transformer_options": options}
    control = patcher.controlnet_linked_list.get_control(x, sigmas, cond, 3)
    scaled, timesteps = Predictor().calculate_input(sigmas, x), Predictor().timestep(sigmas)
    is_cond = [side == 0 for side in sides for _ in range(images)]
    expected = expected_output(unet, conditionings, x, sigmas, context, y, is_cond)

    def call(rows):
        return forge_walk(unet, scaled[rows], timesteps[rows], context[rows], y[rows], control, options)

    with torch.no_grad():
        for i in range(3):
            rows = slice(i * images, (i + 1) * images)
            torch.testing.assert_close(call(rows), expected[rows], atol=1e-4, rtol=1e-4)
        with pytest.raises(FaceSnapError, match="splits the rows of the UNet calls"):
            call(slice(images))


def test_start_and_end_are_fractions_of_the_pass_and_other_controls_always_act(unet):
    """This includes hires fix and img2img, whose passes cover only the end of the noise schedule."""
    other = OtherControl({"input": [], "middle": [torch.ones(1)], "output": []})
    job = make_job(unet)
    job.sd_model.forge_objects.unet.add_patched_controlnet(other)
    forge.attach(job, (tiny.conditioning(start=0.25, end=0.75),))
    control = job.sd_model.forge_objects.unet.controlnet_linked_list
    control.pre_run(job.sd_model.forge_objects.unet.model, Predictor().percent_to_sigma)
    x, _, _, y = inputs(1)
    acted = []
    for progress in (0.1, 0.3, 0.7, 0.9):
        announce(job, x, progress)
        sigma = torch.tensor([0.3 * (1 - progress)])
        options = {"cond_or_uncond": [0]}
        out = control.get_control(x, sigma, {"y": y, "transformer_options": options}, 1)
        acted.append("patches" in options)
        # when FaceSnap is active, it adds the other control's residuals together with its own
        assert (out["middle"] == [None]) == acted[-1]
    assert acted == [False, True, True, False]


def test_each_person_has_their_own_start_and_end(unet):
    job = make_job(unet)
    first, second = tiny.conditioning(1, end=0.5), tiny.conditioning(2, start=0.3, end=0.75)
    forge.attach(job, (first, second))
    x, _, context, y = inputs(1)
    # two people without regions share the image equally
    halves = [changed(conditioning, weight=0.5) for conditioning in (first, second)]
    for progress, acting in ((0.1, [first]), (0.4, halves), (0.7, [second]), (0.9, [])):
        sigma = torch.tensor([14.6 * (1 - progress)])
        got = sample_once(job, x, sigma, context, y, [[(0, 0)]], progress)
        torch.testing.assert_close(
            got, expected_output(unet, acting, x, sigma, context, y, [True]), atol=1e-4, rtol=1e-4
        )


def test_each_ffrnet_is_registered_once_with_the_hosts_memory_management(unet):
    job = make_job(unet)
    a, b = tiny.side_by_side()
    forge.attach(job, (a, b, replace(a, landmarks=None)))
    models = job.sd_model.forge_objects.unet.controlnet_linked_list.get_models()
    assert [model.model.conv_in for model in models] == [a.ffrnet.conv_in, b.ffrnet.conv_in]


def test_passes_and_images_without_people_leave_the_networks_where_the_host_put_them(unet, monkeypatch):
    """The host moves them out when it needs the memory."""
    people = tiny.side_by_side()  # keeps the networks alive, as the engine's cache does
    forge.attach(make_job(unet), people)
    moves = []
    monkeypatch.setattr(FFRNet, "to", lambda self, *args: moves.append(args) or self)
    for who in (people, (), people[:1], ()):
        forge.attach(make_job(unet), who)
    assert moves == []


@pytest.fixture
def prepared(monkeypatch):
    """The UNets that were passed to the host's `sampling_prepare`."""
    seen = []

    def sampling_prepare(unet, x):
        seen.append(unet)
        for control in unet.list_controlnets():
            control.pre_run(unet.model, Predictor().percent_to_sigma)

    module = SimpleNamespace(sampling_prepare=sampling_prepare)
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(sd_samplers_common=module))
    monkeypatch.setitem(sys.modules, "modules.sd_samplers_common", module)
    return seen


def test_it_follows_a_refiner_and_releases_the_base_model(unet, prepared):
    job, conditioning = make_job(unet), tiny.conditioning(start=0.3)
    x, _, context, y = inputs(1)
    sigma = torch.tensor([2.0])
    forge.attach(job, (conditioning,))
    sample_once(job, x, sigma, context, y, [[(0, 0)]], 0.5)
    base = weakref.ref(job.sd_model)
    job.sd_model = load(unet)
    gc.collect()
    assert base() is None
    announce(job, x, 0.6)
    assert prepared == [job.sd_model.forge_objects.unet]
    got = sample_once(job, x, sigma, context, y, [[(0, 0)]], 0.6)
    expected = expected_output(unet, (conditioning,), x, sigma, context, y, [True])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert len(prepared) == 1, "prepared once"
    forge.detach(job)
    announce(job, x, 0.7)
    assert job.sd_model.forge_objects.unet.list_controlnets() == []
    assert job.comments == []


@pytest.mark.parametrize("other", ["widths", "kind"])
def test_a_refiner_with_other_widths_runs_without_facesnap_and_is_reported(unet, prepared, other):
    job = make_job(unet)
    forge.attach(job, (tiny.conditioning(),))
    narrow = ldm_unet(seed=6)
    narrow.input_blocks = narrow.input_blocks[:-1]
    job.sd_model = load(narrow) if other == "widths" else load(unet, is_sdxl=False)
    announce(job, inputs(1)[0], 0.6)
    assert job.sd_model.forge_objects.unet.list_controlnets() == []
    assert job.comments == [
        "FaceSnap stopped when the refiner took over, because its UNet has different channel widths."
    ]
    assert prepared == []
    assert job.extra_generation_params == {"FaceSnap stopped": "refiner"}


def test_a_refusal_survives_a_refiner_that_starts_at_the_first_step(unet, prepared):
    job = make_job(unet)
    forge.refuse(job, Refusal("No face in reference photo 1; choose another."))
    job.sd_model = load(unet)
    x, _, context, y = inputs(1)
    with pytest.raises(FaceSnapError, match="No face"):
        sample_once(job, x, torch.tensor([2.0]), context, y, [[(0, 0)]])


def test_a_finished_pass_frees_its_residuals_while_the_job_continues(unet):
    """Residuals take 60 MB of GPU memory per row at 1024²."""
    job, gone = make_job(unet), []
    x, _, context, y = inputs(1)
    for _batch in range(3):
        forge.attach(job, (tiny.conditioning(),))
        sample_once(job, x, torch.tensor([2.0]), context, y, [[(0, 0)]])
        gone.append(weakref.ref(job.sd_model.forge_objects.unet.controlnet_linked_list))
        forge.detach(job)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_progress_is_the_number_of_finished_evaluations(unet):
    """An evaluation that has just begun is not counted, so the third of four begins at half the progress."""
    job = make_job(unet)
    forge.attach(job, (tiny.conditioning(),))
    control = job.sd_model.forge_objects.unet.controlnet_linked_list
    for step in range(4):
        denoiser = SimpleNamespace(p=job, step=step, total_steps=4)
        forge.on_cfg_denoiser(SimpleNamespace(x=inputs(1)[0], denoiser=denoiser))
        assert control.progress == step / 4
    forge.detach(job)


def test_multidiffusion_tiles_are_refused(unet):
    job = make_job(unet)
    forge.attach(job, (tiny.conditioning(),))
    control = job.sd_model.forge_objects.unet.controlnet_linked_list
    for attribute in ("cond_hint", "cond_hint_original"):
        with pytest.raises(FaceSnapError, match="cannot be applied to MultiDiffusion's tiles; disable one of the two"):
            getattr(control, attribute)


def test_reforges_multidiffusion_tiles_are_refused_as_well(unet):
    """It asks what the control returned."""
    job = make_job(unet, reforge=True)
    forge.attach(job, (tiny.conditioning(),))
    control = job.sd_model.forge_objects.unet.controlnet_linked_list
    control.pre_run(job.sd_model.forge_objects.unet.model, None)
    x, _, _, y = inputs(1)
    returned = control.get_control(x, torch.tensor([2.0]), {"y": y}, 1, {"cond_or_uncond": [0]})
    with pytest.raises(FaceSnapError, match="cannot be applied to MultiDiffusion's tiles; disable one of the two"):
        _ = returned.cond_hint


def test_a_pass_without_people_is_left_unchanged(unet):
    """An example is the second pass of hires fix, if all people are active only in the first pass, whose control is
    still attached."""
    job = make_job(unet)
    forge.attach(job, (tiny.conditioning(),))
    forge.attach(job, ())
    assert job.sd_model.forge_objects.unet.list_controlnets() == []


def test_the_pass_after_detaching_is_bit_identical(unet):
    x, _, context, y = inputs(2)
    calls = [[(1, 0), (0, 1)]]
    job = make_job(unet)
    sigma = torch.tensor([2.0])
    plain = sample_once(job, x, sigma, context, y, calls)
    original = job.sd_model.forge_objects.unet
    forge.attach(job, (tiny.conditioning(),))
    assert not torch.equal(sample_once(job, x, sigma, context, y, calls), plain)
    assert original.list_controlnets() == []  # only a clone was patched
    forge.detach(job)
    assert torch.equal(sample_once(job, x, sigma, context, y, calls), plain)


def test_attaching_twice_leaves_one_control_and_keeps_others(unet):
    job = make_job(unet)
    objects = job.sd_model.forge_objects
    first, last = OtherControl({}), OtherControl({})
    objects.unet.add_patched_controlnet(first)
    forge.attach(job, (tiny.conditioning(),))
    objects.unet.add_patched_controlnet(last)
    forge.attach(job, (tiny.conditioning(),))
    links = objects.unet.list_controlnets()
    assert [link for link in links if not isinstance(link, FaceSnapControl)] == [last, first]
    assert sum(isinstance(link, FaceSnapControl) for link in links) == 1
    forge.detach(job)
    assert objects.unet.list_controlnets() == [last, first]


def test_the_control_of_a_failed_job_is_removed_with_the_job(unet):
    failed = make_job(unet)
    objects = failed.sd_model.forge_objects
    forge.attach(failed, (tiny.conditioning(),))
    another = FaceSnapControl(failed, (tiny.conditioning(),))
    objects.unet.add_patched_controlnet(another)
    del failed
    assert objects.unet.list_controlnets() == [another]


def test_detaching_works_before_a_model_is_loaded():
    forge.detach(SimpleNamespace(sd_model=SimpleNamespace(forge_objects=None)))
    forge.detach(SimpleNamespace(sd_model=SimpleNamespace()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda unet: (make_job(unet), Refusal("No face in reference photo 1; choose another.")), "No face"),
        (lambda unet: (make_job(unet, is_sdxl=False), (tiny.conditioning(),)), "needs an SDXL checkpoint"),
        (
            lambda unet: (
                make_job(unet),
                (tiny.conditioning(), tiny.conditioning(network=tiny.ffrnet(widths=(32, 64, 64)))),
            ),
            r"widths 32/64 .* has 32/64/96",
        ),
    ],
    ids=["preparation failed", "not SDXL", "other widths"],
)
def test_unsupported_jobs_stop_with_a_reason(unet, make, message):
    job, people = make(unet)
    if isinstance(people, Refusal):
        forge.refuse(job, people)
    else:
        forge.attach(job, people)
    x, _, context, y = inputs(1)
    with pytest.raises(FaceSnapError, match=message):
        sample_once(job, x, torch.tensor([2.0]), context, y, [[(0, 0)]])
    model = job.sd_model
    assert model.forge_objects.unet.controlnet_linked_list is not None
    del job
    gc.collect()
    assert model.forge_objects.unet.controlnet_linked_list is None


def test_the_host_may_pop_from_the_returned_lists(unet):
    job = make_job(unet)
    forge.attach(job, (tiny.conditioning(),))
    x, _, context, y = inputs(2)
    x[1] = x[0]
    sigma = torch.tensor([2.0])
    joint = sample_once(job, x, sigma, context, y, [[(1, 0), (0, 1)]])
    separate = sample_once(job, x, sigma, context, y, [[(0, 1)], [(1, 0)]])
    torch.testing.assert_close(joint, separate, atol=1e-5, rtol=1e-5)


def damaged() -> Conditioning:
    conditioning = tiny.conditioning()
    conditioning.ffrnet.conv_in.weight.fill_(torch.nan)
    return conditioning


@pytest.mark.parametrize("error", ["refused", "not finite", "split rows", "tiles"])
def test_where_the_page_hides_exceptions_an_error_in_sampling_interrupts_the_job(unet, monkeypatch, error):
    """As in reForge. The host catches its own exception for interrupted jobs, and the page shows the comment."""

    class InterruptedException(BaseException):
        pass

    state = SimpleNamespace(interrupted=False)
    module = SimpleNamespace(InterruptedException=InterruptedException)
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(shared=SimpleNamespace(state=state)))
    monkeypatch.setitem(sys.modules, "modules.sd_samplers_common", module)
    monkeypatch.setattr(fork, "current", lambda: fork.Fork("reForge", shows_sampling_errors=False))
    job = make_job(unet, reforge=True)
    job.do_not_save_samples = job.do_not_save_grid = False
    x, _, context, y = inputs(1)
    sigma = torch.tensor([2.0])
    if error == "refused":
        forge.refuse(job, Refusal("No face in reference photo 1; choose another."))
    else:
        forge.attach(job, (damaged() if error == "not finite" else tiny.conditioning(),))
    control = job.sd_model.forge_objects.unet.controlnet_linked_list
    sample = partial(sample_once, job, x, sigma, context, y, [[(0, 0)]])
    fail = {"split rows": lambda: control._parts([True]).next(2), "tiles": lambda: control.cond_hint}.get(error, sample)
    with pytest.raises(InterruptedException):
        fail()
    assert len(job.comments) == 1
    assert state.interrupted
    assert job.facesnap.refusal.message == job.comments[0]
