"""HTML that several parts of the page share: an error in place of a response, and buttons.

For errors of a job see `hosts.errors`, and for those of the HTTP routes see `ui.routes`.
"""

from __future__ import annotations

from html import escape


def problem(sentence: str) -> str:
    """HTML of a sentence that tells the user what is wrong and what to do."""
    return f"<span class='facesnap-problem'>{escape(sentence)}</span>"


def action_button(action: str, text: str, primary: bool = False) -> str:
    """HTML of a button that sends an action to the panel of model files, such as "get antelopev2"."""
    kind = "facesnap-button facesnap-primary" if primary else "facesnap-button"
    action = escape(action, quote=True)
    return f"<button type='button' class='{kind}' data-facesnap-action='{action}'>{escape(text)}</button>"
