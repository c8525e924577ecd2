"""Argument types and output that several commands share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

DTYPES = ("float16", "bfloat16", "float32")


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    return _int(text, least=1)


def non_negative_int(text: str) -> int:
    """Parse an integer of at least 0."""
    return _int(text, least=0)


def _int(text: str, least: int) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return int(text)


def print_progress(message: str) -> None:
    """Print a message to stderr, so that stdout contains only the result."""
    print(message, file=sys.stderr)


def print_result(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result as JSON, or as one `key: value` line per entry."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
