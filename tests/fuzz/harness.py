"""What all fuzz tests share: their settings, the model folder that they write to, and what a message must look like."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import facesnap_file, identity_file
from facesnap_ext.weights.search import find_models
from facesnap_ext.weights.tensors import fingerprint, read_index, read_tensors
from tests.fuzz import corpus

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # per test; 0 uses the fixed examples
MEMORY = 2**30  # bytes by which a test may raise the peak memory of the process


def sample(fixed: int = 60, share: float = 1.0) -> settings:
    """Return the settings of a fuzz test.

    Args:
        fixed: number of fixed examples, which `make test` uses.
        share: number of new examples relative to the other tests, for tests whose examples are slow.
    """
    return settings(
        max_examples=int(EXAMPLES * share) or fixed,
        derandomize=not EXAMPLES,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


fuzz = sample()


def refused(read: Callable[..., Any], *arguments: Any) -> str | None:
    """The message with which an input was refused, or None if it was read."""
    try:
        read(*arguments)
    except FaceSnapError as error:
        check_sentence(error)
        return str(error)
    return None


def check_sentence(error: Exception | str) -> None:
    """Check that a message is for users: a single line, of limited length, without a traceback."""
    text = str(error)
    assert text.strip()
    assert text.endswith((".", "!"))
    assert "\n" not in text
    assert len(text) < 2000
    assert "Traceback" not in text


@cache
def folder() -> Path:
    """The model folder, the only place that may be written to."""
    path = new_folder()
    (path / "identities").mkdir()
    for content in corpus.weights():  # initialise the libraries before their actions are audited
        (path / "valid.safetensors").write_bytes(content)
        read_all(path / "valid.safetensors")
    return path


def new_folder() -> Path:
    """Return a new folder, which is deleted when the process ends."""
    path = Path(tempfile.mkdtemp(prefix="facesnap-fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def read_all(path: Path) -> None:
    """Read a weight file in all ways in which FaceSnap reads files in its model folder."""
    find_models(path.parent)
    for read in (read_index, fingerprint, read_tensors, facesnap_file.load, identity_file.load):
        refusal = refused(read, path)
        assert refusal is None or path.name in refusal
