"""The tests against a running WebUI can at least be imported: `make test` does not run them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("requests")

MODULES = sorted(path.stem for path in (Path(__file__).parents[1] / "live").glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_live_tests_can_be_imported(name: str):
    import_module(f"tests.live.{name}")
