"""FFRNets under the hosts' memory management, on outlines of the hosts' patchers."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from facesnap_ext.hosts import patchers
from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_ext.networks.layers import Movable
from tests.support import tiny
from tests.support.mock_patchers import Loaded, ModelPatcher, size_of


class ReForgePatcher(ModelPatcher):
    casting = "ldm_patched_cast_weights"


def unet_of(kind: type[ModelPatcher], dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """A host's UNet patcher, whose base class is the host's `ModelPatcher`."""
    made = type("UnetPatcher", (kind,), {"__init__": lambda self: None})()
    made.model, made.load_device, made.offload_device = SimpleNamespace(computation_dtype=dtype), "gpu", "cpu"
    return made


HOSTS = pytest.mark.parametrize("kind", [ModelPatcher, ReForgePatcher], ids=["Forge, Neo", "reForge"])


@torch.no_grad()
def residuals(network: FFRNet, text_free: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, network.config.in_channels, 16, 16, generator=generator)
    tokens = torch.randn(1, 16, network.config.context_dim, generator=generator)
    drawn = torch.rand(1, 3, *(network.config.pixels_per_latent * 16,) * 2, generator=generator)
    y = None if text_free else torch.randn(2, network.config.adm_dim, generator=generator)
    timesteps = torch.tensor([500, 500])
    return network(x, timesteps, network.embed_tokens(tokens), network.embed_landmarks(drawn), y)


@HOSTS
@pytest.mark.parametrize("text_free", [True, False], ids=["FaceSnap", "InstantID"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.8, 1.1])
def test_residuals_do_not_depend_on_how_much_of_the_network_is_loaded(kind, text_free, share):
    network = tiny.ffrnet()
    expected = residuals(network, text_free)
    (patcher,) = patchers.patchers_of([network], unet_of(kind))
    left = patcher.partially_load(share * size_of(network))
    assert (left == 0) == (share > 1)
    for got, want in zip(residuals(network, text_free), expected, strict=True):
        assert torch.equal(got, want)


def test_a_layer_without_the_hosts_attribute_would_mix_devices():
    """The test above would otherwise prove nothing."""
    network = nn.Linear(4, 4)
    assert ModelPatcher(network).partially_load(0) == 1
    with pytest.raises(RuntimeError, match="same device"):
        network(torch.zeros(1, 4))


@HOSTS
def test_every_weight_belongs_to_a_layer_that_the_host_may_leave_behind(kind):
    network = tiny.ffrnet()
    patchers.patchers_of([network], unet_of(kind))
    owned = [weight for layer in network.modules() if isinstance(layer, Movable) for weight in layer.parameters()]
    assert {id(weight) for weight in owned} == {id(weight) for weight in network.parameters()}
    assert all(hasattr(layer, kind.casting) for layer in network.modules() if isinstance(layer, Movable))


@HOSTS
def test_passes_and_jobs_share_one_patcher_per_network(kind):
    first, second = tiny.ffrnet(), tiny.ffrnet()
    loaded = Loaded()
    for _ in range(5):
        loaded.load(patchers.patchers_of([first, second], unet_of(kind)))
        gc.collect()
    assert len(loaded.requests) == 2, "each network is moved once"


@HOSTS
def test_a_network_that_the_cache_drops_is_freed_at_once(kind):
    """Without waiting for a garbage collection, in which a patcher and its network would leave together."""
    gc.disable()
    try:
        network, loaded = tiny.ffrnet(), Loaded()
        loaded.load(patchers.patchers_of([network], unet_of(kind)))
        weight = weakref.ref(network.mid_block)
        del network
        assert weight() is None
        assert loaded.leaked() == []
    finally:
        gc.enable()


@HOSTS
def test_another_number_type_makes_a_new_patcher_after_the_host_was_told(kind):
    network, loaded = tiny.ffrnet(), Loaded()
    (first,) = patchers.patchers_of([network], unet_of(kind))
    first.partially_load(0.5 * size_of(network))
    loaded.load([first])
    del first
    (second,) = patchers.patchers_of([network], unet_of(kind, torch.bfloat16))
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert not any(getattr(layer, kind.casting, False) for layer in network.modules())
    loaded.load([second])
    assert len(loaded.requests) == 2
    assert patchers.patchers_of([network], unet_of(kind, torch.bfloat16)) == [second]
