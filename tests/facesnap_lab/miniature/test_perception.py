"""The miniature's shipped perception networks: they load like real ones and are accurate enough."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facesnap_ext.identity.clip import load_image_encoder, preprocess
from facesnap_ext.identity.faces import NoFaceError, find_faces, load_pack, square_crop
from facesnap_ext.landmarks.deca import crop_transform, to_photo
from facesnap_ext.landmarks.flame import save_flame
from facesnap_ext.landmarks.points72 import five_points
from facesnap_ext.landmarks.predictor import load_predictor
from facesnap_ext.photos import Photo
from facesnap_lab.miniature import clip_pair, face_detector, identity, regressor, shipped
from facesnap_lab.miniature.dataset import captions_of
from facesnap_lab.miniature.perception import degrade
from facesnap_lab.miniature.render import head, render
from facesnap_lab.miniature.world import person, scene
from facesnap_lab.training.arcface import load_arcface

PEOPLE, SHOTS = 6, 3
PACKS = {"identity": shipped.MODELS / "identity"}
PACKS |= {name: shipped.JUDGES / f"{name}.onnx" for name in ("judge", "judge_inner")}


@pytest.fixture(scope="module")
def scenes():
    """[PEOPLE·SHOTS] pairs of person and scene, of people that no network was trained on."""
    everybody = [person("test", index) for index in range(PEOPLE)]
    return [(who, scene(who, shot)) for who in everybody for shot in range(SHOTS)]


@pytest.fixture(scope="module")
def drawn(scenes):
    return render(*zip(*scenes))


@pytest.fixture(scope="module")
def detected(drawn):
    pytest.importorskip("insightface")
    pack = load_pack(PACKS["identity"])
    return [find_faces(pack, Photo(one.picture, "test")) for one in drawn]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    flame = tmp_path_factory.mktemp("flame") / "flame.safetensors"
    save_flame(flame, vars(head()), "test")
    return load_predictor(shipped.MODELS / "deca.safetensors", flame)


@pytest.fixture(scope="module")
def clip():
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPModel.from_pretrained(shipped.MODELS / "clip", dtype=torch.float32).eval()


def similarities(embeddings: np.ndarray, people: np.ndarray) -> tuple[float, float]:
    """Return the mean cosines of pairs of the same person and of pairs of two people."""
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines, same = embeddings @ embeddings.T, people[:, None] == people
    return float(cosines[same & ~np.eye(len(people), dtype=bool)].mean()), float(cosines[~same].mean())


def test_detector_finds_exactly_one_face_at_the_right_place(detected, drawn):
    assert [len(faces) for faces in detected] == [1] * len(drawn)
    overlaps = [face_detector.iou(faces[0].box, one.box) for faces, one in zip(detected, drawn)]
    errors = [
        np.linalg.norm(f[0].keypoints - five_points(one.points), axis=1).mean() for f, one in zip(detected, drawn)
    ]
    assert min(overlaps) > 0.7
    assert np.mean(errors) < 1.4  # in pixels; the error is 1.1 on 200 people


def test_detector_finds_no_face_in_plain_images(drawn):
    pytest.importorskip("insightface")
    pack = load_pack(PACKS["identity"])
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None].repeat(64, 1).repeat(3, 2)
    for picture in (np.full((64, 64, 3), 90, np.uint8), gradient):
        with pytest.raises(NoFaceError):
            find_faces(pack, Photo(picture, "test"))


@pytest.mark.parametrize("name", PACKS)
def test_embeddings_are_similar_only_for_the_same_person(name, drawn, detected, scenes):
    crops = identity.aligned(
        np.stack([one.picture for one in drawn]), np.stack([faces[0].keypoints for faces in detected])
    )
    embeddings = load_arcface(PACKS[name])((crops + 1) / 2).numpy()
    people = np.array([who.index for who, _ in scenes])
    same, different = similarities(embeddings, people)
    assert same > different + 0.35
    # with wrong labels, which combine images of different people, the difference disappears
    wrong, rest = similarities(embeddings, np.arange(len(people)) % PEOPLE)
    assert wrong < rest + 0.1


def test_detector_and_recognition_model_form_a_pack(detected, scenes):
    embeddings = np.stack([faces[0].embedding for faces in detected])
    same, different = similarities(embeddings, np.array([who.index for who, _ in scenes]))
    assert embeddings.shape[1] == identity.SIZE
    assert same > different + 0.5


@pytest.mark.parametrize("name", ["judge", "judge_inner"])
def test_judges_ignore_colours(name, drawn):
    network = load_arcface(PACKS[name])
    keypoints = np.stack([five_points(one.points) for one in drawn])
    faces = (identity.aligned(np.stack([one.picture for one in drawn]), keypoints) + 1) / 2
    grey = (faces * torch.tensor(identity.LUMINANCE).reshape(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(faces)
    brighter = 0.2 + 0.7 * faces
    for other in (grey, brighter):
        assert F.cosine_similarity(network(faces), network(other)).min() > 0.98


def test_inner_judge_ignores_hair_and_outline(drawn):
    network = load_arcface(PACKS["judge_inner"])
    keypoints = np.stack([five_points(one.points) for one in drawn])
    faces = (identity.aligned(np.stack([one.picture for one in drawn]), keypoints) + 1) / 2
    painted = faces.clone()
    painted[:, :, :26] = painted[:, :, :, :20] = painted[:, :, :, -20:] = 0.8
    assert F.cosine_similarity(network(faces), network(painted)).min() > 0.999


def test_landmark_error_on_unseen_people_is_below_a_pixel(predictor, drawn):
    found = predictor.encode_batch([one.picture for one in drawn], [one.box for one in drawn])
    points = [predictor.predict(codes, codes).points for codes in found]
    errors = [np.linalg.norm(ours - one.points, axis=1).mean() for ours, one in zip(points, drawn)]
    assert np.mean(errors) < 0.8
    assert found[0].shape.shape == (20,)
    assert found[0].expression.shape == (8,)


def test_landmark_decoder_equals_the_complete_head(drawn, scenes):
    boxes = [one.box * 1.03 for one in drawn]
    moves = np.stack([crop_transform(box, regressor.IMAGE_SIZE) for box in boxes])
    codes = np.stack([np.concatenate([who.shape, what.codes, what.pose, what.cam]) for who, what in scenes])
    points = regressor.LandmarkDecoder(head())(
        torch.from_numpy(regressor.codes_in_crop(codes, moves, 64)).float()
    ).numpy()
    for ours, move, one in zip(points, moves, drawn):
        np.testing.assert_allclose(to_photo(ours, move, regressor.IMAGE_SIZE), one.points, atol=1e-3)


def test_clip_gives_tokens_and_recognises_caption_words(clip, drawn, scenes):
    encoder = load_image_encoder(shipped.MODELS / "clip")
    crops = [square_crop(one.picture, one.box) for one in drawn]
    assert encoder(crops).shape == (len(drawn), 65, 96)
    parsed = [clip_pair.parse_caption(captions_of(who, what, i % SHOTS)[1]) for i, (who, what) in enumerate(scenes)]
    captions, answers = [], []
    for one in parsed:
        for part in ("background", "clothes", "hair"):
            answers.append(slice(len(captions), len(captions) + len(clip_pair.PART_VALUES[part])))
            captions += [one.caption, *(other.caption for other in clip_pair.variants(one, part))]
    with torch.no_grad():
        images, texts = clip_pair.embeddings(clip, preprocess(crops, encoder.image_size), clip_pair.token_ids(captions))
    cosines = F.normalize(images) @ F.normalize(texts).T
    right = [int(cosines[i // 3, rows].argmax()) == 0 for i, rows in enumerate(answers)]
    assert np.mean(right) > 0.85


def test_captions_survive_a_round_trip_through_parsing(scenes):
    for i, (who, what) in enumerate(scenes):
        caption = captions_of(who, what, i % SHOTS)[1]
        assert clip_pair.parse_caption(caption).caption == caption
        ids = clip_pair.token_ids([caption])
        assert ids.shape == (1, clip_pair.TEXT_LENGTH)
        assert clip_pair.vocabulary_ids()["<unk>"] not in ids
    with pytest.raises(ValueError, match="not a caption"):
        clip_pair.parse_caption("a cat")


@pytest.mark.parametrize("name", identity.RECIPES)
def test_onnx_output_equals_torch_output(name, tmp_path, drawn):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = identity.Embedder(identity.RECIPES[name]).eval()
    keypoints = np.stack([five_points(one.points) for one in drawn[:3]])
    faces = identity.aligned(np.stack([one.picture for one in drawn[:3]]), keypoints)
    identity.write(network, tmp_path / "recognition.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "recognition.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"face": faces.numpy()})
    with torch.no_grad():
        expected = network(faces)
        again = load_arcface(tmp_path)((faces + 1) / 2)
    assert F.cosine_similarity(torch.from_numpy(answer), expected).min() > 0.9999  # weights in half precision
    torch.testing.assert_close(again, torch.from_numpy(answer), rtol=1e-3, atol=1e-4)


def test_onnx_detector_has_scrfds_nine_outputs(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    detector = face_detector.Detector().eval()
    face_detector.write(detector, tmp_path / "detector.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx", providers=["CPUExecutionProvider"])
    picture = torch.rand(1, 3, 192, 256) * 2 - 1
    outputs = session.run(None, {"image": picture.numpy()})
    with torch.no_grad():
        expected = detector(picture).permute(0, 2, 3, 1).reshape(-1, face_detector.CELL_VALUES).numpy()
    for level, stride in enumerate((8, 16, 32)):
        cells = 2 * (192 // stride) * (256 // stride)
        assert [outputs[level + 3 * part].shape for part in range(3)] == [(cells, size) for size in (1, 4, 10)]
    assert not outputs[0].any()
    assert not outputs[1].any()
    np.testing.assert_allclose(outputs[5][::2], expected[:, 1:5], atol=5e-3)
    np.testing.assert_allclose(outputs[8][::2], expected[:, 5:], atol=5e-3)
    np.testing.assert_allclose(outputs[2][::2, 0], 1 / (1 + np.exp(-expected[:, 0])), atol=5e-3)


def test_alignment_equals_insightfaces(drawn):
    face_align = pytest.importorskip("insightface.utils.face_align")
    keypoints = five_points(drawn[0].points)
    ours = identity.alignment(keypoints[None])[0]
    np.testing.assert_allclose(ours, face_align.estimate_norm(keypoints), atol=1e-3)


def test_degrade_keeps_the_image_recognisable(drawn):
    pictures = np.stack([one.picture for one in drawn])
    for strength, limit in ((0.3, 30), (1.0, 70)):
        again = degrade(pictures, np.random.default_rng(0), strength)
        assert again.shape == pictures.shape
        assert again.dtype == np.uint8
        assert np.abs(again.astype(int) - pictures).mean() < limit


def test_quality_figures_exist_for_every_network():
    figures = json.loads((shipped.WEIGHTS / "quality.json").read_text(encoding="utf-8"))
    assert {"identity", "judge", "judge_inner", "detector", "deca", "clip"} <= figures.keys()
    assert all(figures[name]["accuracy"] > 0.9 for name in PACKS)
