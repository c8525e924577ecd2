"""The documentation refers only to files, headings, messages and pages that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from facesnap_lab.gallery.make import read_results
from facesnap_lab.gallery.page import in_readme, readme_section
from facesnap_lab.gallery.page import page as gallery_page
from facesnap_lab.gallery.plan import read_plan

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT.joinpath("README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models" / "README.md", *sorted(DOCS.glob("*.md"))]
SOURCES = [*(ROOT / "facesnap_ext").rglob("*.py"), ROOT / "scripts" / "facesnap.py", ROOT / "install.py"]
HOLE = "\0"  # a value in a message
QUOTED = re.findall(r"^\| \*(.+?)\*(?: \(console\))? \|", README.partition("### Messages")[2].partition("###")[0], re.M)


@cache
def messages() -> tuple[str, ...]:
    """All strings in the source code except docstrings, with `HOLE` for the values of f-strings."""
    return tuple(text for path in SOURCES for text in _strings(ast.parse(path.read_text("utf-8"))))


def _strings(tree: ast.AST) -> Iterator[str]:
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_readme_quotes_messages():
    assert len(QUOTED) >= 15


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_message_occurs_in_the_source_code(quoted: str):
    """Each "…" stands for a value, or at the beginning or end for the rest of the sentence."""
    parts = [part.strip() for part in quoted.split("…") if part.strip()]
    assert len(" ".join(parts).split()) >= 4, "too short to recognise a message"
    pattern = re.compile(f"[^.]*{HOLE}[^.]*".join(map(re.escape, parts)))
    assert any(pattern.search(message) for message in messages())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_images_exist(path: Path):
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not _exists(path, target)] == []


def _exists(page: Path, target: str) -> bool:
    file, _, anchor = target.partition("#")
    linked = (page.parent / file).resolve() if file else page
    return linked.exists() and (not anchor or anchor in _anchors(linked))


def _anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_gallery_pages_show_the_recorded_results():
    plan, results = read_plan(DOCS / "gallery" / "plan.json"), read_results(DOCS / "gallery")
    assert DOCS.joinpath("gallery.md").read_text("utf-8") == gallery_page(plan, results)
    assert in_readme(README, readme_section(plan, results)) == README


def test_clip_sizes_match_the_number_of_parameters():
    """LAION's whole CLIP has 986,109,441 parameters in single precision."""
    table = ROOT.joinpath("models", "README.md").read_text("utf-8")
    assert f"{4 * 986_109_441 / 1e9:.2f} GB" in table
