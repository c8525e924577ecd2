"""A weight file is read in parts, and as a whole."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import tensors
from facesnap_ext.weights.tensors import read_tensors

COUNT, NUMBERS = 24, 2**19  # tensors of 1 MB


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "OPENED_FOR", 4)
    path = tmp_path / "weights.safetensors"
    save_file({f"part{i:02d}": torch.full((NUMBERS,), i, dtype=torch.float16) for i in range(COUNT)}, path)
    return path


def mapped_pages() -> int:
    """Pages of files in this process's memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssFile:\s+(\d+)", status)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is mapped from files")
def test_a_file_that_is_converted_is_not_kept_in_memory_beside_its_copy(file, monkeypatch):
    read_tensors(file, dtype=torch.bfloat16)  # loads torch's own code
    check, seen = tensors.is_finite, []
    monkeypatch.setattr(tensors, "is_finite", lambda tensor: seen.append(mapped_pages()) or check(tensor))
    found = read_tensors(file, dtype=torch.bfloat16)
    assert max(seen) - seen[0] < 6 * 2**20
    for i in range(COUNT):
        assert found[f"part{i:02d}"].dtype is torch.bfloat16
        assert (found[f"part{i:02d}"] == i).all()


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(file, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({f"part{i:02d}": torch.ones(NUMBERS, dtype=torch.float16) for i in range(COUNT)}, other)

    def rename(key: str) -> str:
        if key == f"part{COUNT - 1}" and other.exists():
            other.replace(file)
        return key

    with pytest.raises(FaceSnapError, match=r"weights\.safetensors was replaced while it was being read; try again"):
        read_tensors(file, rename)
    assert (read_tensors(file)["part00"] == 1).all()
