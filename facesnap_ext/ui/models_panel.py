"""The panel of model files: the files found for each part, the missing parts, and buttons that download them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.ui import accordion, starter
from facesnap_ext.ui.errors import problem
from facesnap_ext.weights import download
from facesnap_ext.weights.catalogue import COMMERCIAL_AVAILABLE, COMMERCIAL_GAPS, PARTS, TO_BEGIN, Part
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import ModelFile, Role, compute_hashes, format_size, list_models

ROLE_LABELS = {
    "facesnap": "FaceSnap",
    "face_pack": "Face model pack",
    "clip": "CLIP-ViT-H",
    "deca": "DECA",
    "flame": "FLAME",
    "mediapipe": "MediaPipe's landmarks",
    "image_classifier": "Image classifier",
    "instantid": "InstantID",
}
POLL_INTERVAL = 0.5  # seconds between two updates of a download's progress


def html(roles: Sequence[Role], files: ModelFiles) -> str:
    """HTML of all parts, as returned by `list_models`, and of the folders that were searched."""
    rows = "".join(map(_role, roles))
    elsewhere = ", ".join(str(folder) for folder in files.elsewhere)
    searched = f"Also searched: {escape(elsewhere)}.<br>" if elsewhere else ""
    searched += (
        "To search another folder, such as ComfyUI's <code>models</code>, start the WebUI with "
        "<code>--facesnap-also-look-in</code> FOLDER.<br>"
    )
    begin = "" if files.facesnap else f"<p><b>{escape(TO_BEGIN)}</b></p>"
    passed_over = f"<p>Skipped: {escape(' '.join(files.passed_over))}</p>" if files.passed_over else ""
    gaps = "".join(f"<li>{escape(gap)}</li>" for gap in COMMERCIAL_GAPS)
    return (
        f"<div class='facesnap-models'>Model folder: {escape(str(files.folder))}.<br>{searched}{begin}"
        f"<table><tr><th>Part</th><th>Found</th><th>Available</th></tr>{rows}</table>{passed_over}"
        f"Available for commercial use: {escape(COMMERCIAL_AVAILABLE)}. Not available:<ul>{gaps}</ul></div>"
    )


def progress_html(jobs: Sequence[download.Job]) -> str:
    """HTML of the downloads: progress if running, outcome if finished."""
    lines = []
    for job in jobs:
        if job.state == "running":
            percent = 100 * job.done / job.size
            text = f"{job.title}: {format_size(job.done)} of {format_size(job.size)} ({percent:.0f} %)"
            lines.append(f"{escape(text)}<br><progress max='100' value='{percent:.1f}'></progress>")
        else:
            lines.append(problem(job.message) if job.state == "failed" else escape(job.message))
    return "<br>".join(lines)


def panel(
    files: ModelFiles,
    find_models: Callable[[], ModelFiles],
    ident: accordion.Ident,
    status: Any,
    model_lists: Sequence[Any],
    top: starter.Controls,
) -> None:
    """Create the panel, closed, and connect its buttons and those at the top of the accordion.

    Args:
        files: the current result of `find_models`.
        status: the component with `accordion.status`, which the buttons update.
        model_lists: the components that list the FaceSnap files, which the buttons update as well.
        top: the components at the top of the accordion.
    """

    def refresh(error: str = "") -> tuple[Any, ...]:
        current = find_models()
        progress = problem(error) if error else progress_html(download.jobs())
        lists = [gr.update(choices=accordion.model_choices(current)) for _ in model_lists]
        above = starter.updates(current, progress)
        return progress, html(list_models(current), current), accordion.status(current), *lists, *above

    def hash_all() -> tuple[Any, ...]:
        try:
            compute_hashes(find_models())
        except FaceSnapError as error:
            return refresh(str(error))
        return refresh()

    def download_part(name: str) -> Callable[[], Iterator[tuple[Any, ...]]]:
        """A response to a click that downloads a part, or what `starter.bundle` names if the name is empty."""

        def run() -> Iterator[tuple[Any, ...]]:
            try:
                current = find_models()
                if not (bundle := name or starter.bundle(current)):  # the files have been copied in the meantime
                    yield refresh()
                    return
                job = download.start(bundle, current)
            except FaceSnapError as error:
                yield refresh(str(error))
                return
            while job.state == "running":
                progress = progress_html(download.jobs())
                unchanged = [gr.update() for _ in (table, status, *model_lists)]
                yield progress, *unchanged, *starter.running(progress)
                time.sleep(POLL_INTERVAL)
            yield refresh()

        return run

    def stop_all() -> None:
        for job in download.jobs():
            job.stop.set()

    with gr.Accordion("Model files", open=False, elem_id=ident("models")):
        table = gr.HTML(html(list_models(files), files), elem_id=ident("models_table"))
        progress = gr.HTML(elem_id=ident("models_progress"))
        outputs = [progress, table, status, *model_lists, *top.outputs]
        top.get.click(download_part(""), [], outputs, show_progress=False)
        top.pause.click(stop_all, [], [], queue=False)  # gradio's queue is busy with the download
        with gr.Row():
            gr.Button("Refresh", elem_id=ident("models_again")).click(refresh, [], outputs, show_progress=False)
            gr.Button("Compute hashes", elem_id=ident("models_hash")).click(hash_all, [], outputs)
            stop = gr.Button("Stop downloads", elem_id=ident("models_stop"))
            stop.click(stop_all, [], [], queue=False)
        with gr.Row():
            for part in (part for part in PARTS if part.url):
                text = f"Download {part.title} ({format_size(part.size)})"
                button = gr.Button(text, elem_id=ident(f"models_get_{part.name}"))
                button.click(download_part(part.name), [], outputs, show_progress=False)


def _role(role: Role) -> str:
    title = f"<b>{ROLE_LABELS[role.name]}</b>{'' if role.needed else ' (optional)'}<br>{escape(role.purpose)}"
    found = "".join(map(_model_file, role.found))
    if not found:
        found = problem("missing") if role.needed and role.missing else "none"
    return f"<tr><td>{title}</td><td>{found}</td><td>{''.join(map(_option, role.options))}</td></tr>"


def _model_file(model: ModelFile) -> str:
    lines = [escape(model.path if model.used else f"{model.path} (not used)"), escape(f"This is {model.kind}.")]
    for file in model.files:
        digest = (
            f", SHA-256 <code title='{escape(file.sha256)}'>{escape(file.sha256[:12])}…</code>" if file.sha256 else ""
        )
        verdict = f" ({escape(file.verdict)})" if file.verdict else ""
        lines.append(f"{escape(file.name)}: {format_size(file.size)}{digest}{verdict}")
    if model.licence:
        lines.append(f"Licence: {escape(model.licence)}")
    return f"<p>{'<br>'.join(lines)}</p>"


def _option(part: Part) -> str:
    link = f" (<a href='{escape(part.page)}' target='_blank' rel='noopener'>page</a>)" if part.page else ""
    note = f"<br>{escape(part.note)}" if part.note else ""
    return (
        f"<p><b>{escape(part.title)}</b>, {format_size(part.size)}: {escape(part.how_to_get)}{link}; save it as "
        f"<code>{escape(part.target)}</code><br>{escape(part.licence)}: {escape(part.use)}{note}</p>"
    )
