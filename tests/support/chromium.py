"""Chromium, driven by Playwright, for tests of what happens in a browser."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium(*flags: str) -> Iterator[Any]:
    """Launch the browser that `find_chromium` finds, headless, with more flags."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        pytest.fail("No Chromium was found; run `make test`, which installs one, or set CHROMIUM to its path.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*FLAGS, *OFFLINE, *flags])
        yield browser
        browser.close()


@cache
def find_chromium() -> str | None:
    """Return the path of a Chromium that starts: the one in CHROMIUM, otherwise the system's, otherwise
    Playwright's."""
    if path := os.environ.get("CHROMIUM"):
        return path if _starts(path) else None
    candidates = [*map(shutil.which, NAMES), _playwrights()]
    return next((path for path in candidates if path and _starts(path)), None)


def install_chromium() -> None:
    """Install Chromium unless there is one: Debian's package if apt-get can run as root, otherwise Playwright's own."""
    if find_chromium():
        return
    for command in install_commands(_distribution(), _root()):
        print("Installing Chromium:", *command, flush=True)
        subprocess.run(command, check=False)
        find_chromium.cache_clear()
        if find_chromium():
            return
    raise SystemExit("Chromium could not be installed; install it yourself, and set CHROMIUM to its path if needed.")


def install_commands(distribution: str, root: list[str] | None) -> list[list[str]]:
    """Return commands that install Chromium, in the order in which to try them.

    Args:
        distribution: the ID in /etc/os-release.
        root: the prefix that runs a command as root; None if the command cannot be run as root.
    """
    playwright = [sys.executable, "-m", "playwright", "install", "--no-shell", "chromium"]
    if root is None:
        return [playwright]
    commands = [[*playwright, "--with-deps"]]
    if distribution == "debian":
        apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
        commands = [[*apt, "update"], [*apt, "install", "--yes", "--no-install-recommends", "chromium"], *commands]
    return commands


def _starts(path: str) -> bool:
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=120, check=False).returncode == 0
    except OSError:
        return False


def _playwrights() -> str:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["ID"]
    except OSError:
        return ""


def _root() -> list[str] | None:
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return []
    passwordless = shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False)
    return ["sudo", "-n"] if passwordless and passwordless.returncode == 0 else None
