"""The networks whose features weights are trained with, and the metadata that identifies them by content hashes."""

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
"""The networks that metadata identifies: their names in `ModelFiles`, and their titles in messages."""


def parse_networks(text: str) -> dict[str, str]:
    """Parse the JSON metadata in which a file identifies networks.

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
