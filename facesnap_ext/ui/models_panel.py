"""The panel of model files: one row for each part, with its state and one action.

The buttons are HTML. javascript/facesnap_models.js writes their action into one hidden text box, whose changes are
answered here. The progress of downloads is shown once at the top of the accordion, and copied into the rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.ui import accordion, starter
from facesnap_ext.ui.markup import action_button, data, english, hidden_text, mixed, problem, wording
from facesnap_ext.weights import download
from facesnap_ext.weights.catalogue import COMMERCIAL_AVAILABLE, COMMERCIAL_GAPS, PARTS, Part, owners
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import PHRASES, ModelFile, Role, compute_hashes, format_size, list_models
from facesnap_ext.weights.recognise import Kind

ROLE_LABELS = {  # in the order of the rows
    "instantid": "InstantID",
    "face_pack": "Face model pack",
    "facesnap": "FaceSnap file",
    "clip": "CLIP-ViT-H",
    "deca": "DECA",
    "flame": "FLAME",
    "mediapipe": "MediaPipe's landmarks",
    "image_classifier": "Image classifier",
}
OFFERS = {"instantid": "instantid", "face_pack": "antelopev2"}
"""The bundle that the button in a row downloads. The other rows link to the page of their first part."""
KINDS = (
    *(Kind.FACESNAP, Kind.SDXL_CONTROLNET, Kind.INSTANTID_ADAPTER, Kind.CLIP_VISION, Kind.DECA, Kind.DECA_ORIGINAL),
    *(Kind.FLAME, Kind.PICKLE, Kind.MEDIAPIPE, Kind.IMAGE_CLASSIFIER),
)
KIND_PHRASES = (*(kind.value for kind in KINDS), "a face model pack", "converted", "which must be converted")
"""The fixed wording in `ModelFile.kind`."""
POLL_INTERVAL = 0.5  # seconds between two updates of a download's progress


def html(roles: Sequence[Role], files: ModelFiles, needed: Sequence[Part] = ()) -> str:
    """HTML of the list of all parts, as returned by `list_models`, and of the folders that were searched.

    The page takes the choices of each person's FaceSnap file from it.

    Args:
        needed: the result of `starter.missing`.
    """
    order = list(ROLE_LABELS)
    offered = {part.role for part in needed}
    rows = "".join(_row(role, role.name in offered) for role in sorted(roles, key=lambda role: order.index(role.name)))
    elsewhere = ", ".join(str(folder) for folder in files.elsewhere)
    searched = f"{wording('Also searched:')} {data(elsewhere)}<br>" if elsewhere else ""
    passed_over = ""
    if files.passed_over:
        passed_over = f"<p>{wording('Skipped:')} {english(' '.join(files.passed_over))}</p>"
    gaps = "".join(f"<li>{escape(gap)}</li>" for gap in COMMERCIAL_GAPS)
    choices = escape(json.dumps({"model": sorted(files.facesnap)}), quote=True)
    buttons = action_button("refresh", "Refresh") + action_button("hash", "Compute hashes")
    return (
        f"<div class='facesnap-models' data-facesnap-lists='{choices}'>"
        f"<ul class='facesnap-rows'>{rows}</ul><div class='facesnap-tools'>{buttons}</div>"
        f"<details><summary>Folders, skipped files and commercial use</summary>{wording('Model folder:')} "
        f"{data(str(files.folder))}<br>{searched}"
        f"{wording('To search another folder, such as the ComfyUI folder, start the WebUI with:')} "
        f"<code translate='no'>--facesnap-also-look-in FOLDER</code>{passed_over}<p>"
        f"{wording('Available for commercial use:')} {wording(COMMERCIAL_AVAILABLE)}. {wording('Not available:')}</p>"
        f"<ul>{gaps}</ul></details></div>"
    )


def progress_html(jobs: Sequence[download.Job]) -> str:
    """HTML of the downloads: progress if running, outcome if finished."""
    lines = []
    for job in jobs:
        if job.state == "running":
            percent = 100 * job.done / job.size
            sizes = data(f"{format_size(job.done)} / {format_size(job.size)} ({percent:.0f} %)")
            text = f"<span data-facesnap-say='{escape(job.name, quote=True)}'>{_titles(job)}</span>: {sizes}"
            bar = f"<progress max='100' value='{percent:.1f}' aria-label='Download'></progress>"
            lines.append(f"<div data-facesnap-job='{escape(job.name, quote=True)}'>{text}<br>{bar}</div>")
        else:
            lines.append(f"<div data-facesnap-say='{job.state}'>{_outcome(job)}</div>")
    return "".join(lines)


def _titles(job: download.Job) -> str:
    """HTML of the title of a single part, or of what several parts belong to."""
    return wording(job.parts[0].title) if len(job.parts) == 1 else data(", ".join(owners(job.parts)))


def _outcome(job: download.Job) -> str:
    if job.state == "failed":
        return problem(job.message)
    if job.state == "done":
        return f"{wording('Downloaded:')} {_titles(job)}"
    sizes = data(f"{format_size(job.done)} / {format_size(job.size)}")
    resume = wording("Click the download button again to resume.")
    return f"{wording('Download paused:')} {_titles(job)}, {sizes}. {resume}"


def status_html(files: ModelFiles, needed: tuple[Part, ...]) -> str:
    """HTML of the part of the accordion above the people: the starter, as `starter.html` writes it."""
    return starter.html(files, needed, bool(needed) and any(_job(part) for part in needed))


def top(files: ModelFiles, needed: tuple[Part, ...], ident: accordion.Ident) -> list[Any]:
    """Create the components above the people, which `panel` connects: the starter, the progress of downloads, and the
    hidden text box with the action of a button."""
    return [
        gr.HTML(status_html(files, needed), elem_id=ident("starter")),
        gr.HTML(elem_id=ident("models_progress"), elem_classes="facesnap-report"),
        hidden_text(ident("models_action")),
    ]


def panel(
    files: ModelFiles,
    needed: tuple[Part, ...],
    find_models: Callable[[], ModelFiles],
    ident: accordion.Ident,
    status: Any,
    above: Sequence[Any],
) -> None:
    """Create the panel, closed, and connect its buttons and the button at the top of the accordion.

    Args:
        files: the current result of `find_models`.
        needed: the result of `starter.missing`.
        status: the component with `accordion.status`, which the buttons update.
        above: the result of `top`.
    """
    begin, progress, action = above

    def refresh(error: str = "", jobs: Sequence[download.Job] = ()) -> tuple[Any, ...]:
        """Draw everything again, with an error or else the progress or outcome of these downloads."""
        current = find_models()
        lacking = starter.missing(current)
        return (
            status_html(current, lacking),
            problem(error) if error else progress_html(jobs),
            html(list_models(current), current, lacking),
            accordion.status(current, lacking),
        )

    def act(text: str | None) -> Iterator[tuple[Any, ...]]:
        """Answer a click; see `parse_action`."""
        verb, name = parse_action(text)
        try:
            if verb == "get":
                get(name)
            elif verb == "hash":
                compute_hashes(find_models())
        except FaceSnapError as error:
            yield refresh(str(error))
            return
        jobs = (
            download.jobs() if verb in ("get", "stop") else [job for job in download.jobs() if job.state == "running"]
        )
        yield refresh(jobs=jobs)
        if any(job.state == "running" for job in jobs):
            yield from follow(jobs)

    def get(name: str) -> None:
        """Start downloading a part or bundle, or what `starter.bundle` names if the name is empty."""
        current = find_models()
        if bundle := name or starter.bundle(current):  # otherwise the files have been copied in the meantime
            download.start(bundle, current)

    def follow(jobs: Sequence[download.Job]) -> Iterator[tuple[Any, ...]]:
        """Show the progress of downloads until they have ended, and then draw everything again."""
        while any(job.state == "running" for job in jobs):
            time.sleep(POLL_INTERVAL)
            yield gr.update(), progress_html(jobs), gr.update(), gr.update()
        yield refresh(jobs=jobs)

    with gr.Accordion("Model files", open=False, elem_id=ident("models")):
        table = gr.HTML(html(list_models(files), files, needed), elem_id=ident("models_table"))
    action.change(stop, [action], [], queue=False)  # gradio's queue is busy with the download
    action.change(act, [action], [begin, progress, table, status], show_progress=False)


def stop(text: str | None) -> None:
    """Stop all downloads if that is the action."""
    if parse_action(text)[0] == "stop":
        for job in download.jobs():
            job.stop.set()


def parse_action(text: str | None) -> tuple[str, str]:
    """The verb ("get", "stop", "hash" or "refresh") and the name in an action of the page, such as "get antelopev2 3".

    The number at the end makes repeated actions differ from each other.
    """
    words = (text or "").split()
    return (words[0] if words else "", words[1] if len(words) > 2 else "")


def _row(role: Role, offered: bool) -> str:
    used = [model for model in role.found if model.used]
    needed = offered or (role.needed and not used)
    state = "needed" if needed else "installed" if used else "optional"
    files = "".join(map(_model_file, role.found))
    options = "".join(map(_option, role.options))
    summary = f"<b>{ROLE_LABELS[role.name]}</b> <span class='facesnap-badge' data-state='{state}'>{state}</span>"
    return (
        f"<li class='facesnap-row' data-state='{state}'><div><div>{summary}</div><div>{wording(role.purpose)}</div>"
        f"<div class='facesnap-meta'>{_size_and_licence(role, [] if needed else used)}</div></div>"
        f"<div class='facesnap-action'>{_action(role, bool(used) and not needed)}</div>"
        f"<details><summary>Files and sources</summary>{files}{options}</details></li>"
    )


def _size_and_licence(role: Role, used: Sequence[ModelFile]) -> str:
    """The size and licence of the files in use, or of the files that the row offers."""
    if used:
        licences = dict.fromkeys(_licence(model) for model in used)
        size = sum(file.size for model in used for file in model.files)
        return f"{data(format_size(size))}, {'; '.join(licences)}"
    parts = _offer(role)
    if not parts[0].page:
        return wording(parts[0].how_to_get)
    size = sum(part.size for part in parts)
    return f"{data(format_size(size))}, {wording(parts[0].licence)} ({wording(parts[0].use)})"


def _licence(model: ModelFile) -> str:
    known = {text for part in PARTS for text in (part.licence, part.use)}
    return mixed(model.licence, {*known, *PHRASES}) if model.licence else wording("licence unknown")


def _offer(role: Role) -> list[Part]:
    """The parts that the row's button downloads, or the one that its link leads to."""
    return [part for part in role.options if part.url and role.name in OFFERS] or list(role.options[:1])


def _job(part: Part) -> download.Job | None:
    """The last download of a part if it is running."""
    return next((job for job in download.jobs() if job.state == "running" and part in job.parts), None)


def _action(role: Role, installed: bool) -> str:
    parts = _offer(role)
    if job := next(filter(None, map(_job, parts)), None):
        return f"<div data-facesnap-progress='{escape(job.name, quote=True)}'></div>{action_button('stop', 'Pause')}"
    if installed or not parts[0].page:
        return ""
    if role.name in OFFERS:
        text = "Download antelopev2" if role.name == "face_pack" else "Download"
        return action_button(f"get {OFFERS[role.name]}", text)
    page = escape(parts[0].page, quote=True)
    title = f"<span class='facesnap-read'>{escape(parts[0].title)}</span>"
    return f"<a href='{page}' target='_blank' rel='noopener'>{wording('Get it')} {title}</a>"


def _model_file(model: ModelFile) -> str:
    use = "" if model.used else f" ({wording('not used')})"
    lines = [data(model.path) + use, f"{wording('Kind:')} {mixed(model.kind, KIND_PHRASES)}"]
    for file in model.files:
        digest = f", <code translate='no'>SHA-256 {escape(file.sha256[:12])}…</code>" if file.sha256 else ""
        verdict = f" ({mixed(file.verdict, PHRASES)})" if file.verdict else ""
        lines.append(f"{data(f'{file.name}: {format_size(file.size)}')}{digest}{verdict}")
    if model.licence:
        lines.append(f"{wording('Licence:')} {_licence(model)}")
    return f"<p>{'<br>'.join(lines)}</p>"


def _option(part: Part) -> str:
    link = f" (<a href='{escape(part.page)}' target='_blank' rel='noopener'>page</a>)" if part.page else ""
    note = f"<br>{wording(part.note)}" if part.note else ""
    return (
        f"<p><b>{escape(part.title)}</b>, {data(format_size(part.size))}: {wording(part.how_to_get)}{link}; "
        f"{wording('save it as')} <code translate='no'>{escape(part.target)}</code><br>{wording(part.licence)}: "
        f"{wording(part.use)}{note}</p>"
    )
