"""Residuals for whatever rows a host sends."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.guidance import Guidance, Residuals, landmark_picture

NETWORK = tiny.ffrnet()


def alone(guidance: Guidance, x, timestep, y=None):
    features = guidance.ffrnet.embed_landmarks(landmark_picture(guidance.landmarks, 8 * x.shape[3], 8 * x.shape[2]))
    return [guidance.weight * r for r in guidance.ffrnet(x, timestep, guidance.tokens, features, y)]


@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(1, 3),
    data=st.data(),
    cond_only=st.booleans(),
    text_free=st.booleans(),
)
def test_each_row_gets_what_it_would_get_alone(images, data, cond_only, text_free):
    """Rows in any order, repeated at will, in any number of calls, over two steps."""
    guidance = tiny.guidance(network=NETWORK, cond_only=cond_only, text_free=text_free, weight=0.6)
    residuals = Residuals((guidance,))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for _step in range(2):
        latents = torch.randn(images, 4, 8, 8, generator=g)
        timesteps = torch.randint(0, 1000, (images,), generator=g).float()
        for _call in range(data.draw(st.integers(1, 3))):
            rows = data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=5))
            sides = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
            y = torch.randn(len(rows), tiny.ADM, generator=g)
            got = residuals.rows(latents[rows], timesteps[rows], sides, y)
            for i, (row, is_cond) in enumerate(zip(rows, sides)):
                own_y = None if text_free else y[i : i + 1]
                wanted = alone(guidance, latents[row : row + 1], timesteps[row : row + 1], own_y)
                for residual, expected in zip(got, wanted):
                    mine = residual.expand(len(rows), -1, -1, -1)[i : i + 1]
                    if cond_only and not is_cond:
                        assert (mine == 0).all()
                    else:
                        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_weights_trained_with_text_refuse_to_run_without_it():
    with pytest.raises(ValueError, match="trained with text"):
        Residuals((tiny.guidance(network=NETWORK, text_free=False),)).rows(
            torch.randn(1, 4, 8, 8), torch.tensor([1.0]), [True]
        )


def test_landmarks_are_embedded_once_a_size(monkeypatch):
    sizes = []
    embed = NETWORK.embed_landmarks
    monkeypatch.setattr(NETWORK, "embed_landmarks", lambda picture: sizes.append(picture.shape[2:]) or embed(picture))
    residuals = Residuals((tiny.guidance(network=NETWORK),))
    for step in range(3):
        for size in ((8, 8), (12, 8)):
            residuals.rows(torch.randn(1, 4, *size), torch.tensor([float(step)]), [True])
    assert sizes == [(64, 64), (96, 64)]


def test_it_computes_in_its_own_type_inside_a_hosts_autocast():
    residuals = Residuals((tiny.guidance(network=NETWORK),))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    plain = residuals.rows(x, t, [True])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Residuals((tiny.guidance(network=NETWORK),)).rows(x, t, [True])
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


@pytest.mark.parametrize(
    ("start", "end", "acts"), [(0, 1, "1111"), (0.5, 1, "0011"), (0, 0.5, "1100"), (0.5, 0.5, "0000")]
)
def test_the_window(start, end, acts):
    guidance = tiny.guidance(network=NETWORK, start=start, end=end)
    assert "".join(str(int(guidance.acts_at(step / 4))) for step in range(4)) == acts


def test_no_landmarks_are_a_black_drawing():
    black = landmark_picture(None, 64, 48)
    assert black.shape == (1, 3, 48, 64)
    assert (black == 0).all()
    drawn = landmark_picture(tiny.landmarks(), 64, 64)
    assert 0 < drawn.max() <= 1
