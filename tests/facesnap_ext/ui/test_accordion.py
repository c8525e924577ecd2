"""The status of the model files, pasted values, and the server's responses to the page."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.predictors import Preview
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.landmarks.poses import TEMPLATES, Rig
from facesnap_ext.photos import Photo, from_base64
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.infotext import to_infotext
from facesnap_ext.settings.unit import CHOICES, RANGES, Unit, from_values
from facesnap_ext.weights.search import find_models
from tests.support.stand_in_pack import stand_in_faces68


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def url(photo: Photo) -> str:
    return "data:image/png;base64," + base64.b64encode(png(photo.pixels)).decode()


def buttons(html: str) -> list[dict[str, str]]:
    return [dict(re.findall(r"([\w-]+)='([^']*)'", tag)) for tag in re.findall(r"<button[^>]*>", html)]


def face(photo: Photo, box: tuple[float, float, float, float]) -> Face:
    corners = np.array(box, np.float32)
    keypoints = np.tile((corners[:2] + corners[2:]) / 2, (5, 1))
    return Face(
        photo=photo,
        box=corners,
        keypoints=keypoints,
        score=1.0,
        embedding=np.ones(4, np.float32),
        padded=False,
        detector_size=640,
    )


def test_faces_are_offered_as_buttons_with_thumbnails(page) -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[20:80, 20:80] = (250, 0, 0)
    pixels[30:70, 130:170] = (0, 0, 250)
    photo = Photo(pixels, "<b>'photo'")
    html = page.photo_cards.face_buttons("face", [face(photo, (20, 20, 80, 80)), face(photo, (130, 30, 170, 70))], 1)
    assert [(b["data-facesnap-of"], b["data-facesnap-face"], b["aria-pressed"]) for b in buttons(html)] == [
        ("face", "0", "false"),
        ("face", "1", "true"),
    ]
    thumbnails = [from_base64(text, "Face").pixels for text in re.findall(r"src='([^']*)'", html)]
    middle = [pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].astype(int) for pixels in thumbnails]
    np.testing.assert_allclose(middle, [(250, 0, 0), (0, 0, 250)], atol=12)
    assert "<b>" not in html, "a photo's name is escaped"
    assert page.photo_cards.face_buttons("face", [face(photo, (20, 20, 80, 80))], 0) == "", "there is no choice"


def test_all_faces_of_a_photo_are_offered_for_references_and_driving_photo(page, engine, group, astronaut) -> None:
    cards = page.reference_photos.check_references(engine, [png(group.pixels)], 2)
    offered = [button for button in buttons(cards) if "data-facesnap-face" in button]
    count = len(engine.encoders(engine.files()).faces(group))
    assert count > 2
    assert [button["data-facesnap-face"] for button in offered] == [str(i) for i in range(count)]
    assert [i for i, button in enumerate(offered) if button["aria-pressed"] == "true"] == [2]
    driving = page.answers.driving_faces(engine, Image.fromarray(group.pixels), 1)
    assert {button["data-facesnap-of"] for button in buttons(driving)} == {"driving_face_index"}
    assert len(buttons(driving)) == count
    for without_faces in (None, Image.new("RGB", (64, 64))):
        assert page.answers.driving_faces(engine, without_faces, 0) == ""


def test_answers_to_the_canvas_repeat_the_number_of_the_question(page, engine, astronaut) -> None:
    question = (engine, [png(astronaut.pixels)], None)
    canvas, *_ = page.answers.answer(*question, "320x640 17", "", '{"pose": "own"}')
    answer = json.loads(canvas)
    assert answer["question"] == "17"
    landmarks = engine.preview([photo_of(astronaut)], None, (320, 640)).landmarks
    np.testing.assert_allclose(answer["points"], landmarks.points / (320, 640), atol=1e-6)
    canvas, *_ = page.answers.answer(engine, [b"not an image"], None, "320x640 18", "", '{"pose": "own"}')
    failed = json.loads(canvas)
    assert failed["question"] == "18"
    assert "Reference photo 1" in failed["error"]
    assert page.answers.answer(engine, None, None, "", "", "") == ("", "", ""), "the page has not sent a request yet"


def test_the_init_image_gives_the_pose_if_it_does_in_the_job(page, engine, astronaut, grace_hopper) -> None:
    references, init = [png(astronaut.pixels)], url(grace_hopper)

    def ask(pose: str, driving: Photo | None = None, init: str = init) -> dict:
        other = None if driving is None else Image.fromarray(driving.pixels)
        return json.loads(page.answers.canvas_data(engine, references, other, "320x640 1", init, Unit(pose=pose)))

    driven = ask("photo")
    assert driven["in_init"]
    assert driven["init_faces"] == 1
    expected: Landmarks = engine.preview([photo_of(astronaut)], photo_of(grace_hopper)).landmarks
    height, width = grace_hopper.pixels.shape[:2]
    np.testing.assert_allclose(driven["points"], expected.points / (width, height), atol=1e-6)
    for other in (ask("own"), ask("photo", driving=grace_hopper), ask("photo", init="")):
        assert not other["in_init"]
    faceless = ask("photo", init=url(Photo(np.full((64, 64, 3), 128, np.uint8), "grey")))
    assert not faceless["in_init"]
    assert faceless["points"] == ask("own")["points"], "the job uses the reference's own pose"


def test_the_status_names_the_predictor_and_the_canvas_needs_no_deca_or_flame(
    page, stand_ins, astronaut, grace_hopper, tmp_path
) -> None:
    pytest.importorskip("onnx")
    status = page.accordion.status(find_models(stand_ins))
    assert "<span>Landmarks:</span> <span>DECA and FLAME</span>" in status
    assert "<span>WebUI:</span> <span translate='no'>AUTOMATIC1111" in status
    models = shutil.copytree(stand_ins, tmp_path / "facesnap")
    (models / "stand-in-deca.safetensors").unlink()
    status = page.accordion.status(find_models(models))
    assert "<span>Landmarks:</span> <span>open face model</span>" in status
    assert "Missing" not in status

    def ask(references: list[bytes], pose: str = "own", mode: str = "fused") -> dict:
        engine = Engine(lambda: find_models(models))
        unit = Unit(pose=pose, reference_mode=mode)
        return json.loads(page.answers.canvas_data(engine, references, None, "320x640 1", "", unit))

    (models / "stand-in-flame.safetensors").unlink()
    photos = [png(astronaut.pixels), png(grace_hopper.pixels)]
    without = ask(photos)
    assert without["points"] is None, "templates and sliders can be previewed, and the note says why the photo cannot"
    assert "has no model for 68 landmarks" in without["note"]
    np.testing.assert_array_equal(without["rig"]["rest"], ask([])["rig"]["rest"], "the mean face")
    stand_in_faces68(models / "stand-in-pack" / "1k3d68.onnx")
    both, first = ask(photos), ask(photos[:1])
    assert both["note"] == first["note"] == ""
    assert len(first["points"]) == 72
    assert not np.allclose(both["rig"]["rest"], first["rig"]["rest"], atol=1e-4), "several photos give one shape"
    assert ask(photos, mode="batch")["rig"] == first["rig"], "in batch mode the first person is previewed"


@pytest.mark.parametrize("number", [1, 2])
def test_pasted_settings_are_what_the_inputs_show(page, number) -> None:
    unit = from_values({"enabled": True, "block_weights": (1.0,) * 9 + (0.5,), "y": 0.3})
    infotext = {name: str(value) for name, value in to_infotext({number: unit}).items()}
    shown = json.loads(page.accordion.paste_value(infotext, number, "settings"))
    assert shown == page_settings.initial() | {"block_weights": "1.0 " * 9 + "0.5", "placed": True, "y": 0.3}
    assert json.loads(page.accordion.paste_value({}, number, "settings")) == page_settings.initial()
    broken = {**infotext, f"FaceSnap{' 2' if number == 2 else ''} y": "low"}
    assert page.accordion.paste_value(broken, number, "settings") is None, "nothing changes"


def test_every_setting_of_the_text_has_inputs_with_its_value_and_range(page) -> None:
    parts = ("reference_mode", "identity", "pose", "strength", "advanced")
    html = "".join(getattr(page.settings_html, part)(str) for part in parts)
    tags = [dict(re.findall(r"([\w-]+)='([^']*)'", tag)) for tag in re.findall(r"<(?:input|select)[^>]*>", html)]
    by_name: dict[str, list[dict[str, str]]] = {}
    for tag in tags:
        if "data-facesnap-setting" in tag:
            by_name.setdefault(tag["data-facesnap-setting"], []).append(tag)
    faces = {"face_index", "driving_face_index"}  # set by the buttons that show the faces
    assert set(by_name) == set(page_settings.NAMES) - faces
    for name, value in page_settings.initial().items():
        if name in faces:
            continue
        kind = by_name[name][0].get("type", "select")
        assert f"id='{name}'" in html
        if name in RANGES:
            assert [tag["type"] for tag in by_name[name]] == ["number", "range"]
            for tag in by_name[name]:
                assert (float(tag["min"]), float(tag["max"]), float(tag["value"])) == (*RANGES[name], value)
                assert f"id='{tag['aria-labelledby']}'" in html
        elif name in CHOICES or name == "template":
            values = [tag["value"] for tag in by_name[name]]
            expected = [one for one in CHOICES.get(name, TEMPLATES) if (name, one) != ("pose", "template")]
            assert sorted(values) == sorted(expected)
        else:
            names = ("identity", "saved_pose", "model")
            assert kind == ("select" if name in names else "checkbox" if isinstance(value, bool) else "text")


def test_untrusted_settings_are_reported_on_the_canvas(page, engine) -> None:
    canvas, *others = page.answers.answer(engine, None, None, "64x64 5", "", '{"yaw": 500}')
    assert others == [{}, {}]
    assert json.loads(canvas) == {"question": "5", "error": "FaceSnap's yaw is 500; use a number from -75 to 75."}


def test_the_canvas_shows_a_saved_person(page, engine, monkeypatch) -> None:
    requests = []
    preview = Preview(Rig(np.zeros((72, 3), np.float32), {}), None)
    monkeypatch.setattr(Engine, "preview", lambda self, *args: requests.append(args) or preview)
    canvas, *_ = page.answers.answer(engine, None, None, "640x512 1", "", '{"pose": "own", "identity": "Ada"}')
    parts = {"question", "rig", "points", "neutral", "camera", "expression", "in_init", "init_faces", "note"}
    assert set(json.loads(canvas)) == parts
    assert requests == [((), None, (640, 512), 0, 0, "Ada", None)]


def photo_of(photo: Photo) -> Photo:
    return from_base64(url(photo), photo.name)
