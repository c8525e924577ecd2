"""The top of the accordion in a new installation: what a first image still needs, and the button that downloads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from facesnap_ext.weights.catalogue import Part, downloadable
from facesnap_ext.weights.instantid import RECOGNITION
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import existing_file, format_size


def bundle(files: ModelFiles) -> str:
    """The name of the bundle that completes an installation; empty if nothing in it is needed."""
    if files.facesnap:
        return "" if files.face_pack else "antelopev2"
    return "starter"


def missing(files: ModelFiles) -> tuple[Part, ...]:
    """The parts that `bundle` still lacks."""
    if not (name := bundle(files)):
        return ()  # before any pack is read
    parts = downloadable(name)
    if files.packs_with(RECOGNITION):
        parts = tuple(part for part in parts if part.role != "face_pack")
    return tuple(part for part in parts if existing_file(part, files) is None)


def label(parts: tuple[Part, ...]) -> str:
    """The button's label, such as "Download InstantID and antelopev2 (4.61 GB)"."""
    names = dict.fromkeys(part.title.partition("'s ")[0] for part in reversed(parts))
    return f"Download {' and '.join(names)} ({format_size(sum(part.size for part in parts))})"


def html(files: ModelFiles) -> str:
    """HTML of one sentence, and of a list of what goes where and under which licence; empty if nothing is needed."""
    parts = missing(files)
    if not parts:
        return ""
    rows = "".join(
        f"<li>{escape(part.title)}: {format_size(part.size)}, {escape(part.licence)} ({escape(part.use)}); saved as "
        f"<code>{escape(str(files.folder / part.target))}</code></li>"
        for part in parts
    )
    return (
        "<div class='facesnap-starter'>FaceSnap needs these files for its first image. Nothing is downloaded until you "
        f"click.<details><summary>What is downloaded, and under which licence</summary><ul>{rows}</ul></details></div>"
    )


@dataclass(frozen=True)
class Controls:
    """The components: the text, the progress, and the buttons."""

    text: Any
    progress: Any
    get: Any
    pause: Any

    @property
    def outputs(self) -> list[Any]:
        """The components that `updates` and `running` update."""
        return [self.text, self.progress, self.get, self.pause]


def controls(files: ModelFiles, ident: Callable[[str], str]) -> Controls:
    """Create the components; `models_panel.panel` connects them."""
    parts = missing(files)
    text = gr.HTML(html(files), elem_id=ident("starter"))
    progress = gr.HTML(elem_id=ident("starter_progress"))
    with gr.Row():
        value = label(parts) if parts else ""
        get = gr.Button(value, variant="primary", visible=bool(parts), elem_id=ident("starter_get"))
        pause = gr.Button("Pause the download", visible=False, elem_id=ident("starter_pause"))
    return Controls(text, progress, get, pause)


def updates(files: ModelFiles, progress: str) -> tuple[Any, ...]:
    """The state of the components when no download is running."""
    parts = missing(files)
    button = gr.update(value=label(parts) if parts else "", visible=bool(parts))
    return html(files), progress, button, gr.update(visible=False)


def running(progress: str) -> tuple[Any, ...]:
    """The state of the components during a download."""
    return gr.update(), progress, gr.update(visible=False), gr.update(visible=True)
