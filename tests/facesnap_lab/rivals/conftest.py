"""The runs that the tests of the rivals share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

for package in ("accelerate", "diffusers", "onnx", "peft", "tensorboard", "webdataset", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from facesnap_lab.rivals.attention import install
from facesnap_lab.rivals.methods import METHODS
from facesnap_lab.training import prepare
from facesnap_lab.training.data import Batch, collate
from facesnap_lab.training.objective import RandomInputs, draw_random_inputs
from facesnap_lab.training.run import Run
from tests.support.training_world import train_config


@pytest.fixture(scope="package")
def prepared(world, tmp_path_factory) -> Iterator[Callable[[str], Run]]:
    """Prepares each method's run once. All of them have the same frozen networks."""
    runs: dict[str, Run] = {}
    settings = train_config(world, tmp_path_factory.mktemp("rivals") / "out")
    with pytest.MonkeyPatch.context() as patch:

        def prepared_run(method: str) -> Run:
            if method not in runs:
                runs[method] = prepare.prepare_run(
                    replace(settings, method=method, out=settings.out / method, steps=3, id_every=3, warmup=0)
                )
                patch.setattr(prepare, "load_frozen", lambda config, device: runs[method].frozen)
            return runs[method]

        yield prepared_run
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture
def run(prepared, method) -> Iterator[Run]:
    """The method's run, whose weights and average are restored after the test."""
    run = prepared(method)
    parameters = list(run.networks.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    install(run.frozen.unet)
    yield run
    run.networks.zero_grad()
    run.optimizer.optimizer.state.clear()
    with torch.no_grad():
        for parameter, average, value in zip(parameters, run.average, before):
            parameter.copy_(value)
            average.copy_(value)


@pytest.fixture
def batch(run) -> Batch:
    return collate([run.images[row] for row in range(run.config.batch_size)])


@pytest.fixture
def inputs(batch) -> RandomInputs:
    return draw_random_inputs(0, batch.rows.tolist(), (4, 8, 8))


def without_output(rival):
    """Set everything that adds to the UNet to zero: values of identity tokens, LoRAs and zero convolutions."""
    with torch.no_grad():
        for name, parameter in rival.named_parameters():
            if any(part in name for part in (".to_v_ip.", ".lora_up.", ".controlnet_down_blocks.", "controlnet_mid")):
                parameter.zero_()
    return rival
