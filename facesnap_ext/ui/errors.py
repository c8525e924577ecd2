"""How an error reaches the page outside a job: as HTML in place of the answer.

Errors of a job take the way described in `hosts.errors`, and those of the HTTP routes the one in `ui.routes`.
"""

from __future__ import annotations

from html import escape


def problem(sentence: str) -> str:
    """HTML of a sentence that tells the user what is wrong and what to do."""
    return f"<span class='facesnap-problem'>{escape(sentence)}</span>"
