"""Low-rank differences: the best approximation of a given size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.weights import facesnap_file
from facesnap_lab.miniature import shipped, sizes

UNET = shipped.SDXL / "unet" / "diffusion_pytorch_model.safetensors"


def network(seed: int) -> dict[str, torch.Tensor]:
    shapes = {"wide.weight": (12, 40), "conv.weight": (8, 6, 3, 3), "small.weight": (4, 4), "bias": (5,)}
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def energy(state, other) -> float:
    return sum(float((tensor - other[key]).square().sum()) for key, tensor in state.items() if tensor.ndim > 1)


def test_low_rank_differences_are_recovered():
    unet = network(0)
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(12, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    state = {**unet, "wide.weight": unet["wide.weight"] + low, "own.weight": torch.ones(3, 3)}
    numbers = sum(tensor.numel() for tensor in unet.values() if tensor.ndim > 1)
    approximated = sizes.low_rank_approximation(state, unet, 2 * (12 + 40) / numbers + 1e-6)
    torch.testing.assert_close(approximated["wide.weight"], state["wide.weight"], atol=1e-4, rtol=1e-4)
    assert approximated.keys() == {key for key, tensor in unet.items() if tensor.ndim > 1}


@settings(deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 5))
def test_approximation_fits_its_size_and_improves_with_it(share, seed):
    state, unet = network(seed), network(seed + 10)
    approximated = sizes.low_rank_approximation(state, unet, share)
    numbers = 0
    for key, tensor in state.items():
        if tensor.ndim > 1:
            rows, columns = tensor.flatten(1).shape
            if key in approximated:
                rank = int(torch.linalg.matrix_rank((approximated[key] - unet[key]).flatten(1), rtol=1e-4))
                numbers += rank * (rows + columns)
                assert rank * (rows + columns) < tensor.numel()
            else:
                numbers += tensor.numel()
    assert numbers <= share * sum(tensor.numel() for tensor in state.values() if tensor.ndim > 1) + 1e-6
    smaller = sizes.low_rank_approximation(state, unet, share / 2)
    assert energy(state, {**state, **approximated}) <= energy(state, {**state, **smaller}) + 1e-3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_0_gives_the_unet_and_share_1_gives_ffrnet(tmp_path, share):
    sizes.write_low_rank(shipped.FACESNAP, UNET, tmp_path / "low.safetensors", share)
    approximated = facesnap_file.load(tmp_path / "low.safetensors").ffrnet.state_dict()
    own = facesnap_file.load(shipped.FACESNAP).ffrnet.state_dict()
    start = sizes.read_encoder(UNET, torch.float16)
    expected = {**own, **{key: t for key, t in start.items() if t.ndim > 1}} if share == 0 else own
    assert approximated.keys() == expected.keys()
    assert all(torch.equal(approximated[key], tensor.to(approximated[key].dtype)) for key, tensor in expected.items())


def test_plot_is_written(tmp_path):
    row = {"likeness": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    names = [sizes.HALF_PRECISION, sizes.EIGHT_BITS, *(f"low rank, {share:.0%}" for share in sizes.SHARES)]
    sizes.plot_likeness(dict.fromkeys(names, row), tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 500
