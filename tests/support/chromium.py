"""Chromium, driven by Playwright, for tests of what happens in a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser: the environment's CHROMIUM, else the system's, else the one that Playwright has fetched."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        if not Path(found or playwright.chromium.executable_path).is_file():
            pytest.fail(
                f"There is no browser{f' at {found}' if found else ''}: install Debian's package chromium, or run "
                "`.venv/bin/playwright install chromium`, or set CHROMIUM to the path of one."
            )
        browser = playwright.chromium.launch(executable_path=found, args=[*FLAGS, *OFFLINE])
        yield browser
        browser.close()
