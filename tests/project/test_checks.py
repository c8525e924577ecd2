"""The configuration of the checks is consistent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
FORMS = [path for path in sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")) if path.name != "config.yml"]
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text("utf-8")


def test_pre_commit_runs_the_pinned_ruff():
    hooks = {repository["repo"]: repository for repository in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]}
    pinned = re.search(r"^ruff==(.+)$", read("constraints.txt"), re.M)[1]
    assert hooks["https://github.com/astral-sh/ruff-pre-commit"]["rev"] == f"v{pinned}"


def test_workflow_runs_the_readmes_commands_on_supported_pythons():
    job = yaml.safe_load(read(".github", "workflows", "test.yml"))["jobs"]["test"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make demo", "make test"]
    assert all(re.search(rf"^{command}\b", read("README.md"), re.M) for command in commands)
    oldest = re.search(r'^requires-python = ">=(.+)"', read("pyproject.toml"), re.M)[1]
    assert oldest in job["strategy"]["matrix"]["python"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_valid(path: Path):
    """As in GitHub's syntax for issue forms."""
    form = yaml.safe_load(path.read_text("utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in form["body"]} <= KINDS
    assert fields
    assert all(field["attributes"]["label"] for field in fields)
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["bug", "image"])
def test_reports_ask_for_infotext_host_version_and_console(name: str):
    form = yaml.safe_load(read(".github", "ISSUE_TEMPLATE", f"{name}.yml"))
    assert {"infotext", "host", "version", "console"} <= {field.get("id") for field in form["body"]}
