"""The panel of model files with a mock of gradio, and checks of its HTML."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

from tests.support import mock_webui

TAGS = {"div", "br", "p", "b", "code", "a", "ul", "li", "span", "button", "details", "summary", "progress"}
ATTRIBUTES = {
    *("class", "title", "href", "target", "rel", "type", "role", "aria-label", "max", "value"),
    *("translate", "lang", "data-facesnap-say"),
    *("data-state", "data-facesnap-action", "data-facesnap-job", "data-facesnap-progress", "data-facesnap-lists"),
}


@contextmanager
def mocked_panel(folder: Path) -> Iterator[ModuleType]:
    """Yield `facesnap_ext.ui.models_panel`, imported with a mock of gradio."""
    names = ("gradio", "modules", "facesnap_ext.ui.models_panel")
    before = {name: module for name, module in sys.modules.items() if name.startswith(names)}
    mock_webui.install(folder)
    sys.modules.pop("facesnap_ext.ui.models_panel", None)
    try:
        yield importlib.import_module("facesnap_ext.ui.models_panel")
    finally:
        for name in [name for name in sys.modules if name.startswith(names)]:
            del sys.modules[name]
        sys.modules.update(before)


class NestedTags(HTMLParser):
    """Fails if tags are not properly nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class OwnTags(NestedTags):
    """Fails on tags and attributes that the panel does not have."""

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        assert tag in TAGS
        for name, value in attributes:
            assert name in ATTRIBUTES
            assert name != "href" or value.startswith("https://")

    def handle_comment(self, data):
        raise AssertionError(data)
