"""The translations in localizations/, which both hosts merge into their own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from facesnap_ext.engine import Engine
from facesnap_ext.weights.search import find_models
from tests.facesnap_ext.ui import drawn_texts
from tests.facesnap_ext.ui.test_reference_photos import png
from tests.support import page_text

FOLDER = Path(__file__).parents[3] / "localizations"
LANGUAGES = ("de_DE", "ja_JP", "ko_KR", "zh_CN")


@pytest.fixture
def texts(page, stand_ins, tmp_path, astronaut, monkeypatch) -> set[str]:
    """Every text of the page, in English."""
    models = shutil.copytree(stand_ins, tmp_path / "models" / "facesnap")
    engine = Engine(lambda: find_models(models))
    return (
        drawn_texts.components(tmp_path)
        | drawn_texts.settings()
        | drawn_texts.axes()
        | drawn_texts.model_files(page, tmp_path)
        | drawn_texts.photos(engine, astronaut)
        | drawn_texts.people(models, engine, png(astronaut.pixels))
        | drawn_texts.poses(tmp_path)
        | page_text.in_javascript()
    )


def translations(language: str) -> dict[str, str]:
    def unique(pairs: list[tuple[str, str]]) -> dict[str, str]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    return json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"), object_pairs_hook=unique)


def test_every_language_has_every_text_of_the_page_and_no_other(texts):
    for language in LANGUAGES:
        known = translations(language)
        assert {"missing": texts - known.keys(), "unused": known.keys() - texts} == {"missing": set(), "unused": set()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_keep_numbers_file_names_and_parentheses(language):
    for text, translated in translations(language).items():
        assert translated == translated.strip() != ""
        assert not re.search(r"[<>{}]", translated), "no HTML, and nothing to fill in"
        for pattern in (r"\d+(?:\.\d+)?", r"[\w-]+\.(?:onnx|zip|tar|task|json|md|bin|pth|safetensors)\b"):
            assert sorted(re.findall(pattern, translated, re.ASCII)) == sorted(re.findall(pattern, text, re.ASCII)), (
                text
            )
        if text.startswith("(") and text.endswith(")"):  # as the host shows information about a setting
            assert (translated[0], translated[-1]) in (("(", ")"), ("\uff08", "\uff09"))
        assert (translated.startswith("[FaceSnap] ")) == text.startswith("[FaceSnap] ")
