"""InstantID's file is a FaceSnap file of the kind that the extension makes from the published weights."""

from __future__ import annotations

import pytest
import torch

from facesnap_ext.landmarks.points5 import draw_five
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.facesnap_file import POINTS5
from facesnap_lab.rivals.method import Text, UNetCall

pytestmark = pytest.mark.parametrize("method", ["instantid"])


@torch.no_grad()
def test_file_is_loaded_like_the_published_weights(run, tmp_path):
    path = tmp_path / "instantid.safetensors"
    rival = run.networks
    rival.save(path, run.info)
    weights = facesnap_file.load(path)
    assert (weights.info.text_free, weights.info.hint, weights.info.null_identity) == (False, POINTS5, True)
    assert weights.info.mixer.clip_dim == 0
    embeddings = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0))
    tokens = weights.mixer(embeddings)
    keys_values = facesnap_file.load_adapter(path)(tokens, weights.mixer(torch.zeros_like(embeddings)))
    call = UNetCall(torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 68), torch.rand(1, 3, 64, 64))
    text = Text(torch.zeros(1, 5, 48), torch.zeros(1, 20), torch.zeros(1, 5, dtype=torch.bool))
    injection = rival((embeddings,), text, call)
    for (keys, values), (own_keys, own_values) in zip(keys_values, injection.keys_values, strict=True):
        torch.testing.assert_close(keys[:1], own_keys)
        torch.testing.assert_close(values[:1], own_values)


def test_landmark_images_show_five_points(run):
    item = run.images[0]
    side = run.config.resolution
    still = Landmarks(item["points"].numpy(), side, side)
    shown = (255 * item["landmark_images"]).round().permute(1, 2, 0).numpy()
    expected = draw_five(still, *shown.shape[:2])
    assert abs(shown.mean() - expected.mean()) < 0.2 * expected.mean(), "only the jitter differs"
