"""The networks used for measuring, compared with other implementations and on images whose content is known."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("insightface", reason="the miniature's faces are detected with insightface")
pytest.importorskip("transformers", reason="the miniature's CLIP is loaded with transformers")

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo
from facesnap_lab.evaluation.judges import find_face, load_clip, load_face_judge, load_inception
from facesnap_lab.evaluation.metrics import clip_t, likeness
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.dataset import captions_of
from facesnap_lab.miniature.measure import Judge, photo
from facesnap_lab.miniature.words import write_tokenizer
from facesnap_lab.miniature.world import person, scene

PEOPLE = 20


@pytest.fixture(scope="module")
def rendered():
    """Photos from the test split, and captions of them for CLIP."""
    captions = [captions_of(who := person("test", index), scene(who, 0), 0)[1] for index in range(PEOPLE)]
    return [photo("test", index, 0)[0] for index in range(PEOPLE)], captions


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """The miniature's CLIP as a transformers folder with model and tokenizer."""
    from transformers import CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    CLIPModel.from_pretrained(shipped.MODELS / "clip", local_files_only=True).float().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_clip_t_equals_torchmetrics_clip_score(clip_folder, rendered):
    """The processor and tokenizer come from transformers."""
    multimodal = pytest.importorskip("torchmetrics.multimodal")
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

    pictures, captions = rendered
    clip = load_clip(clip_folder)
    found = clip_t(clip.embed_images(pictures), clip.embed_texts(captions))

    class FeaturesAsTensors(CLIPModel):
        """transformers 5 returns output objects, which torchmetrics 1.9 does not expect."""

        def get_image_features(self, *arguments, **named):
            found = super().get_image_features(*arguments, **named)
            return getattr(found, "pooler_output", found)

        def get_text_features(self, *arguments, **named):
            found = super().get_text_features(*arguments, **named)
            return getattr(found, "pooler_output", found)

    model, for_torchmetrics = (
        kind.from_pretrained(clip_folder, local_files_only=True) for kind in (CLIPModel, FeaturesAsTensors)
    )
    sizes = {"size": {"shortest_edge": 64}, "crop_size": 64}
    processor = CLIPProcessor(CLIPImageProcessor(**sizes), AutoTokenizer.from_pretrained(clip_folder))
    score = multimodal.CLIPScore(lambda: (for_torchmetrics, processor))
    score.update([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures], captions)
    assert found.mean() == pytest.approx(float(score.compute()) / 100, abs=1e-4)

    inputs = processor(text=captions, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    np.testing.assert_allclose(found, logits.diagonal(), atol=1e-4)


def test_loading_the_miniatures_clip_from_a_folder_gives_the_same_embeddings(judges, clip_folder, rendered):
    pictures, captions = rendered
    folder = load_clip(clip_folder)
    np.testing.assert_allclose(folder.embed_texts(captions), judges.clip.embed_texts(captions), atol=1e-4)
    np.testing.assert_allclose(folder.embed_images(pictures), judges.clip.embed_images(pictures), atol=1e-4)


def test_clip_t_drops_when_prompts_are_shuffled(judges, rendered):
    pictures, captions = rendered
    seen, read = judges.clip.embed_images(pictures), judges.clip.embed_texts(captions)
    own, others = clip_t(seen, read), clip_t(seen, np.roll(read, 1, axis=0))
    assert own.mean() - others.mean() > 0.2
    assert (own > others).mean() > 0.9


def test_face_sim_separates_people_and_equals_the_judges_cosine(judges):
    def embedding(index, shot):
        return judges.embed(find_face(judges.pack, Photo(photo("test", index, shot)[0], "photo")))

    first, again = ([embedding(index, shot) for index in range(6)] for shot in (0, 2))
    alike = np.array([[likeness(one, [other]) for other in again] for one in first])
    assert np.diag(alike).mean() - alike[~np.eye(6, dtype=bool)].mean() > 0.4
    assert (alike.argmax(axis=1) == np.arange(6)).mean() >= 0.8
    assert likeness(first[0], [first[0]]) == pytest.approx(1)
    judge = Judge()
    expected = judge.embedding(photo("test", 0, 0)[0]) @ judge.embedding(photo("test", 0, 2)[0])
    assert alike[0, 0] == pytest.approx(expected, abs=1e-5)


def test_find_face_returns_none_without_a_face(judges):
    assert find_face(judges.pack, Photo(np.full((64, 64, 3), 90, np.uint8), "grey")) is None


class Means(nn.Module):
    """Replaces FaceNet: returns the means of 4×4 tiles."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(40)

    def forward(self, pixels):
        return self.pool(pixels).flatten(1)


def onnx_means(path, channels_last):
    from onnx import TensorProto, checker, helper, save

    shape = [1, 160, 160, 3] if channels_last else [1, 3, 160, 160]
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["turned"], perm=[0, 3, 1, 2] if channels_last else [0, 1, 2, 3]),
        helper.make_node("AveragePool", ["turned"], ["tiles"], kernel_shape=[40, 40], strides=[40, 40]),
        helper.make_node("Flatten", ["tiles"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 48])]
    opset = [helper.make_opsetid("", 13)]
    model = helper.make_model(helper.make_graph(nodes, "means", inputs, outputs), opset_imports=opset, ir_version=8)
    checker.check_model(model)
    save(model, path)


@pytest.mark.parametrize("kind", ["channels first", "channels last", "torchscript"])
def test_facenet_receives_the_detectors_box(judges, tmp_path, kind):
    if kind == "torchscript":
        file = tmp_path / "facenet.pt"
        torch.jit.trace(Means(), torch.zeros(1, 3, 160, 160)).save(file)
    else:
        pytest.importorskip("onnx")
        file = tmp_path / "facenet.onnx"
        onnx_means(file, kind == "channels last")
    pack, embed = load_face_judge(file, judges.pack)
    face = find_face(pack, Photo(photo("test", 1, 0)[0], "photo"))
    # facenet-pytorch's extract_face (models/utils/detect_face.py) and fixed_image_standardization
    crop = Image.fromarray(face.photo.pixels).crop([int(max(0, min(64, place))) for place in face.box])
    pixels = (np.asarray(crop.resize((160, 160), Image.Resampling.BILINEAR), np.float64) - 127.5) / 128
    expected = pixels.reshape(4, 40, 4, 40, 3).mean(axis=(1, 3)).transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(embed(face), expected, atol=1e-5)


class Classes(nn.Module):
    """Replaces NVIDIA's Inception: returns classes, or features if requested."""

    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if return_features:
            return pixels.mean([2, 3])
        return torch.zeros(len(pixels), 10)


def test_inception_extracts_features_of_images_of_any_size(tmp_path):
    torch.jit.script(Classes()).save(tmp_path / "inception.pt")
    extractor = load_inception(tmp_path / "inception.pt")
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (299, 299, 3)).astype(np.uint8)
    plain = np.full((40, 80, 3), (10, 128, 255), np.uint8)
    found = extractor.features([plain, noise])
    np.testing.assert_allclose(found[0], (10, 128, 255), atol=1e-3)
    np.testing.assert_allclose(
        found[1], noise.mean(axis=(0, 1)), atol=1e-3
    )  # the images already have that size, so they are not resized


def test_unusable_networks_are_reported_by_file_name(judges, clip_folder, tmp_path):
    text = tmp_path / "text.onnx"
    text.write_text("no network")
    script = tmp_path / "script.pt"
    script.write_text("no network")
    detector = shipped.MODELS / "identity" / "detector.onnx"
    for file in (text, script, detector, tmp_path / "none.onnx"):
        with pytest.raises(FaceSnapError, match=file.name):
            load_face_judge(file, judges.pack)
    for file in (script, tmp_path / "none.pt"):
        with pytest.raises(FaceSnapError, match=file.name):
            load_inception(file)
    with pytest.raises(FaceSnapError, match="not a complete CLIP"):
        load_clip(tmp_path)
