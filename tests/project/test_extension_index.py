"""The entry for the WebUI's extension index has what the index asks of entries."""

from __future__ import annotations

import json
import re
from pathlib import Path

ENTRY = json.loads(Path(__file__).parents[2].joinpath("docs", "extension-index.json").read_text("utf-8"))
TAGS = {  # of AUTOMATIC1111/stable-diffusion-webui-extensions' tags.json
    *("script", "localization", "tab", "dropdown", "ads", "installed", "training", "models", "UI related", "prompting"),
    *("editing", "manipulations", "online", "animation", "query", "science", "extras"),
}


def test_fields_and_tags():
    assert list(ENTRY) == ["name", "url", "description", "tags"], "the index itself adds the date"
    assert all(ENTRY.values())
    assert set(ENTRY["tags"]) <= TAGS
    assert "installed" not in ENTRY["tags"], "the WebUI's own mark"
    assert "online" not in ENTRY["tags"], "FaceSnap talks to no server"


def test_the_folder_that_the_webui_makes_of_the_url_is_the_projects_name():
    """By it the settings of callbacks' order, and folders of users, go on to fit."""
    project = Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf-8")
    name = re.search(r'^name = "(.+)"', project, re.M)[1]
    url = re.fullmatch(r"https://[^ ]+?/([^/ ]+)\.git", ENTRY["url"])
    assert url[1] == name
