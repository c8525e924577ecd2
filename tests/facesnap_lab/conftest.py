"""What tests of several parts of the lab share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, start.safetensors, clip, pack and shards/*.tar; see `make_world`."""
    from tests.support.training_world import make_world  # imported here, because it needs packages that may be missing

    return make_world(tmp_path_factory.mktemp("world"))
