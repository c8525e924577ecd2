"""FFRNet with compiled blocks, and what happens where they cannot be compiled."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from facesnap_ext.networks import compiled
from facesnap_ext.networks.ffrnet import FFRNet, TransformerBlock
from facesnap_ext.residuals import Residuals
from tests.support import tiny


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch):
    monkeypatch.setattr(compiled, "failure", None)


@pytest.fixture
def network() -> FFRNet:
    return tiny.ffrnet()


def residuals(network: FFRNet, **values) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Residuals([tiny.conditioning(network=network, **values)]).rows(x, torch.tensor([9.0, 9.0]), [True, True])


def equal(a, b) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def has_compiled_blocks(network: FFRNet) -> bool:
    return any("forward" in vars(module) for module in network.modules() if isinstance(module, TransformerBlock))


def fails_with(error, monkeypatch):
    """A compiler that is found wanting when something is to be computed, as they are."""

    def call(*args):
        calls.append(args)
        raise error

    calls = []
    monkeypatch.setattr(torch, "compile", lambda forward: call)
    return calls


def test_blocks_are_compiled_whole_once_and_compute_the_same(network, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    plain = residuals(network)
    assert counter.frame_count == 0
    assert equal(residuals(network, compile=True), plain)
    blocks = sum(isinstance(module, TransformerBlock) for module in network.modules())
    first = counter.frame_count
    assert 0 < first <= blocks
    assert equal(residuals(network, compile=True), plain)
    assert counter.frame_count == first
    assert compiled.failure is None
    assert not has_compiled_blocks(network)  # who does not ask for it does not get it


def test_where_it_fails_ffrnet_runs_as_it_is_and_says_so_once(network, monkeypatch, caplog):
    plain = residuals(network)
    calls = fails_with(RuntimeError("no Triton\nanywhere"), monkeypatch)
    for _ in range(2):
        assert equal(residuals(network, compile=True), plain)
    assert len(calls) == 1
    assert "(no Triton anywhere)" in compiled.failure
    assert [record.getMessage() for record in caplog.records] == [compiled.failure]
    assert not has_compiled_blocks(network)


def test_too_little_memory_is_no_compilers_fault(network, monkeypatch):
    fails_with(torch.cuda.OutOfMemoryError("full"), monkeypatch)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        residuals(network, compile=True)
    assert compiled.failure is None
    assert not has_compiled_blocks(network)


def test_an_error_of_ffrnets_own_stays_one(network, monkeypatch):
    fails_with(RuntimeError("no Triton"), monkeypatch)
    monkeypatch.setattr(FFRNet, "forward", lambda self, *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        residuals(network, compile=True)
    assert compiled.failure is None


def test_a_network_with_compiled_blocks_is_let_go(network, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: partial(forward))
    other = tiny.ffrnet()
    residuals(other, compile=True)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
