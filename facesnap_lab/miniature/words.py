"""The miniature's tokenizer: CLIP's byte-pair encoding with just the merges for the miniature's words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from facesnap_lab.miniature.captions import WORDS

# the end token's id must not be 2, which transformers treats as "the largest id" (configs from before version 4.25)
UNKNOWN, END, BEGIN = "<unk>", "<|endoftext|>", "<|startoftext|>"
LENGTH = 77  # tokens in every SDXL prompt


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build the content of CLIP's two files: ids by token, and merges in order.

    A word's id is its index in `WORDS` plus 3. Each word is merged from left to right, starting from the result of the
    earlier merges, so that earlier words are not affected.
    """
    merges: list[tuple[str, str]] = []
    pieces = dict.fromkeys([UNKNOWN, END, BEGIN, *(f"{word}</w>" for word in WORDS)])
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        pieces |= dict.fromkeys(parts)
        for pair in merges:
            parts = _merge(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _merge(parts, merges[-1])
            pieces[parts[0]] = None
    return {piece: i for i, piece in enumerate(pieces)}, merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(parts):
        both = tuple(parts[i : i + 2]) == pair
        merged.append("".join(pair) if both else parts[i])
        i += 1 + both
    return merged


def tokenise(text: str) -> list[int]:
    """Tokenise a caption with begin and end tokens, as the tokenizer of `write_tokenizer` does for known words."""
    known = vocabulary_ids()
    words = re.findall(r"[a-z]+|,", text.lower())
    return [known[BEGIN], *(known.get(f"{word}</w>", known[UNKNOWN]) for word in words), known[END]]


def padded_ids(captions: Sequence[str], length: int = LENGTH) -> list[list[int]]:
    """Tokenise captions, truncated or padded with the end token to a common length, as CLIP's tokenizer pads."""
    end = vocabulary_ids()[END]
    rows = [tokenise(caption)[: length - 1] for caption in captions]
    return [row + [end] * (length - len(row)) for row in rows]


def vocabulary_ids() -> dict[str, int]:
    return {name: i for i, name in enumerate([UNKNOWN, END, BEGIN, *(f"{word}</w>" for word in WORDS)])}


def write_tokenizer(folder: Path) -> Any:
    """Write `vocab.json`, `merges.txt` and the settings, which all versions of transformers read alike."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    ids, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "unk_token": UNKNOWN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
