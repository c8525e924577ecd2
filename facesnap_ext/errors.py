"""The one error that FaceSnap shows to people."""

from __future__ import annotations


class FaceSnapError(Exception):
    """What went wrong, with which file or photo, and what to do, in one sentence for the user."""
