"""How an error reaches the browser.

Hosts swallow the exceptions of scripts and would continue with an image of a different person. A job that must stop is
therefore *refused*: the refusal is kept with the job, and raised in the first UNet call, where hosts do show errors.
"""

from __future__ import annotations

from dataclasses import dataclass

from facesnap_ext.errors import FaceSnapError


@dataclass(frozen=True)
class Refusal:
    """Why a job must stop.

    It only holds the sentence. An exception's traceback would keep the whole job alive, whereas hooks are removed when
    their job is deleted.
    """

    message: str

    def error(self) -> FaceSnapError:
        """The error to raise in the UNet call."""
        return FaceSnapError(self.message)


def refusal_of(error: Exception) -> Refusal:
    """The refusal for an error in one of our callbacks, expected or not."""
    if isinstance(error, FaceSnapError):
        return Refusal(str(error))
    return Refusal(f"FaceSnap failed: {error!r}; the console has the details, please report them.")
