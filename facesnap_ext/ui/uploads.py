"""Photos that the user uploads to the page.

Gradio 3 opens any path that a client names, and both versions read all files before FaceSnap can count them. The
component therefore passes on only the paths of uploaded files, and a client cannot name any other file on the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import NamedFile, file_title


def photo_files(label: str, elem_id: str, **options: Any) -> Any:
    """Create a component for several photos that accepts only uploads. `options` are those of `gr.File`."""
    import gradio as gr

    return accept_only_uploads(
        gr.File(
            label=label,
            file_count="multiple",
            file_types=["image"],
            type="binary",
            height=120,
            elem_id=elem_id,
            **options,
        )
    )


def accept_only_uploads(component: Any) -> Any:
    """Make a `gr.File` for several files pass a list of `NamedFile` to its callbacks, and return it.

    gradio 4 makes a new component of the same class after an update, so the class changes and not only the instance.
    It keeps the name, by which the page knows the component. The metaclass is bypassed, because gradio's writes a file
    beside the source of every new class.
    """
    folder = getattr(component, "GRADIO_CACHE", None) or component.DEFAULT_TEMP_DIR  # gradio 4, gradio 3
    base = type(component)
    attributes = {"preprocess": lambda self, payload: uploads(payload, Path(folder)), "__module__": base.__module__}
    component.__class__ = type.__new__(type(base), base.__name__, (base,), attributes)
    return component


def uploads(payload: Any, folder: Path) -> list[NamedFile]:
    """Return the files that a client sends.

    Args:
        payload: the names of the files as gradio passes them: dictionaries in gradio 3, objects in gradio 4.
        folder: where gradio keeps uploaded files.
    """
    files = getattr(payload, "root", payload) or []
    return [
        _upload(file, folder, number) for number, file in enumerate(files if isinstance(files, list) else [files], 1)
    ]


def _upload(file: Any, folder: Path, number: int) -> NamedFile:
    values = file if isinstance(file, dict) else getattr(file, "__dict__", {})
    data, path = values.get("data"), values.get("path") or values.get("name")
    name = file_title(values.get("orig_name")) or file_title(path)
    if isinstance(data, str) and not values.get("is_file"):  # gradio 3 may send a small file instead of its path
        return NamedFile(data, name)
    try:
        resolved = Path(path).resolve()  # type: ignore[arg-type]
        if resolved.is_relative_to(folder.resolve()) and resolved.is_file():
            return NamedFile(resolved, name)
    except (OSError, RuntimeError, TypeError, ValueError):  # the name is a loop of links, not text, or not a path
        pass
    title = name or f"Photo {number}"
    return NamedFile(
        FaceSnapError(f"{title} has not been uploaded to this page, or has been deleted; upload it again."), name
    )
