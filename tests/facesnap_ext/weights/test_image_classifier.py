"""Image classifiers compute what transformers computes, and only classifiers that FaceSnap understands are used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.image_classifier import ACCEPTED, ACTIVATIONS, REJECTED, load_classifier, rejection
from facesnap_ext.weights.model_list import list_models
from facesnap_ext.weights.search import find_models
from tests.support.classifiers import change_json, make_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder that tests must not change."""
    return make_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def copy(classifier, tmp_path):
    folder = tmp_path / "models" / "image_classifier"
    folder.mkdir(parents=True)
    for file in classifier.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def picture(seed: int, width: int, height: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).resize((width, height))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("labels", [("normal", "nsfw"), ("drawings", "hentai", "neutral", "porn", "sexy")])
def test_scores_are_those_of_transformers_pipeline(tmp_path, activation, labels):
    from transformers import pipeline

    folder = make_classifier(tmp_path, labels, hidden_act=activation)
    reference = pipeline("image-classification", str(folder), device="cpu")
    own = load_classifier(folder)
    for seed, (width, height) in enumerate([(32, 32), (50, 40), (20, 70), (512, 384)]):
        image = picture(seed, width, height)
        expected = {one["label"]: one["score"] for one in reference(image, top_k=len(labels))}
        assert own.scores(image) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"resample": 3},
        {"resample": 0, "image_std": [0.2, 0.3, 0.4]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"size": 32, "image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"},
    ],
)
def test_pixels_are_those_of_transformers_processor(copy, values):
    from transformers import ViTImageProcessor

    change_json(copy / "preprocessor_config.json", **values)
    processor = ViTImageProcessor.from_pretrained(copy)
    own = load_classifier(copy)
    for mode in ("RGB", "L", "RGBA"):
        image = picture(3, 90, 60).convert(mode)
        expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(own.pixels(image), expected, atol=1e-5, rtol=1e-5)


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        (CONFIG, {"id2label": {"0": "normal", "1": "cat"}}, "does not know its label 'cat'"),
        (CONFIG, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "does not know its label 'LABEL_0'"),
        (CONFIG, {"id2label": {"0": "normal", "1": "safe"}}, "do not tell which images to reject"),
        (CONFIG, {"id2label": {"0": "nsfw", "1": "nsfw"}}, "do not tell which images to reject"),
        (CONFIG, {"id2label": {"0": "normal"}}, "do not tell which images to reject"),
        (CONFIG, {"id2label": {"0": "normal", "1": "nsfw", "2": "porn"}}, r"shape \[2, 24\] classifier.weight"),
        (CONFIG, {"id2label": {"0": "normal", "5": "nsfw"}}, "does not name its labels"),
        (CONFIG, {"id2label": ["normal", "nsfw"]}, "does not name its labels"),
        (CONFIG, {"id2label": {"0": "normal", "1": 1}}, "does not know its label 1"),
        (CONFIG, {"id2label": None}, "does not name its labels"),
        (CONFIG, {"model_type": "swin"}, "architecture"),
        (CONFIG, {"architectures": ["SwinForImageClassification"]}, "SwinForImageClassification"),
        (CONFIG, {"problem_type": "multi_label_classification"}, "several labels"),
        (CONFIG, {"num_attention_heads": 5}, "5 attention heads for 24 channels"),
        (CONFIG, {"num_attention_heads": 0}, "attention heads"),
        (CONFIG, {"num_attention_heads": True}, "attention heads"),
        (CONFIG, {"hidden_act": "__import__"}, "activation '__import__'"),
        (CONFIG, {"hidden_act": ["gelu"]}, "activation"),
        (CONFIG, {"layer_norm_eps": 5}, "5 is not a number"),
        (CONFIG, {"layer_norm_eps": float("nan")}, "nan is not a number"),
        (PROCESSOR, {"size": {"shortest_edge": 32}}, "does not resize images to 32 × 32"),
        (PROCESSOR, {"size": {"height": 224, "width": 224}}, "does not resize images to 32 × 32"),
        (PROCESSOR, {"do_resize": False}, "does not resize"),
        (PROCESSOR, {"do_center_crop": True}, "crops"),
        (PROCESSOR, {"resample": 9}, "unknown filter 9"),
        (PROCESSOR, {"image_mean": [0.5]}, "three channels"),
        (PROCESSOR, {"image_std": [0, 1, 1]}, "0 is not a number above 0"),
        (PROCESSOR, {"image_mean": ["a", 0, 0]}, "'a' is not a number"),
        (PROCESSOR, {"rescale_factor": 10**400}, "is not a number"),
        (PROCESSOR, {"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
    ],
)
def test_a_classifier_that_facesnap_does_not_understand_is_refused_in_one_sentence(copy, file, values, reason):
    change_json(copy / file, **values)
    engine = Engine(lambda: find_models(copy.parent))
    with pytest.raises(FaceSnapError, match=reason) as error:
        engine.image_classifier()
    assert str(error.value).startswith(f"The image classifier in {copy} cannot be used, because ")
    assert str(error.value).endswith(" or turn off the check of images in Settings under FaceSnap.")
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("file", [CONFIG, PROCESSOR])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * 2**21])
def test_a_damaged_json_file_is_reported(copy, file, content):
    (copy / file).write_bytes(content)
    with pytest.raises(FaceSnapError, match="cannot be used, because"):
        Engine(lambda: find_models(copy.parent)).image_classifier()


@pytest.mark.parametrize("file", [CONFIG, PROCESSOR])
def test_a_missing_json_file_is_reported(copy, file):
    (copy / file).unlink()
    with pytest.raises(FaceSnapError, match=f"{file} cannot be read"):
        Engine(lambda: find_models(copy.parent)).image_classifier()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("vit.layernorm.bias"),
        lambda tensors: tensors.update({"vit.layernorm.bias": torch.zeros(25)}),
        lambda tensors: tensors.update({"vit.embeddings.position_embeddings": torch.zeros(1, 10**6, 1)}),
        lambda tensors: tensors.update({"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(24, 3, 0, 0)}),
        lambda tensors: tensors.update({"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(0)}),
        lambda tensors: tensors.update({"vit.layernorm.weight": torch.full((24,), torch.nan)}),
    ],
)
def test_tensors_that_do_not_fit_are_reported(copy, change):
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(FaceSnapError):
        load_classifier(find_models(copy.parent).image_classifier)


def test_a_pickle_is_never_used(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(FaceSnapError, match=r"it has no model\.safetensors"):
        Engine(lambda: find_models(copy.parent)).image_classifier()
    (copy / "pytorch_model.bin").rename(copy / "model.safetensors")
    with pytest.raises(FaceSnapError, match=r"it has no model\.safetensors"):
        Engine(lambda: find_models(copy.parent)).image_classifier()


def test_a_truncated_file_is_not_ignored(copy):
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(FaceSnapError, match=r"model\.safetensors is damaged"):
        Engine(lambda: find_models(copy.parent)).image_classifier()


def test_a_classifier_is_used_wherever_it_is_in_the_model_folder_and_only_there(copy, tmp_path):
    assert find_models(copy.parent).image_classifier == copy
    assert find_models(copy.parent).passed_over == []
    assert find_models(tmp_path / "own", [copy.parent]).image_classifier is None
    renamed = copy.rename(copy.with_name("anything"))
    assert find_models(copy.parent).image_classifier == renamed
    assert Engine(lambda: find_models(tmp_path / "own")).image_classifier() is None


def test_a_classifier_of_another_architecture_is_not_ignored(copy):
    """Its tensors say nothing to FaceSnap, but its config.json does."""
    save_file({"swin.x": torch.zeros(2)}, copy / "model.safetensors")
    change_json(copy / CONFIG, architectures=["SwinForImageClassification"], model_type="swin")
    with pytest.raises(FaceSnapError, match="SwinForImageClassification"):
        Engine(lambda: find_models(copy.parent)).image_classifier()


def test_it_is_listed_without_a_licence_that_it_may_not_have(copy):
    roles = {role.name: role for role in list_models(find_models(copy.parent))}
    [found] = roles["image_classifier"].found
    assert (found.used, found.licence, roles["image_classifier"].needed) == (True, "", False)


def test_a_changed_classifier_is_loaded_again(copy):
    engine = Engine(lambda: find_models(copy.parent))
    first = engine.image_classifier()
    assert engine.image_classifier() is first
    change_json(copy / CONFIG, id2label={"0": "nsfw", "1": "normal"})
    assert engine.image_classifier().labels == ("nsfw", "normal")


labels = st.sampled_from(sorted(REJECTED | ACCEPTED))


@given(st.dictionaries(labels, st.floats(0.01, 1), min_size=1))
def test_an_image_is_rejected_if_rejected_labels_are_likelier_than_others(weights):
    total = sum(weights.values())
    scores = {label: value / total for label, value in weights.items()}
    rejected = sum(scores[label] for label in scores if label in REJECTED)
    found = rejection(scores)
    if abs(rejected - 0.5) > 1e-9:
        assert (found is not None) == (rejected > 0.5)
    if found:
        assert found[0] in REJECTED
        assert scores[found[0]] == max(scores[label] for label in scores if label in REJECTED)
        assert found[1] == pytest.approx(rejected)
    assert rejection({label.upper(): score for label, score in scores.items()}) == (
        found and (found[0].upper(), found[1])
    )


def test_no_label_is_both_accepted_and_rejected():
    assert not REJECTED & ACCEPTED
    assert all(label == label.lower() for label in REJECTED | ACCEPTED)
