"""FFRNet with compiled blocks, and the fallback when compiling fails."""

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
def reset_failure(monkeypatch):
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


def make_compiler_fail(error, monkeypatch):
    """Make compiled functions fail on their first call, as they do in practice, and return a list of those calls."""

    def call(*args):
        calls.append(args)
        raise error

    calls = []
    monkeypatch.setattr(torch, "compile", lambda forward: call)
    return calls


def test_blocks_are_compiled_once_and_without_graph_breaks(network, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    plain = residuals(network)
    assert counter.frame_count == 0
    assert equal(residuals(network, compile=True), plain)
    blocks = sum(isinstance(module, TransformerBlock) for module in network.modules())
    compilations = counter.frame_count
    assert 0 < compilations <= blocks
    assert equal(residuals(network, compile=True), plain)
    assert counter.frame_count == compilations
    assert compiled.failure is None
    assert not has_compiled_blocks(network)  # later calls without compile=True run uncompiled


def test_failure_falls_back_to_uncompiled_and_is_reported_once(network, monkeypatch, caplog):
    plain = residuals(network)
    calls = make_compiler_fail(RuntimeError("no Triton\nanywhere"), monkeypatch)
    for _ in range(2):
        assert equal(residuals(network, compile=True), plain)
    assert len(calls) == 1
    assert "(no Triton anywhere)" in compiled.failure
    assert [record.getMessage() for record in caplog.records] == [compiled.failure]
    assert not has_compiled_blocks(network)


def test_out_of_memory_is_not_a_compile_failure(network, monkeypatch):
    make_compiler_fail(torch.cuda.OutOfMemoryError("full"), monkeypatch)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        residuals(network, compile=True)
    assert compiled.failure is None
    assert not has_compiled_blocks(network)


def test_errors_in_ffrnet_itself_propagate(network, monkeypatch):
    make_compiler_fail(RuntimeError("no Triton"), monkeypatch)
    monkeypatch.setattr(FFRNet, "forward", lambda self, *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        residuals(network, compile=True)
    assert compiled.failure is None


def test_networks_with_compiled_blocks_are_garbage_collected(network, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: partial(forward))
    other = tiny.ffrnet()
    residuals(other, compile=True)
    reference = weakref.ref(other)
    del other
    gc.collect()
    assert reference() is None
