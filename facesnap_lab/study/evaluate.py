"""Evaluate the answers of a study: shares of the choices with intervals over participants, and exact tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_lab.markdown import interval_cell, markdown_table
from facesnap_lab.statistics import bootstrap

TITLES = {"realism": "realism", "identity": "likeness"}
MAX_BYTES = 2**20  # of an answer file; a page writes some 40 bytes per choice


@dataclass(frozen=True)
class Key:
    """The content of a study's key file, which `make` writes."""

    study: str
    methods: tuple[str, ...]
    questions: tuple[str, ...]
    items: tuple[tuple[str, ...], ...]  # method of each image, by item


@dataclass(frozen=True)
class Answers:
    """The choices of a participant: the chosen method by question and item."""

    participant: str
    choices: dict[tuple[str, int], str]


def read_key(file: Path) -> Key:
    """Read a key that `make` wrote.

    Raises:
        FaceSnapError: it is missing or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        items = tuple(tuple(item["methods"]) for item in content["items"])
        return Key(content["study"], tuple(content["methods"]), tuple(content["questions"]), items)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FaceSnapError(
            f"The key {file} cannot be read ({reason_of(error)}); enter the file that 'facesnap study make' wrote."
        ) from error


def read_answers(files: Iterable[Path], key: Key) -> list[Answers]:
    """Read the files that participants saved.

    Raises:
        FaceSnapError: a file is damaged or belongs to a different study, or two have the same participant.
    """
    found: dict[str, tuple[Path, Answers]] = {}
    for file in files:
        answers = _read_one(file, key)
        if answers.participant in found:
            raise FaceSnapError(
                f"{found[answers.participant][0]} and {file} are of the same participant; remove the older one."
            )
        found[answers.participant] = (file, answers)
    if not found:
        raise FaceSnapError("There are no answers; enter the files that the participants saved.")
    return [answers for _, answers in found.values()]


def _read_one(file: Path, key: Key) -> Answers:
    def wrong(reason: str) -> FaceSnapError:
        return FaceSnapError(f"The answers {file} cannot be used ({reason}); ask the participant to save them again.")

    try:
        if file.stat().st_size > MAX_BYTES:
            raise wrong("the file is too large")
        content = json.loads(file.read_text(encoding="utf-8"))
        study, participant, choices = content["study"], content["participant"], content["choices"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise wrong(reason_of(error)) from error
    if study != key.study:
        raise FaceSnapError(f"The answers {file} belong to a different study than the key; remove them.")
    if not isinstance(participant, str) or not isinstance(choices, list):
        raise wrong("fields have the wrong type")
    chosen: dict[tuple[str, int], str] = {}
    for choice in choices:
        values = choice if isinstance(choice, dict) else {}
        question, item, image = (values.get(name) for name in ("question", "item", "image"))
        if question not in key.questions or type(item) is not int or not 0 <= item < len(key.items):
            raise wrong("a choice has an unknown question or item")
        if type(image) is not int or not 0 <= image < len(key.items[item]):
            raise wrong("a choice has an unknown image")
        if (question, item) in chosen:
            raise wrong("an item was answered twice")
        chosen[question, item] = key.items[item][image]
    return Answers(participant, chosen)


def evaluate(key: Key, answers: Sequence[Answers]) -> dict[str, Any]:
    """Return shares and tests for each question.

    - Shares: of a participant's choices, averaged over participants, with a bootstrap interval over participants.
    - Tests: for each pair of methods, an exact two-sided sign test over participants: did more of them choose the
      first more often than the second? Participants without a difference are left out. The p-values of a question are
      corrected with Holm's method.
    """
    return {
        "participants": len(answers),
        "items": len(key.items),
        "questions": {question: _one_question(key, answers, question) for question in key.questions},
    }


def _one_question(key: Key, answers: Sequence[Answers], question: str) -> dict[str, Any]:
    counts = [Counter(method for (asked, _), method in one.choices.items() if asked == question) for one in answers]
    counts = [count for count in counts if count]
    if not counts:
        return {"choices": 0, "shares": {}, "tests": []}
    shares = {}
    for method in key.methods:
        interval = bootstrap(np.array([count[method] / count.total() for count in counts]))
        shares[method] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    tests = [
        {"first": first, "second": second, **_sign_test(counts, first, second)}
        for i, first in enumerate(key.methods)
        for second in key.methods[i + 1 :]
    ]
    for test, corrected in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = corrected
    return {"choices": sum(count.total() for count in counts), "shares": shares, "tests": tests}


def _sign_test(counts: Sequence[Mapping[str, int]], first: str, second: str) -> dict[str, Any]:
    from scipy.stats import binomtest

    more = sum(count[first] > count[second] for count in counts)
    fewer = sum(count[first] < count[second] for count in counts)
    p = float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
    return {"more": more, "fewer": fewer, "p": p}


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values that are corrected for their number (Holm, 1979)."""
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def as_text(found: Mapping[str, Any]) -> str:
    """Format shares and tests as Markdown tables."""
    lines = [f"{found['participants']} participants, {found['items']} groups of images.", ""]
    questions = {name: one for name, one in found["questions"].items() if one["choices"]}
    titles = [f"{TITLES.get(name, name)}, % of choices" for name in questions]
    methods = list(next(iter(questions.values()))["shares"]) if questions else []
    lines += markdown_table(
        titles, [(method, [interval_cell(one["shares"][method]) for one in questions.values()]) for method in methods]
    )
    for name, one in questions.items():
        rows = [
            (
                f"{test['first']} and {test['second']}",
                [str(test["more"]), str(test["fewer"]), f"{test['p']:.2g}", f"{test['p_holm']:.2g}"],
            )
            for test in one["tests"]
        ]
        head = ["participants who chose the first more often", "the second", "p (sign test)", "p (Holm)"]
        lines += ["", f"{TITLES.get(name, name).capitalize()}:", "", *markdown_table(head, rows)]
    return "\n".join(lines)
