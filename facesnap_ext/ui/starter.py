"""The top of the accordion in a new installation: what a first image still needs, and the button that downloads it."""

from __future__ import annotations

from html import escape

from facesnap_ext.ui.markup import action_button, data, wording
from facesnap_ext.weights.catalogue import Part, downloadable, title_of
from facesnap_ext.weights.instantid import RECOGNITION
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import existing_file, format_size


def bundle(files: ModelFiles) -> str:
    """The name of the bundle that completes an installation; empty if nothing in it is needed."""
    if not files.facesnap:
        return "instantid" if files.packs_with(RECOGNITION) else "starter"
    if files.face_pack is None:
        return "antelopev2"
    pairs = all(isinstance(source, tuple) for source in files.facesnap.values())
    any_pack = not pairs or (files.face_pack / RECOGNITION).is_file()  # no pack has to be read
    return "" if any_pack or files.packs_with(RECOGNITION) else "antelopev2"


def missing(files: ModelFiles) -> tuple[Part, ...]:
    """The parts that `bundle` still lacks. It may read the face model packs, so it is called once for each drawing."""
    if not (name := bundle(files)):
        return ()
    return tuple([part for part in downloadable(name) if existing_file(part, files) is None])


def label(parts: tuple[Part, ...]) -> str:
    """HTML of the button's label, such as "Download InstantID and antelopev2 (4.61 GB)"."""
    size = data(f"({format_size(sum(part.size for part in parts))})")
    return f"{wording(f'Download {title_of(parts)}')} {size}"


def html(files: ModelFiles, parts: tuple[Part, ...], running: bool = False) -> str:
    """HTML of one sentence, the button, and a list of what goes where and under which licence.

    Args:
        parts: the result of `missing`; the HTML is empty if nothing is missing.
        running: whether the parts are being downloaded, in which case the button pauses the download.
    """
    if not parts:
        return ""
    rows = "".join(
        f"<li>{wording(part.title)}: {data(format_size(part.size))}, {wording(part.licence)} ({wording(part.use)}); "
        f"{wording('saved as')} <code translate='no'>{escape(str(files.folder / part.target))}</code></li>"
        for part in parts
    )
    text, button = "Nothing is downloaded until you click.", action_button("get", label(parts), True)
    if running:
        text, button = "The files are being downloaded.", action_button("stop", wording("Pause the download"))
    needed = wording("FaceSnap needs these files before it can generate an image.")
    return (
        f"<div class='facesnap-starter'><div>{needed} {wording(text)}</div>"
        f"{button}<details><summary>Files to be downloaded, and their licences</summary>"
        f"<ul>{rows}</ul></details></div>"
    )
