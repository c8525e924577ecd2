"""What several parts of the page share: an error in place of a response, buttons, and hidden text.

For errors of a job see `hosts.errors`, and for those of the HTTP routes see `ui.routes`.
"""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr


def problem(sentence: str) -> str:
    """HTML of a sentence that tells the user what is wrong and what to do."""
    return f"<span class='facesnap-problem'>{escape(sentence)}</span>"


def hidden_text(elem_id: str) -> Any:
    """Create a text box that the page's script and the server exchange data in. Saving the host's defaults skips it."""
    box = gr.Textbox("", show_label=False, elem_id=elem_id, elem_classes="facesnap-hidden")
    box.do_not_save_to_config = True
    return box


def action_button(action: str, text: str, primary: bool = False) -> str:
    """HTML of a button that sends an action to the panel of model files, such as "get antelopev2"."""
    kind = "facesnap-button facesnap-primary" if primary else "facesnap-button"
    action = escape(action, quote=True)
    return f"<button type='button' class='{kind}' data-facesnap-action='{action}'>{escape(text)}</button>"
