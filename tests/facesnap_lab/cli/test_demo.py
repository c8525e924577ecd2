"""`facesnap demo` shows every stage in one image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers", reason="the miniature is sampled with diffusers")

from facesnap_lab.cli.main import main


def test_demo_shows_every_stage_in_one_image(tmp_path, capsys):
    out = tmp_path / "deep" / "demo.png"
    assert main(["demo", "--out", str(out)]) == 0
    stages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert [line[:5] for line in stages] == [f"[{i}/7]" for i in range(1, 8)]
    image = np.asarray(Image.open(out))
    panels = image[64:, 20:]
    background = image[5, 5]
    cells = [panels[i * 322 : i * 322 + 256, j * 276 : j * 276 + 256] for i in range(3) for j in range(5)]
    filled = [(cell != background).any(axis=2).mean() > 0.99 for cell in cells]
    assert filled == [True] * 15
    without, *with_facesnap = cells[10:]
    assert all((without != cell).mean() > 0.1 for cell in with_facesnap)
