"""How an error reaches the page outside a job: as HTML in place of the response.

For errors of a job see `hosts.errors`, and for those of the HTTP routes see `ui.routes`.
"""

from __future__ import annotations

from html import escape


def problem(sentence: str) -> str:
    """HTML of a sentence that tells the user what is wrong and what to do."""
    return f"<span class='facesnap-problem'>{escape(sentence)}</span>"
