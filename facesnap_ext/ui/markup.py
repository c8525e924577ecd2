"""What several parts of the page share: text, an error in place of a response, buttons, and hidden text.

The hosts translate a text node if the whole of it is a key of a file in localizations/. Fixed wording is therefore in
separate elements from names and numbers, which have the attribute `translate='no'`. Sentences that contain names, such
as errors, stay English, and have the attribute `lang='en'`.

For errors of a job see `hosts.errors`, and for those of the HTTP routes see `ui.routes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any


def problem(sentence: str) -> str:
    """HTML of a sentence that tells the user what is wrong and what to do."""
    return f"<span class='facesnap-problem' lang='en'>{escape(sentence)}</span>"


def english(sentence: str) -> str:
    """HTML of a sentence that contains names or numbers."""
    return f"<span lang='en'>{escape(sentence)}</span>"


def wording(text: str) -> str:
    """HTML of fixed wording."""
    return f"<span>{escape(text)}</span>"


def data(text: str) -> str:
    """HTML of a name, path or number."""
    return f"<span translate='no'>{escape(text)}</span>"


def mixed(text: str, phrases: Iterable[str]) -> str:
    """HTML of a text in which these phrases are fixed wording, and the rest is names and numbers."""
    pattern = "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))
    parts = re.split(f"({pattern})", text)  # the phrases are at odd indices
    return "".join((wording if i % 2 else data)(part) for i, part in enumerate(parts) if part)


def hidden_text(elem_id: str) -> Any:
    """Create a text box that the page's script and the server exchange data in. Saving the host's defaults skips it."""
    import gradio as gr

    box = gr.Textbox("", show_label=False, elem_id=elem_id, elem_classes="facesnap-hidden")
    box.do_not_save_to_config = True
    return box


def action_button(action: str, text: str, primary: bool = False) -> str:
    """HTML of a button that sends an action to the panel of model files, such as "get antelopev2".

    Args:
        text: the label, as HTML.
    """
    kind = "facesnap-button facesnap-primary" if primary else "facesnap-button"
    action = escape(action, quote=True)
    return f"<button type='button' class='{kind}' data-facesnap-action='{action}'>{text}</button>"


def task_button(task: str, text: str, person: str = "", ident: str = "") -> str:
    """HTML of a button that sends a task with the values of its form; see `ui.tasks`.

    Args:
        text: the label, as HTML.
        person: the saved person that the task is about.
    """
    named = f" id='{ident}'" if ident else ""
    return (
        f"<button type='button' class='facesnap-button'{named} data-facesnap-task='{task}' "
        f"data-facesnap-person='{escape(person, quote=True)}'>{text}</button>"
    )
