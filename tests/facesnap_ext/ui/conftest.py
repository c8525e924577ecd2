"""The package `facesnap_ext.ui` with a mock of gradio, and an engine with stand-in networks."""

from __future__ import annotations

import importlib
import sys

import pytest

from facesnap_ext.engine import Engine
from facesnap_ext.weights.search import find_models
from tests.support import mock_webui


@pytest.fixture
def page(tmp_path):
    """The package `facesnap_ext.ui` with a mock of gradio."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("gradio", "modules")}
    mock_webui.install(tmp_path)
    importlib.import_module("facesnap_ext.ui.accordion")
    yield importlib.import_module("facesnap_ext.ui")
    for name in [name for name in sys.modules if name.split(".")[0] in ("gradio", "modules")]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module")
def engine(stand_ins) -> Engine:
    return Engine(lambda: find_models(stand_ins))
