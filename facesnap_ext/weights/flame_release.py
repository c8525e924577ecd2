"""Which release of FLAME a file is, and whether DECA's codes fit it."""

from __future__ import annotations

import re
from pathlib import Path

from facesnap_ext.weights.tensors import read_index

ADVICE = "use FLAME 2020's generic_model.pkl (models/README.md says where to get it)."


def unfit_for_deca(path: Path) -> str:
    """Return why DECA's codes do not fit a FLAME model, in one sentence; empty if no reason is known.

    DECA's shape and expression codes are coefficients of FLAME 2020. FLAME 2023 has a different expression space, so
    the same coefficients produce different faces (github.com/yfeng95/DECA/issues/46,
    github.com/georgeretsi/smirk/issues/10). The tensors of both have the same shapes: only the name of the published
    file, which a converted file keeps in its metadata, tells them apart.

    Raises:
        FaceSnapError: a converted file cannot be read.
    """
    origin = read_index(path).metadata.get("source", "") if path.suffix == ".safetensors" else ""
    names = [Path(name).stem.lower() for name in (origin, path.name)]
    if any(re.search(r"no_?jaw", name) for name in names):
        return f"{path.name} is a FLAME model without a jaw, which cannot open the mouth; {ADVICE}"
    if any("flame" in name and "2023" in name for name in names):
        return f"{path.name} is FLAME 2023, but DECA's expressions are those of FLAME 2020; {ADVICE}"
    return ""
