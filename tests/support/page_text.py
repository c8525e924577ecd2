"""Every text of the page, collected by drawing it: fixed wording, apart from names and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
LABELS = ("aria-label", "placeholder", "title")  # attributes that are read or shown
VOID = {"br", "img", "input"}
NAMES = {  # of products, files, networks and licences, which are the same in every language
    *("FaceSnap", "InstantID", "antelopev2", "buffalo_l", "AuraFace", "CLIP", "CLIP-ViT-H", "DECA", "FLAME"),
    *("FLAME 2020", "FLAME 2023 Open", "CLIP-ViT-H-14-laion2B-s32B-b79K", "nsfw_image_detection"),
    *("Apache-2.0", "MIT", "CC-BY-4.0"),
}
KEYS = {"Escape", "Enter", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Tab"}  # as browsers name them
LITERAL = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
ELEMENT_TYPES = {"DETAILS", "TEXTAREA", "INPUT"}


class _Wording(HTMLParser):
    """The text nodes and labels outside of elements with `translate='no'` and `lang='en'`."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: list[str] = []
        self._exempt: list[bool] = [False]
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        exempt = self._exempt[-1] or values.get("translate") == "no" or values.get("lang") == "en"
        if not exempt:
            self.texts += [value for name in LABELS if (value := values.get(name))]
        if tag not in VOID:
            self._exempt.append(exempt)

    def handle_endtag(self, tag: str) -> None:
        self._exempt.pop()

    def handle_data(self, data: str) -> None:
        if not self._exempt[-1]:
            self.texts.append(data)


def in_html(html: str) -> set[str]:
    """The fixed wording in HTML."""
    return wording_in(_Wording(html).texts)


def wording_in(texts: Iterable[str]) -> set[str]:
    """The texts that are words, stripped, and not the same in every language."""
    stripped = (text.strip() for text in texts)
    return {text for text in stripped if re.search(r"[^\W\d_]{2}", text) and text not in NAMES}


def in_javascript() -> set[str]:
    """The texts in the page's scripts: literals that begin with a capital letter."""
    texts: list[str] = []
    for path in (ROOT / "javascript").glob("*.js"):
        code = re.sub(r"(?m)^\s*//.*$|\s//\s.*$", "", path.read_text(encoding="utf-8"))
        literals = (literal.replace('\\"', '"') for literal in LITERAL.findall(code))
        texts += [text for text in literals if re.match(r"[A-Z]", text) and text not in KEYS | ELEMENT_TYPES]
    return wording_in(texts)
