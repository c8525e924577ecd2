"""The page's panel of model files: what there is of every part, what is missing, and the buttons to get it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.ui import accordion as page
from facesnap_ext.weights import download
from facesnap_ext.weights.catalogue import COMMERCIAL_AVAILABLE, COMMERCIAL_GAPS, PARTS, TO_BEGIN, Part
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import ModelFile, Role, compute_hashes, format_size, list_models

ROLE_WORDS = {
    "facesnap": "FaceSnap",
    "face_pack": "Face pack",
    "clip": "CLIP-ViT-H",
    "deca": "DECA",
    "flame": "FLAME",
    "instantid": "InstantID",
}
EVERY = 0.5  # seconds between two looks at a download


def html(roles: Sequence[Role], files: ModelFiles) -> str:
    """HTML of everything that is known about the model files, as `list_models` found it."""
    rows = "".join(map(_role, roles))
    elsewhere = ", ".join(str(place) for place in files.elsewhere)
    also = f"Also looked at: {escape(elsewhere)}.<br>" if elsewhere else ""
    also += "Others, such as a ComfyUI's <code>models</code>: <code>--facesnap-also-look-in</code> FOLDER.<br>"
    begin = "" if files.facesnap else f"<p><b>{escape(TO_BEGIN)}</b></p>"
    passed_over = f"<p>Passed over: {escape(' '.join(files.passed_over))}</p>" if files.passed_over else ""
    gaps = "".join(f"<li>{escape(gap)}</li>" for gap in COMMERCIAL_GAPS)
    return (
        f"<div class='facesnap-models'>FaceSnap's own folder: {escape(str(files.folder))}.<br>{also}{begin}"
        f"<table><tr><th>Part</th><th>There is</th><th>To be had</th></tr>{rows}</table>{passed_over}"
        f"A set-up for commercial use has {escape(COMMERCIAL_AVAILABLE)}. It lacks:<ul>{gaps}</ul></div>"
    )


def progress_html(jobs: Sequence[download.Job]) -> str:
    """HTML of how far downloads are, and of what became of them."""
    lines = []
    for job in jobs:
        if job.state == "running":
            share = 100 * job.done / job.part.size
            text = f"{job.part.title}: {format_size(job.done)} of {format_size(job.part.size)} ({share:.0f} %)"
            lines.append(f"{escape(text)}<br><progress max='100' value='{share:.1f}'></progress>")
        else:
            lines.append(page.problem(job.message) if job.state == "failed" else escape(job.message))
    return "<br>".join(lines)


def panel(
    found: ModelFiles,
    find_models: Callable[[], ModelFiles],
    ident: Callable[[str], str],
    status: Any,
    choices: Sequence[Any],
) -> None:
    """Draw the panel, closed, and make its buttons answer.

    Args:
        found: what `find_models` has found when the page is drawn.
        ident: makes an element's id of a name.
        status, choices: what else on the page says which files are there: `page.status`, and lists of FaceSnap files.
    """

    def look(problem: str = "") -> tuple[Any, ...]:
        files = find_models()
        progress = page.problem(problem) if problem else progress_html(download.jobs())
        lists = [gr.update(choices=page.model_choices(files)) for _ in choices]
        return progress, html(list_models(files), files), page.status(files), *lists

    def hash_all() -> tuple[Any, ...]:
        try:
            compute_hashes(find_models())
        except FaceSnapError as error:
            return look(str(error))
        return look()

    def getting(name: str) -> Callable[[], Iterator[tuple[Any, ...]]]:
        def get() -> Iterator[tuple[Any, ...]]:
            try:
                job = download.start(name, find_models())
            except FaceSnapError as error:
                yield look(str(error))
                return
            while job.state == "running":
                yield progress_html(download.jobs()), *(gr.update() for _ in shown[1:])
                time.sleep(EVERY)
            yield look()

        return get

    def stop_all() -> None:
        for job in download.jobs():
            job.stop.set()

    with gr.Accordion("Model files", open=False, elem_id=ident("models")):
        table = gr.HTML(html(list_models(found), found), elem_id=ident("models_table"))
        progress = gr.HTML(elem_id=ident("models_progress"))
        shown = [progress, table, status, *choices]
        with gr.Row():
            gr.Button("Look again", elem_id=ident("models_again")).click(look, [], shown, show_progress=False)
            gr.Button("Compute hashes", elem_id=ident("models_hash")).click(hash_all, [], shown)
            stop = gr.Button("Stop downloads", elem_id=ident("models_stop"))
            stop.click(stop_all, [], [], queue=False)  # not behind the download in the queue
        with gr.Row():
            for part in (part for part in PARTS if part.url):
                text = f"Download {part.title} ({format_size(part.size)})"
                button = gr.Button(text, elem_id=ident(f"models_get_{part.name}"))
                button.click(getting(part.name), [], shown, show_progress=False)


def _role(role: Role) -> str:
    title = f"<b>{ROLE_WORDS[role.name]}</b>{'' if role.needed else ' (optional)'}<br>{escape(role.purpose)}"
    there = "".join(map(_holding, role.found))
    if not there:
        there = page.problem("missing") if role.needed and role.missing else "none"
    return f"<tr><td>{title}</td><td>{there}</td><td>{''.join(map(_way, role.options))}</td></tr>"


def _holding(holding: ModelFile) -> str:
    lines = [escape(holding.path if holding.used else f"{holding.path} (not used)"), escape(f"this is {holding.kind}")]
    for file in holding.files:
        digest = f", SHA-256 <code title='{file.sha256}'>{file.sha256[:12]}…</code>" if file.sha256 else ""
        verdict = f" ({escape(file.verdict)})" if file.verdict else ""
        lines.append(f"{escape(file.name)}: {format_size(file.size)}{digest}{verdict}")
    if holding.licence:
        lines.append(f"licence: {escape(holding.licence)}")
    return f"<p>{'<br>'.join(lines)}</p>"


def _way(part: Part) -> str:
    link = f" (<a href='{escape(part.page)}' target='_blank' rel='noopener'>page</a>)" if part.page else ""
    note = f"<br>{escape(part.note)}" if part.note else ""
    return (
        f"<p><b>{escape(part.title)}</b>, {format_size(part.size)}: {escape(part.how_to_get)}{link}; put it as "
        f"<code>{escape(part.target)}</code><br>{escape(part.licence)}: {part.use}{note}</p>"
    )
