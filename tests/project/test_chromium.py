"""How `make test` gets a browser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import chromium

PLAYWRIGHT = [sys.executable, "-m", "playwright", "install", "--no-shell", "chromium"]


@pytest.fixture(autouse=True)
def uncached():
    chromium.find_chromium.cache_clear()
    yield
    chromium.find_chromium.cache_clear()


def cache_free(function):
    function.cache_clear = lambda: None
    return function


def executable(path: Path, code: int = 0) -> str:
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
def test_first_browser_that_starts_is_taken(tmp_path, monkeypatch):
    """Ubuntu's chromium-browser, for example, exists but does not start without snap."""
    executable(tmp_path / "chromium-browser", code=1)
    chrome = executable(tmp_path / "google-chrome")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert chromium.find_chromium() == chrome
    chromium.find_chromium.cache_clear()
    monkeypatch.setenv("CHROMIUM", executable(tmp_path / "mine"))
    assert chromium.find_chromium() == str(tmp_path / "mine")
    chromium.find_chromium.cache_clear()
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "nowhere"))
    assert chromium.find_chromium() is None


def test_debian_gets_its_own_package_where_root_is_available():
    for prefix in ([], ["sudo", "-n"]):
        update, install, fallback = chromium.install_commands("debian", prefix)
        assert update == [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "update"]
        assert install[: len(prefix) + 4] == [*update[:-1], "install"]
        assert install[-1] == "chromium"
        assert fallback == [*PLAYWRIGHT, "--with-deps"]


@pytest.mark.parametrize(("distribution", "root"), [("debian", None), ("ubuntu", None), ("", None)])
def test_without_root_playwright_brings_chromium(distribution, root):
    assert chromium.install_commands(distribution, root) == [PLAYWRIGHT]


def test_other_systems_get_playwrights_with_its_libraries():
    assert chromium.install_commands("ubuntu", []) == [[*PLAYWRIGHT, "--with-deps"]]


def test_installation_stops_at_the_first_command_that_gives_a_browser(monkeypatch):
    ran = []
    found = iter([None, None, "/usr/bin/chromium"])
    monkeypatch.setattr(chromium, "find_chromium", cache_free(lambda: next(found)))
    monkeypatch.setattr(chromium, "_root", list)
    monkeypatch.setattr(chromium, "_distribution", lambda: "debian")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: ran.append(command))
    chromium.install_chromium()
    assert ran == chromium.install_commands("debian", [])[:2]

    found = iter([None] * 4)
    with pytest.raises(SystemExit, match="CHROMIUM"):
        chromium.install_chromium()
