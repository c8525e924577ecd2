"""How an error reaches the browser.

Hosts swallow the exceptions of scripts and would continue with an image of a different person. A job that must stop is
therefore *refused*: the refusal is kept with the job, and raised in the first UNet call, where hosts do show errors. A
job that continues without FaceSnap, or without it in some UNet calls, reports that on the page and in infotext.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.settings.infotext import STOPPED


@dataclass(frozen=True)
class Refusal:
    """Why a job must stop.

    It only holds the message. An exception's traceback would keep the whole job alive, whereas hooks are removed when
    their job is deleted.
    """

    message: str

    def error(self) -> FaceSnapError:
        """The error to raise in the UNet call."""
        return FaceSnapError(self.message)


def refusal_of(error: Exception) -> Refusal:
    """The refusal for an expected or unexpected error in one of FaceSnap's callbacks."""
    if isinstance(error, FaceSnapError):
        return Refusal(str(error))
    return Refusal(f"FaceSnap failed: {error!r}; please report it with the details in the console.")


def report_stop(p: Any, where: str, sentence: str) -> None:
    """Report that FaceSnap is not active in a part of a job: on the page, and in infotext, which the API returns.

    Args:
        where: a short name of that part, such as "refiner".
    """
    p.comment(sentence)
    forget_stop(p, where)
    others = p.extra_generation_params.get(STOPPED)
    p.extra_generation_params[STOPPED] = f"{others}; {where}" if others else where


def forget_stop(p: Any, where: str) -> None:
    """Remove what `report_stop` wrote into the infotext of earlier images."""
    parts = p.extra_generation_params.pop(STOPPED, "").split("; ")
    if others := [part for part in parts if part not in ("", where)]:
        p.extra_generation_params[STOPPED] = "; ".join(others)
