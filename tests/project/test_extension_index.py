"""The entry for the WebUI's extension index meets the index's requirements."""

from __future__ import annotations

import json
import re
from pathlib import Path

ENTRY = json.loads(Path(__file__).parents[2].joinpath("docs", "extension-index.json").read_text("utf-8"))
TAGS = {  # from tags.json of AUTOMATIC1111/stable-diffusion-webui-extensions
    *("script", "localization", "tab", "dropdown", "ads", "installed", "training", "models", "UI related", "prompting"),
    *("editing", "manipulations", "online", "animation", "query", "science", "extras"),
}


def test_entry_has_the_required_fields_and_known_tags():
    assert list(ENTRY) == ["name", "url", "description", "tags"], "the index adds the date itself"
    assert all(ENTRY.values())
    assert set(ENTRY["tags"]) <= TAGS
    assert "installed" not in ENTRY["tags"], "the WebUI sets this tag itself"
    assert "online" not in ENTRY["tags"], "FaceSnap does not use a server"


def test_the_url_gives_the_extensions_folder_the_projects_name():
    """The WebUI names the folder after the URL. The settings for the order of callbacks contain that name."""
    project = Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf-8")
    name = re.search(r'^name = "(.+)"', project, re.M)[1]
    url = re.fullmatch(r"https://[^ ]+?/([^/ ]+)\.git", ENTRY["url"])
    assert url[1] == name
