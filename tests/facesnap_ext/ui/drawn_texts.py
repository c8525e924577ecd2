"""The fixed wording of everything that the server draws on the page and in the host's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from facesnap_ext.identity.references import NOTES, Finding, Reference
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.photos import Photo
from facesnap_ext.weights import catalogue, download, identity_file
from facesnap_ext.weights.identity_file import Identity
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import PHRASES, File, ModelFile, list_models
from tests.support import mock_webui
from tests.support.page_text import in_html, wording_in

LABELLED = ("label", "placeholder", "info")  # arguments of gradio's components that are shown


class Option:
    """A setting of the host. It shows the information in parentheses."""

    def __init__(self, default: Any, label: str, *args: Any, **values: Any):
        self.texts = [label]

    def info(self, text: str) -> Option:
        self.texts.append(f"({text})")
        return self

    def needs_reload_ui(self) -> Option:
        return self


def components(models: Path) -> set[str]:
    """The labels, choices, buttons and HTML of the accordion with four people, in txt2img and img2img."""
    drawn: list[mock_webui.Component] = []
    mocked = mock_webui.Component.__init__

    def record(self: Any, *args: Any, **values: Any) -> None:
        mocked(self, *args, **values)
        drawn.append(self)

    mock_webui.Component.__init__ = record
    try:
        script = load_script()
        script.shared.opts.facesnap_people = 4
        script.Script().ui(False)
        script.Script().ui(True)
    finally:
        mock_webui.Component.__init__ = mocked
    texts, html = [], ""
    for component in drawn:
        texts += [component.values[name] for name in LABELLED if component.values.get(name)]
        choices = component.values.get("choices") or next(iter(component.args), "")
        if isinstance(choices, str):  # the text of a button, tab or accordion, or HTML
            html += f"<div>{choices}</div>"
        elif isinstance(choices, list):
            texts += [choice[0] if isinstance(choice, tuple) else choice for choice in choices]
    return wording_in(texts) | in_html(html)


def load_script() -> Any:
    """The script as a module, with the mocks in `sys.modules`."""
    spec = spec_from_file_location("facesnap_script", mock_webui.SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings() -> set[str]:
    """The section in the host's settings."""
    options: list[Option] = []
    module = load_script()
    module.shared.OptionInfo = Option
    module.shared.opts = SimpleNamespace(add_option=lambda name, option: options.append(option))
    module.add_settings()
    return wording_in(text for option in options for text in option.texts)


def axes() -> set[str]:
    """The axes of the X/Y/Z plot."""
    from facesnap_ext.hosts import xyz

    found = xyz._axes(lambda label, *args, **values: label, {})
    return wording_in(found)


def model_files(ui: Any, folder: Path) -> set[str]:
    """The status, the starter and the panel of model files, for installations of every kind."""
    from facesnap_ext.ui import accordion, models_panel, starter

    empty = ModelFiles(folder, elsewhere=[folder / "other"], passed_over=["notes.safetensors is damaged."])
    full = {part: folder / part for part in ("face_pack", "clip", "mediapipe", "image_classifier")}
    complete = ModelFiles(folder, facesnap={"a": folder / "a"}, deca=folder / "deca", flame=folder / "flame", **full)
    fitted = ModelFiles(folder, face_pack=folder / "pack", mediapipe=folder / "mediapipe")
    html = [accordion.status(files) for files in (empty, complete, fitted)]
    packs, pair = (catalogue.downloadable(name) for name in ("antelopev2", "instantid"))
    html += [starter.html(empty, parts, running) for parts, running in product((packs, pair, packs + pair), (0, 1))]
    roles = list_models(empty)
    for needed in ((), packs + pair):
        html.append(models_panel.html(roles, empty, needed))
    html.append(models_panel.html([replace(role, found=tuple(found_models(models_panel))) for role in roles], complete))
    for state, name in product(("running", "done", "stopped", "failed"), catalogue.BUNDLES):
        job = download.Job(name, catalogue.downloadable(name), state=state, message="A sentence.")
        html.append(models_panel.progress_html([job]))
    return in_html("".join(html))


def found_models(models_panel: Any) -> Iterator[ModelFile]:
    """Model files with every kind, licence and verdict, in use and not."""
    licences = [f"{part.licence} ({part.use})" for part in catalogue.PARTS]
    licences += ["", f"{licences[0]}, {PHRASES[1]} antelopev2", f"{PHRASES[0]} {licences[0]}"]
    for i, (kind, licence) in enumerate(product(models_panel.KIND_PHRASES, licences)):
        files = tuple(File("a.safetensors", 10, "0" * 64, verdict) for verdict in PHRASES[2:])
        yield ModelFile("a.safetensors", "folder", kind, i % 2 == 0, licence, files)


def photos(engine: Any, photo: Photo) -> set[str]:
    """The cards with every badge and line, and buttons for choosing a face."""
    from facesnap_ext.ui.photo_cards import BADGES, Card, cards_html, face_buttons

    (face,) = engine.encoders().faces(photo)
    cards = [Card("Ada.png", error="Ada.png is damaged."), Card("Ada.png", photo)]
    for kind in BADGES.keys() - {"unchecked", "unreadable"}:
        findings = () if kind == "good" else (Finding(kind, "A sentence about Ada.png."),)
        cards.append(Card("Ada.png", photo, Reference(photo, (face, face), 0, 0.1, 0.5, findings)))
    notes = (f"{NOTES[0]} (0.10): {NOTES[1]}", NOTES[2])
    return in_html(cards_html(cards, notes) + face_buttons("driving_face_index", [face, face], 0))


def people(models: Path, engine: Any, photo: bytes) -> set[str]:
    """A saved person's forms, and the reports of saving, renaming and deleting."""
    from facesnap_ext.ui import people, tasks

    html = []
    for picture in (None, torch.zeros(8, 8, 3, dtype=torch.uint8)):
        identity = Identity("Ada", torch.ones(1, 512), None, None, ("0" * 10,), {"face_pack": "0" * 64})
        (models / "identities").mkdir(exist_ok=True)
        identity_file.save(
            models / "identities" / "Ada.safetensors", replace(identity, picture=picture), overwrite=True
        )
        html.append(people.describe(models, "Ada"))
    requests = [
        {"do": "rename", "person": "Ada", "name": "Bea"},
        {"do": "delete", "person": "Bea"},
        *({"do": "save", "name": f"Eve {picture}", "picture": picture} for picture in (False, True)),
    ]
    for task in requests:
        text = json.dumps({**task, "number": 1})
        _, report, *_ = tasks.run_task(engine, text, "", "", True, [photo], None, None, "", "")
        assert "facesnap-problem" not in report, report
        html.append(report)
    return in_html("".join(html))


def poses(folder: Path) -> set[str]:
    """The reports of saving and deleting a pose."""
    from facesnap_ext.ui import tasks

    files = ModelFiles(folder)
    encoders = SimpleNamespace(files=files)
    engine = SimpleNamespace(
        files=lambda: files, encoders=lambda: encoders, pose_as_sliders=lambda *values: TEMPLATES["front"]
    )
    html = []
    for do in ("save_pose", "delete_pose"):
        text = json.dumps({"do": do, "name": "Smile", "number": 1})
        html.append(tasks.run_task(engine, text, "", "", True, None, None, None, "", '{"saved_pose": "Smile"}')[2])
    assert "facesnap-problem" not in "".join(html), html
    return in_html("".join(html))
