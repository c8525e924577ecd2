"""The networks whose features meet weights, and the metadata in which files name them by content hashes."""

from __future__ import annotations

import json
import re
from typing import Any

TITLES = {
    "face_pack": "face recognition model",
    "clip": "CLIP image encoder",
    "deca": "DECA encoder",
    "flame": "FLAME head model",
}
"""The networks that are named, by their names in `ModelFiles`, and their names in messages."""


def parse_networks(text: str) -> dict[str, str]:
    """Parse the metadata in which a file names networks, as JSON.

    Raises:
        ValueError: it does not map parts to hashes.
    """
    try:
        networks: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError("the networks are nested too deeply") from error
    if not isinstance(networks, dict) or not set(networks) <= set(TITLES):
        raise ValueError("the networks are not named by part")
    if not all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in networks.values()):
        raise ValueError("the networks are not identified by hashes")
    return networks
