"""The ablated Mixers equal the paper's without one component, and have the same initial values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.networks.resampler import ResamplerMixer
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.initialise import with_mixer
from facesnap_lab.ablated_mixers import ClipMixer, ConcatMixer, IdMixer, PooledConcatMixer, PooledConcatMixerConfig
from tests.support import tiny
from tests.support.mixers import RESAMPLER, SIZES, references

CONFIG = MixerConfig(**{**SIZES, "dim": tiny.CONTEXT}, heads=4)
ABLATED = {
    "id only": IdMixer,
    "clip only": ClipMixer,
    "concatenation": ConcatMixer,
    "pooled concatenation": PooledConcatMixer,
}


@pytest.fixture(scope="module")
def paper():
    return tiny.randomise(FacialAttributeMixer(CONFIG), std=0.3)


def ablated(kind, paper):
    """An ablated Mixer with the weights of the paper's Mixer."""
    config, network = facesnap_file.MIXERS[kind]
    mixer = network(config(**vars(CONFIG))).eval()
    mixer.load_state_dict({key: paper.state_dict()[key] for key in mixer.state_dict()})
    return mixer


def test_id_only_equals_the_mixer_without_clip_tokens(paper):
    embeddings, clip_tokens = references(2, 2)
    no_tokens = clip_tokens[:, :, :0]
    torch.testing.assert_close(ablated("id only", paper)(embeddings, clip_tokens), paper(embeddings, no_tokens))


def test_clip_only_equals_eq_2_on_projected_clip_tokens(paper):
    embeddings, clip_tokens = references(2, 2)
    p = dict(paper.named_parameters())
    f_clip = (clip_tokens @ p["project_clip.weight"].T + p["project_clip.bias"]).reshape(2, -1, tiny.CONTEXT)
    expected = paper.decoder(p["queries"].expand(2, -1, -1), paper.norm_fused(f_clip))
    torch.testing.assert_close(ablated("clip only", paper)(embeddings, clip_tokens), expected)


def test_concatenation_returns_the_keys_of_eq_1(paper):
    embeddings, clip_tokens = references(2, 1)
    keys = []
    paper.cross_attn.register_forward_pre_hook(lambda module, args: keys.append(args[1]))
    paper(embeddings, clip_tokens)
    tokens = ablated("concatenation", paper)(embeddings, clip_tokens)
    torch.testing.assert_close(tokens, keys[0])
    other = ablated("concatenation", paper)(references(2, 1, seed=1)[0], clip_tokens)
    assert torch.equal(tokens[:, 5:], other[:, 5:])  # CLIP tokens do not depend on the embedding


def test_pooled_concatenation_mixes_the_tokens_linearly_into_as_many_as_the_mixers(paper):
    config = PooledConcatMixerConfig(**vars(CONFIG), clip_tokens=7)
    pooled = tiny.randomise(PooledConcatMixer(config), std=0.3)
    embeddings, clip_tokens = references(2, 2)
    tokens = pooled(embeddings, clip_tokens)
    assert tokens.shape == paper(embeddings, clip_tokens).shape
    all_tokens = ConcatMixer.forward(pooled, embeddings, clip_tokens)
    expected = torch.einsum("qt,ntd->nqd", pooled.pool.weight, all_tokens) + pooled.pool.bias[:, None]
    torch.testing.assert_close(tokens, pooled.norm_pooled(expected))


@pytest.fixture(scope="module")
def start(tmp_path_factory, paper):
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    ffrnet = tiny.ffrnet()
    facesnap_file.save(path, facesnap_file.FaceSnapInfo(CONFIG, ffrnet.config), paper, ffrnet)
    return path


@pytest.mark.parametrize("kind", ABLATED)
def test_all_mixers_have_the_same_initial_values_for_a_seed(start, kind, tmp_path):
    for name, mixer_kind, seed in (("a", kind, 1), ("b", "facial attributes", 1), ("c", "facial attributes", 2)):
        with_mixer(start, tmp_path / name, mixer_kind, seed)
    ablated_file, paper_file, other = (facesnap_file.load(tmp_path / name) for name in "abc")
    assert type(ablated_file.mixer) is ABLATED[kind]
    mixer, paper = ablated_file.mixer.state_dict(), paper_file.mixer.state_dict()
    own = {key for key in mixer if "pool" in key}  # the weighted sum, which the paper's Mixer does not have
    assert bool(own) == (kind == "pooled concatenation")
    mixer = {key: tensor for key, tensor in mixer.items() if key not in own}
    assert mixer.keys() < paper.keys()
    assert all(torch.equal(tensor, paper[key]) for key, tensor in mixer.items())
    assert any(not torch.equal(tensor, other.mixer.state_dict()[key]) for key, tensor in mixer.items())
    before = facesnap_file.load(start).ffrnet.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in ablated_file.ffrnet.state_dict().items())


def test_only_the_papers_mixer_can_be_ablated(tmp_path):
    ffrnet = tiny.ffrnet()
    path = tmp_path / "instantid.safetensors"
    facesnap_file.save(path, facesnap_file.FaceSnapInfo(RESAMPLER, ffrnet.config), ResamplerMixer(RESAMPLER), ffrnet)
    with pytest.raises(FaceSnapError, match=r"instantid\.safetensors does not have the paper's Mixer"):
        with_mixer(path, tmp_path / "out", "id only", 0)


def test_trainer_registers_the_ablated_mixers():
    """In a new process, in which no other module has registered them."""
    imports = "import facesnap_lab.training.trainer; from facesnap_ext.weights.facesnap_file import MIXERS"
    script = f"{imports}; print(*MIXERS, sep=';')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(result.stdout.strip().split(";")) >= set(ABLATED)
