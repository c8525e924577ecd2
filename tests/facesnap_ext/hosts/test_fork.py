"""Recognising the running WebUI, on folders with the files that tell the WebUIs apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_THREAD, NEW_THREAD = "finished_list = []", "last_exception = None"
SCRIPT = "class Script:\n    def process_before_every_sampling(self, p, *args, **kwargs): pass"
PROCESSING = "class StableDiffusionProcessing:\n    def comment(self, text): pass"
A1111 = {
    "modules/scripts.py": SCRIPT,
    "modules/processing.py": PROCESSING,
    "modules/launch_utils.py": "def git_tag(): return 'v1.10.1'",
}
NEO = "version = 'neo'\nrelease = '2.26'"


def forge(version: str, thread: str = NEW_THREAD, backend: str = "backend") -> dict[str, str]:
    return {
        **A1111,
        "modules_forge/main_thread.py": thread,
        "modules_forge/forge_version.py": version,
        f"{backend}/memory_management.py": "",
    }


def ask(folder: Path, files: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose working folder is a WebUI with these files."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; from facesnap_ext.hosts import fork; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)


def current(folder: Path, files: dict[str, str]) -> dict:
    code = (
        "import json, dataclasses; print(json.dumps(dataclasses.asdict(fork.current()))); print(fork.current().title)"
    )
    answer = ask(folder, files, code)
    assert answer.returncode == 0, answer.stderr
    described, title = answer.stdout.splitlines()
    return {**json.loads(described), "title": title}


# the WebUI's files, its name and version, and whether it shows sampling errors and loads networks in part
HOSTS = {
    "A1111": (A1111, "AUTOMATIC1111", "1.10.1", True, False),
    "Forge": (forge("version = '2.0.1v1.10.1'"), "Forge", "2.0.1v1.10.1", True, True),
    "reForge2": (
        {**forge("version = '2.0.1v1.10.1'"), "extensions-builtin/reForge-advanced_model_sampling/x.py": ""},
        *("reForge2", "2.0.1v1.10.1"),
        True,
        True,
    ),
    "Neo": (forge(NEO), "Forge Neo", "2.26", True, True),
    "Classic": (
        forge("version = 'classic'\nrelease = '1.9'", OLD_THREAD, "ldm_patched"),
        *("Forge Classic", "1.9"),
        False,
        True,
    ),
    "ersatz": (forge("version = 'f2.ersatz'"), "ersatzForge", "", True, True),
    "reForge": (
        forge("version = '1.0.0v2-v1.10.1RC'", OLD_THREAD, "ldm_patched"),
        *("reForge", "1.0.0v2-v1.10.1RC"),
        False,
        True,
    ),
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_webui_is_recognised_by_its_own_files(tmp_path, host):
    files, name, version, shows_errors, loads_partially = HOSTS[host]
    found = current(tmp_path, files)
    assert (found["name"], found["version"], found["commit"]) == (name, version, "")
    assert (found["shows_sampling_errors"], found["loads_partially"]) == (shows_errors, loads_partially)
    assert found["shows_comments"]
    assert found["title"] == f"{name} {version}".strip()


@pytest.mark.parametrize(
    ("git", "commit"),
    [
        ({"HEAD": COMMIT}, "01234567"),
        ({"HEAD": "ref: refs/heads/main\n", "refs/heads/main": f"{COMMIT}\n"}, "01234567"),
        ({"HEAD": "ref: refs/heads/main\n", "packed-refs": f"# pack-refs\n{COMMIT} refs/heads/main\n"}, "01234567"),
        ({"HEAD": "ref: refs/heads/main\n", "packed-refs": f"{COMMIT} refs/heads/other/refs/heads/main2\n"}, ""),
        ({"HEAD": "ref: refs/heads/main\n"}, ""),
        ({"HEAD": "<script>alert(1)</script>"}, ""),
    ],
)
def test_the_commit_is_read_without_git(tmp_path, git, commit):
    found = current(tmp_path, {**forge(NEO), **{f".git/{name}": text for name, text in git.items()}})
    assert found["commit"] == commit
    assert found["title"] == ("Forge Neo 2.26 (01234567)" if commit else "Forge Neo 2.26")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"modules/processing_diffusers.py": "", "modules/scripts.py": "raise SystemExit"},
            "cannot run in SD.Next, .*; use AUTOMATIC1111 1.10 or later, Forge",
        ),
        (
            {"modules/scripts.py": "class Script: pass"},
            "needs AUTOMATIC1111 1.10 or later, or Forge or one of its forks; update the WebUI",
        ),
    ],
    ids=["SD.Next", "A1111 before 1.10"],
)
def test_an_unsupported_webui_gets_one_sentence(tmp_path, files, sentence):
    answer = ask(tmp_path, files, "fork.require_supported()")
    assert answer.returncode == 1
    last = answer.stderr.strip().splitlines()[-1]
    assert re.match("ImportError: FaceSnap " + sentence, last)


@pytest.mark.parametrize("host", HOSTS)
def test_a_supported_webui_passes(tmp_path, host):
    assert ask(tmp_path, HOSTS[host][0], "fork.require_supported()").returncode == 0
