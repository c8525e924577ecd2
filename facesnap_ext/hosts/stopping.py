"""How a job stops with a sentence on the page in every WebUI.

Usually an exception in the first UNet call does that; see `errors`. The page of reForge and Forge Classic does not show
the text of that exception. There, a job of the page ends without images instead, and the sentence is one of its
comments. Jobs of the API receive exceptions in every WebUI.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import fork
from facesnap_ext.hosts.errors import Refusal
from facesnap_ext.hosts.job import JobState, resume_saving, save_no_images, state_of


def hides_exceptions(p: Any) -> bool:
    """Whether the text of an exception in a job's sampling would not reach the user."""
    return not fork.current().shows_sampling_errors and not getattr(p, "is_api", False)


def end_without_images(p: Any) -> None:
    """End a refused job before its first image, if an exception would not reach the user. Call this in `process`."""
    if (refusal := state_of(p).refusal) is not None and hides_exceptions(p):
        p.comment(refusal.message)
        p.n_iter = 0


@contextmanager
def shown_errors(p: Any) -> Iterator[None]:
    """Make an expected error inside the `with` block, which runs during sampling, reach the user.

    Raises:
        BaseException: the host's own exception for interrupted jobs, if it would hide the error.
        FaceSnapError: the error itself otherwise.
    """
    try:
        yield
    except FaceSnapError as error:
        if p is None or not hides_exceptions(p):
            raise
        from modules import shared
        from modules.sd_samplers_common import InterruptedException

        p.comment(str(error))
        p.facesnap = JobState(refusal=Refusal(str(error)))
        resume_saving(p)
        save_no_images(p)  # what has been sampled so far is not wanted
        shared.state.interrupted = True
        raise InterruptedException from None


def drop_images(p: Any, processed: Any) -> None:
    """Remove the unfinished images of a job that `shown_errors` interrupted. Call this in `postprocess`."""
    if state_of(p).refusal is not None and hides_exceptions(p):
        resume_saving(p)
        processed.images.clear()
        processed.infotexts[1:] = []
