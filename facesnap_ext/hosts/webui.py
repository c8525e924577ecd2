"""Features common to all WebUIs: one engine per process, progress, comments, and processing of finished images."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from facesnap_ext.engine import Engine
from facesnap_ext.hosts import redraw
from facesnap_ext.hosts.job import PreparedBatch
from facesnap_ext.hosts.windows import through_window
from facesnap_ext.networks import compiled
from facesnap_ext.settings.infotext import MARK
from facesnap_ext.weights.model_files import ModelFiles

_engine: Engine | None = None


def shared_engine(find_models: Callable[[], ModelFiles]) -> Engine:
    """The engine that jobs, page and routes of this process share."""
    global _engine
    _engine = _engine or Engine(find_models)
    return _engine


def progress(*parts: str) -> None:
    """Show the current activity on the page."""
    from modules import shared

    shared.state.textinfo = "".join(["FaceSnap: ", *parts])


def forget_infotext(p: Any) -> None:
    """Remove FaceSnap's parameters of another cell: the cells of an X/Y/Z plot share their parameters."""
    params = p.extra_generation_params
    p.extra_generation_params = {name: value for name, value in params.items() if not name.startswith(MARK)}


def comment_on_compiling(p: Any, batch: PreparedBatch) -> None:
    """Add a comment to the image if FFRNet should have been compiled but could not be."""
    if compiled.failure is not None and any(prepared.conditioning.compile for prepared in batch.people):
        p.comment(f"FaceSnap: {compiled.failure}")


def redraw_small_faces(p: Any, batch: PreparedBatch, image: Any, host: ModuleType, engine: Engine) -> Any:
    """A finished image in which small faces are redrawn, for people whose settings request it; see `redraw.redraw`."""
    if not any(batch.redraw_strengths):
        return image
    last_was_second = bool(getattr(p, "enable_hr", False))
    shown = batch.of_image(getattr(p, "batch_index", 0))
    people = through_window(p, shown, shown.people, last_was_second)
    find = engine.encoders(engine.files()).faces
    return redraw.redraw(p, image, people, batch.redraw_strengths, find, host)
