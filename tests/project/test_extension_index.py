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
    assert all(isinstance(ENTRY[name], str) for name in ("name", "url", "description"))
    assert isinstance(ENTRY["tags"], list)
    assert len(ENTRY["tags"]) == len(set(ENTRY["tags"]))
    assert set(ENTRY["tags"]) <= TAGS
    assert "installed" not in ENTRY["tags"], "the WebUI sets this tag itself"
    assert "online" not in ENTRY["tags"], "FaceSnap does not use a server"


def test_only_the_owner_is_still_to_be_filled_in():
    """As in validate.py of the index, the URL is one of git over HTTPS."""
    assert ENTRY["url"].replace("OWNER", "someone") == "https://github.com/someone/sd-webui-facesnap.git"
    assert not any("OWNER" in str(value) for name, value in ENTRY.items() if name != "url")


def test_the_description_is_short_plain_english():
    assert ENTRY["description"].isascii()
    assert 40 <= len(ENTRY["description"]) <= 250, "the WebUI shows it in one cell of a table"
    assert ENTRY["description"].endswith(".")
    assert not re.search(r"https?:|[<>]", ENTRY["description"])


def test_the_url_gives_the_extensions_folder_the_projects_name():
    """The WebUI names the folder after the URL. The settings for the order of callbacks contain that name."""
    project = Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf-8")
    name = re.search(r'^name = "(.+)"', project, re.M)[1]
    url = re.fullmatch(r"https://[^ ]+?/([^/ ]+)\.git", ENTRY["url"])
    assert url[1] == name
