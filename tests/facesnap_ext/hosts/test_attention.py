"""InstantID's adapter in each host's UNet, compared with diffusers' IP-Adapter and with the written-out formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import a1111, forge
from facesnap_ext.hosts.attention import AdapterHooks, Call, cross_attentions, labels_of
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.regions import PaintedRegion
from facesnap_ext.residuals import Residuals
from tests.facesnap_ext.hosts import test_a1111, test_diffusers, test_forge
from tests.support import tiny
from tests.support.ldm_unet import inputs, ldm_unet

SILENT = tiny.ffrnet()
for conv in [*SILENT.controlnet_down_blocks, SILENT.controlnet_mid_block]:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)


def person(unet: nn.Module, seed: int = 0, network=SILENT, **changes):
    """A person with an adapter for this UNet, and by default with zero residuals."""
    widths = tuple(layer.to_q.out_features for layer in cross_attentions(unet))
    adapter = tiny.randomise(Adapter(AdapterConfig(widths, tiny.CONTEXT)), seed + 5, 0.3)
    g = torch.Generator().manual_seed(seed)
    tokens, null = torch.randn(2, 1, 16, tiny.CONTEXT, generator=g)
    values = {"tokens": tokens, "uncond_tokens": null, "adapter": lambda: adapter(tokens, null), "adapter_weight": 0.8}
    return tiny.conditioning(seed, network, **{**values, **changes}), adapter


# --- diffusers, compared with its IP-Adapter


@pytest.fixture(scope="module")
def pipe():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.StableDiffusionXLPipeline(**test_diffusers.parts(), add_watermarker=False)


def with_ip_adapter(unet, adapter: Adapter, tokens, weight: float):
    """Set diffusers' processors in every cross-attention, numbered as in InstantID's file; return the hook's handle."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    processors = {}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn1.processor"):
            processors[name] = AttnProcessor2_0()
            continue
        layer = adapter.get_submodule(str(number))
        processor = IPAdapterAttnProcessor2_0(
            layer.to_k_ip.out_features, tiny.CONTEXT, num_tokens=(tokens.shape[1],), scale=weight
        )
        processor.to_k_ip[0].load_state_dict(layer.to_k_ip.state_dict())
        processor.to_v_ip[0].load_state_dict(layer.to_v_ip.state_dict())
        processors[name] = processor
    unet.set_attn_processor(processors)

    def add_tokens(module, args, kwargs):  # the way the UNet passes projected image embeddings
        kwargs["encoder_hidden_states"] = (kwargs["encoder_hidden_states"], [tokens[: len(args[0])][:, None]])
        return args, kwargs

    return unet.register_forward_pre_hook(add_tokens, with_kwargs=True)


def test_cross_attentions_are_numbered_as_in_instantids_file(pipe):
    named = {id(module): name for name, module in pipe.unet.named_modules()}
    ours = [f"{named[id(layer)]}.processor" for layer in cross_attentions(pipe.unet)]
    numbers = [number for number, name in enumerate(pipe.unet.attn_processors) if name in ours]
    assert [list(pipe.unet.attn_processors)[number] for number in numbers] == ours
    assert numbers == list(range(1, 2 * len(ours), 2))


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["CFG 1", "CFG 3"])
def test_it_equals_diffusers_ip_adapter(pipe, scale):
    conditioning, adapter = person(pipe.unet)
    plain = test_diffusers.run(pipe, guidance_scale=scale)
    with conditioned(pipe, conditioning):
        got = test_diffusers.run(pipe, guidance_scale=scale)
    before = pipe.unet.attn_processors
    both = [conditioning.uncond_tokens, conditioning.tokens] if scale > 1 else [conditioning.tokens]
    handle = with_ip_adapter(pipe.unet, adapter, torch.cat(both), 0.8)
    try:
        expected = test_diffusers.run(pipe, guidance_scale=scale)
    finally:
        handle.remove()
        pipe.unet.set_attn_processor(before)
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(test_diffusers.run(pipe, guidance_scale=scale), plain), "something was left behind"


def test_weight_0_does_not_change_a_bit(pipe):
    conditioning, _ = person(pipe.unet, adapter_weight=0.0)
    without = replace(conditioning, adapter=None)
    with conditioned(pipe, conditioning):
        a = test_diffusers.run(pipe)
    with conditioned(pipe, without):
        assert torch.equal(a, test_diffusers.run(pipe))


def test_a_unet_with_other_attentions_is_refused_and_left_unchanged(pipe):
    conditioning, _ = person(pipe.unet)
    short = replace(conditioning, adapter=lambda: conditioning.adapter()[:-1])
    hooks = test_a1111.hooks_of(pipe.unet)
    with (
        pytest.raises(FaceSnapError, match=r"adapter of FaceSnap was made for \d+ cross-attentions"),
        conditioned(pipe, short),
    ):
        pass
    assert test_a1111.hooks_of(pipe.unet) == hooks


# --- A1111 and Forge, compared with the formula


@pytest.fixture(scope="module")
def unet():
    return ldm_unet()


host = test_a1111.host  # a fixture


def reference_output(unet, people, one, is_cond: bool, size):
    """Run one row through the UNet with written-out cross-attentions: text, plus each person's identity.

    Args:
        people: tuples (conditioning, adapter, blend weight [h, w] or None).
        one: the row's inputs.
    """
    layers = cross_attentions(unet)

    def forward_of(number, layer):
        def forward(x, context=None, mask=None, **_):
            def heads(t):
                return t.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

            def attend(keys, values):
                weights = heads(q) @ heads(keys).transpose(2, 3) / (q.shape[-1] / layer.heads) ** 0.5
                return (weights.softmax(-1) @ heads(values)).transpose(1, 2).flatten(2)

            q = layer.to_q(x)
            out = attend(layer.to_k(context), layer.to_v(context))
            for conditioning, adapter, blend_weight in people:
                if conditioning.strength.cond_only and not is_cond:
                    continue
                tokens = conditioning.tokens if is_cond else conditioning.uncond_tokens
                projections = adapter.get_submodule(str(2 * number + 1))
                extra = conditioning.strength.adapter_weight * attend(
                    projections.to_k_ip(tokens), projections.to_v_ip(tokens)
                )
                if blend_weight is not None:
                    level = round((size[0] * size[1] / x.shape[1]) ** 0.5)
                    mask_of = F.avg_pool2d(torch.from_numpy(blend_weight)[None, None], level)
                    extra = extra * mask_of.flatten()[:, None]
                out = out + extra
            return layer.to_out(out)

        return forward

    kept = [layer.forward for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.forward = forward_of(number, layer)
        with torch.no_grad():
            return unet(one[0], timesteps=one[1], context=one[2], y=one[3])
    finally:
        for layer, forward in zip(layers, kept):
            layer.forward = forward


def people_of(unet, kind: str):
    left = np.zeros((16, 16), np.float32)
    left[:, :8] = 1
    if kind == "one":
        return [(*person(unet), None)]
    if kind == "one on conditional rows":
        return [(*person(unet, cond_only=True), None)]
    return [
        (*person(unet, 1, region=PaintedRegion(left), cond_only=True), left),
        (*person(unet, 2, region=PaintedRegion(1 - left), adapter_weight=1.3), 1 - left),
    ]


KINDS = ["one", "one on conditional rows", "two"]


@pytest.mark.parametrize(
    ("grouping", "kind"),
    [(name, kind) for name in test_a1111.GROUPINGS for kind in KINDS if kind != "one" or name in test_a1111.HARDEST],
)
def test_a1111_rows_attend_to_their_own_tokens_in_every_grouping(unet, grouping, kind):
    cond, uncond, calls = test_a1111.GROUPINGS[grouping]
    people = people_of(unet, kind)
    x, timesteps, context, y = inputs(cond + uncond)
    rows = range(cond + uncond)
    expected = torch.cat(
        [
            reference_output(unet, people, [t[r : r + 1] for t in (x, timesteps, context, y)], r < cond, x.shape[2:])
            for r in rows
        ]
    )
    plain = test_a1111.call(unet, x, timesteps, context, y, list(rows))
    assert not torch.allclose(expected, plain, atol=1e-3)
    hooks = test_a1111.hooks_of(unet)
    job = test_a1111.Job(unet)
    a1111.attach(job, tuple(conditioning for conditioning, *_ in people))
    for step in range(2):
        test_a1111.announce(job, x, cond, step)
        for chosen in calls:
            got = test_a1111.call(unet, x, timesteps, context, y, chosen)
            torch.testing.assert_close(got, expected[chosen], atol=1e-4, rtol=1e-4)
    # an unannounced call, and the UNet afterwards
    assert torch.equal(test_a1111.call(unet, x, timesteps, context, y, list(rows)), plain)
    a1111.detach(job)
    assert test_a1111.hooks_of(unet) == hooks
    assert torch.equal(test_a1111.call(unet, x, timesteps, context, y, list(rows)), plain)


def test_a1111_handles_start_and_end_failed_jobs_and_wrong_adapters(unet):
    conditioning, _ = person(unet, end=0.5)
    args = inputs(1)
    plain = test_a1111.call(unet, *args, [0])
    job, other = test_a1111.Job(unet), test_a1111.Job(unet)
    a1111.attach(job, (conditioning,))
    acted = []
    for step in range(4):
        test_a1111.announce(job, args[0], 1, step, 4)
        acted.append(not torch.equal(test_a1111.call(unet, *args, [0]), plain))
    assert acted == [True, True, False, False]
    test_a1111.announce(job, args[0], 1)  # the job then fails before the call
    test_a1111.announce(other, args[0], 1)
    assert torch.equal(test_a1111.call(unet, *args, [0]), plain)

    a1111.attach(job, (replace(conditioning, adapter=lambda: conditioning.adapter()[1:]),))
    test_a1111.announce(job, args[0], 1)
    with pytest.raises(FaceSnapError, match="set the adapter weight to 0 or choose a different checkpoint"):
        test_a1111.call(unet, *args, [0])


class ForgeUNet(nn.Module):
    """Like Forge's UNet: an LDM UNet whose calls receive `control` and `transformer_options`."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.input_blocks, self.middle_block, self.output_blocks = (
            unet.input_blocks,
            unet.middle_block,
            unet.output_blocks,
        )
        self.walked = [unet]  # kept in a list, so that it is not registered as a submodule

    def forward(self, x, timesteps, context, y, control, transformer_options):
        return test_forge.forge_walk(self.walked[0], x, timesteps, context, y, control, transformer_options)


@torch.no_grad()
def forge_step(job, x, sigmas, context, y, calls):
    """Like `test_forge.sample_once`, but call the UNet as a module, so that its hooks run."""
    patcher = job.sd_model.forge_objects.unet
    for control in patcher.list_controlnets():
        control.pre_run(patcher.model, test_forge.Predictor().percent_to_sigma)
    images, out = len(sigmas), {}
    for chunks in calls:
        rows = [row for _, first in chunks for row in range(first, first + images)]
        t = torch.cat([sigmas] * len(chunks))
        options = {"cond_or_uncond": [side for side, _ in chunks]}
        control = None
        if (head := patcher.controlnet_linked_list) is not None:
            cond = {"c_crossattn": context[rows], "y": y[rows]}
            if job.reforge:
                control = head.get_control(x[rows], t, cond, len(chunks), options)
            else:
                control = head.get_control(x[rows], t, {**cond, "transformer_options": options}, len(chunks))
        scaled = test_forge.Predictor().calculate_input(t, x[rows])
        timesteps = test_forge.Predictor().timestep(t)
        result = patcher.model.diffusion_model(
            scaled, timesteps, context=context[rows], y=y[rows], control=control, transformer_options=options
        )
        out.update(zip(rows, result))
    return torch.stack([out[row] for row in sorted(out)])


@pytest.mark.parametrize("kind", KINDS)
@test_forge.each_grouping
def test_forge_rows_attend_to_their_own_tokens_in_every_grouping(unet, grouping, kind, reforge):
    images, calls = test_forge.GROUPINGS[grouping]
    people = people_of(unet, kind)
    chunks = sorted((chunk for call in calls for chunk in call), key=lambda chunk: chunk[1])
    x, _, context, y = inputs(images * len(chunks))
    sigmas = torch.full((images,), 2.0)
    is_cond = [side == 0 for side, _ in chunks for _ in range(images)]
    sigma = torch.full((len(x),), 2.0)
    scaled, timesteps = test_forge.Predictor().calculate_input(sigma, x), test_forge.Predictor().timestep(sigma)
    expected = torch.cat(
        [
            reference_output(unet, people, [t[r : r + 1] for t in (scaled, timesteps, context, y)], side, x.shape[2:])
            for r, side in enumerate(is_cond)
        ]
    )
    hooks = test_a1111.hooks_of(unet)
    job = test_forge.make_job(ForgeUNet(unet), reforge)
    plain_patcher = job.sd_model.forge_objects.unet
    plain = forge_step(job, x, sigmas, context, y, calls)
    assert not torch.allclose(expected, plain, atol=1e-3)
    forge.attach(job, tuple(conditioning for conditioning, *_ in people))
    torch.testing.assert_close(forge_step(job, x, sigmas, context, y, calls), expected, atol=1e-4, rtol=1e-4)
    # another job's patcher on the same UNet, while the hooks still exist
    conditioned_patcher = job.sd_model.forge_objects.unet
    job.sd_model.forge_objects.unet = plain_patcher
    assert torch.equal(forge_step(job, x, sigmas, context, y, calls), plain)
    job.sd_model.forge_objects.unet = conditioned_patcher
    forge.detach(job)
    assert test_a1111.hooks_of(unet) == hooks
    assert len(job.sd_model.forge_objects.unet.model.diffusion_model._forward_pre_hooks) == 0


def test_forges_quantised_projections_without_out_features_are_supported(unet, monkeypatch):
    conditioning, *_ = person(unet)
    for layer in cross_attentions(unet):
        monkeypatch.delattr(layer.to_q, "out_features")
        monkeypatch.setattr(layer, "dim_head", layer.to_q.weight.shape[0] // layer.heads, raising=False)
    job = test_forge.make_job(ForgeUNet(unet))
    forge.attach(job, (conditioning,))
    assert isinstance(job.sd_model.forge_objects.unet.controlnet_linked_list, forge.FaceSnapControl)
    forge.detach(job)


def test_forge_hooks_are_removed_when_their_job_is_garbage_collected(unet):
    import gc

    hooks = test_a1111.hooks_of(unet)
    job = test_forge.make_job(ForgeUNet(unet))
    forge.attach(job, (person(unet)[0],))
    assert test_a1111.hooks_of(unet) > hooks
    del job
    gc.collect()
    assert test_a1111.hooks_of(unet) == hooks


# --- together with extensions that call attentions once per region, repeat rows, or shrink features


def regional_prompter(layer):
    """Call an attention layer as Regional Prompter does: each half of the rows once per region, with that region's part
    of the output. If the number of rows is odd, all rows are processed in one call, as with prompts of the same length.
    """
    kept = layer.forward

    def forward(x, context=None, **_):
        outputs = []
        for part, text in zip(*(t.chunk(2) if len(t) % 2 == 0 else (t,) for t in (x, context))):
            regions = [kept(part, context=text) for _ in range(2)]
            half = x.shape[1] // 2
            outputs.append(torch.cat([regions[0][:, :half], regions[1][:, half:]], dim=1))
        return torch.cat(outputs)

    return forward


def one_row_at_a_time(layer):
    kept = layer.forward
    return lambda x, context=None, **_: torch.cat(
        [kept(x[i : i + 1], context=context[i : i + 1]) for i in range(len(x))]
    )


def forge_couple(cond_rows):
    """Call an attention layer as Forge Couple does: the conditional rows are repeated for each region, an odd number of
    rows is padded with zeros, and the regions' outputs are mixed."""

    def replaced(layer):
        kept = layer.forward

        def forward(x, context=None, **_):
            queries, text = (
                [x[cond_rows:], x[:cond_rows].repeat(3, 1, 1)],
                [context[cond_rows:], *[context[:cond_rows]] * 3],
            )
            queries, text = torch.cat(queries), torch.cat(text)
            if len(queries) % 2:
                queries, text = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (queries, text))
            out = kept(queries, context=text)
            rest, regions = len(x) - cond_rows, out[len(x) - cond_rows :][: 3 * cond_rows]
            weights = torch.rand(3, 1, x.shape[1], 1, generator=torch.Generator().manual_seed(0))
            mixed = (regions.unflatten(0, (3, cond_rows)) * weights / weights.sum(0)).sum(0)
            return torch.cat([mixed, out[:rest]])

        return forward

    return replaced


REGIONAL = {
    "Regional Prompter": lambda cond: regional_prompter,
    "one row at a time": lambda cond: one_row_at_a_time,
    "Forge Couple": forge_couple,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(1, 1), (2, 0), (3, 3)], ids=str)
@pytest.mark.parametrize("extension", REGIONAL)
def test_regional_prompts_leave_each_persons_attention_unchanged(unet, monkeypatch, extension, rows, kind):
    """The extensions mix the outputs for each region with weights that add up to 1, as FaceSnap does for people. With
    the same text in every region, the result is therefore the same as without the extension."""
    cond, uncond = rows
    people = people_of(unet, kind)
    args = inputs(cond + uncond)
    job, everything = test_a1111.Job(unet), list(range(cond + uncond))
    plain = test_a1111.call(unet, *args, everything)
    a1111.attach(job, tuple(conditioning for conditioning, *_ in people))
    test_a1111.announce(job, args[0], cond)
    expected = test_a1111.call(unet, *args, everything)
    assert not torch.allclose(expected, plain, atol=1e-3)
    for layer in cross_attentions(unet):
        monkeypatch.setattr(layer, "forward", REGIONAL[extension](cond)(layer))
    test_a1111.announce(job, args[0], cond)
    torch.testing.assert_close(test_a1111.call(unet, *args, everything), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:1] + x[1:],  # the second row is not a row of the call
        lambda x: torch.cat([x, x[:1] + 1]),  # one additional row
    ],
    ids=["fewer", "more"],
)
def test_rows_that_no_side_can_be_told_for_stop_the_job(unet, monkeypatch, change):
    """Otherwise, a conditional row might attend to the unconditional tokens, or vice versa."""
    conditioning, _ = person(unet)
    job, args = test_a1111.Job(unet), inputs(2)
    a1111.attach(job, (conditioning,))
    test_a1111.announce(job, args[0], 1)
    layer = cross_attentions(unet)[0]
    kept = layer.forward
    monkeypatch.setattr(
        layer,
        "forward",
        lambda x, context=None, **_: kept(change(x), context=context[:1].expand(len(change(x)), -1, -1)),
    )
    with pytest.raises(FaceSnapError, match="cannot tell the positive from the negative prompt"):
        test_a1111.call(unet, *args, [0, 1])


def test_rows_that_are_equal_on_both_sides_are_told_apart_by_their_place_or_refused():
    whole = torch.ones(2, 3, 4)
    whole[1:] = whole[:1]
    sides = [(True, 0), (False, 0)]
    assert labels_of(whole[1:], whole, sides) == [(False, 0)]
    assert labels_of(whole.clone(), whole, sides) == sides
    # it is unknown whether the row is conditional, or which image it belongs to
    for labels in (sides, [(True, 0), (True, 1)]):
        with pytest.raises(FaceSnapError, match="cannot tell the positive from the negative prompt"):
            labels_of(whole[1:].clone(), whole, labels)
    assert labels_of(whole[1:].clone(), whole, [(True, 1), (True, 1)]) == [(True, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_forge_rows_that_a_wrapper_sends_in_parts_attend_to_the_tokens_of_their_side(unet, kind):
    people = people_of(unet, kind)
    x, _, context, y = inputs(3)
    sigmas, options = torch.full((3,), 2.0), {"cond_or_uncond": [1, 0, 0]}
    scaled, timesteps = test_forge.Predictor().calculate_input(sigmas, x), test_forge.Predictor().timestep(sigmas)
    parts = [[t[row : row + 1] for t in (scaled, timesteps, context, y)] for row in range(3)]
    expected = [reference_output(unet, people, part, row > 0, x.shape[2:]) for row, part in enumerate(parts)]
    job = test_forge.make_job(ForgeUNet(unet))
    forge.attach(job, tuple(conditioning for conditioning, *_ in people))
    patcher = job.sd_model.forge_objects.unet
    patcher.controlnet_linked_list.pre_run(patcher.model, None)
    cond = {"y": y, "transformer_options": options}
    control = patcher.controlnet_linked_list.get_control(x, sigmas, cond, 3)
    with torch.no_grad():
        for part, result in zip(parts, expected):
            got = patcher.model.diffusion_model(*part, control=control, transformer_options=options)
            torch.testing.assert_close(got, result, atol=1e-4, rtol=1e-4)
    forge.detach(job)


@pytest.mark.parametrize("shrunk", [(7, 7), (5, 9), (8, 8), (16, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_act_on_features_of_any_size(unet, kind, shrunk):
    """Deep shrink, for example, changes the size. Regions are sampled at the size of the attention's features."""
    people = tuple(conditioning for conditioning, *_ in people_of(unet, kind))
    hooks = AdapterHooks(Residuals(people))
    hooks.hook(unet)
    try:
        transformer = next(module for module in unet.modules() if hasattr(module, "transformer_blocks"))
        width = transformer.norm.num_channels
        g = torch.Generator().manual_seed(3)
        x, context = torch.randn(1, width, *shrunk, generator=g), torch.randn(1, 5, tiny.CONTEXT, generator=g)
        with torch.no_grad():
            plain = transformer(x, context=context)
            hooks.call = Call((True,), (True,) * len(people), (0,))
            changed = transformer(x, context=context)
    finally:
        hooks.remove()
    assert changed.shape == plain.shape
    assert not torch.allclose(changed, plain, atol=1e-3)


def test_merged_tokens_with_regions_stop_the_job(unet, monkeypatch):
    people = tuple(conditioning for conditioning, *_ in people_of(unet, "two"))
    job, args = test_a1111.Job(unet), inputs(2)
    a1111.attach(job, people)
    test_a1111.announce(job, args[0], 1)
    layer = cross_attentions(unet)[0]
    kept = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, context=None, **_: kept(x[:, ::2], context=context))
    with pytest.raises(FaceSnapError, match="merges the UNet's tokens"):
        test_a1111.call(unet, *args, [0, 1])
