"""Fetch what the tests need besides Python packages: a Chromium and a small face network. `make test` runs this.

python -m tests.support.prepare_machine
"""

from __future__ import annotations

from tests.support import real_models
from tests.support.chromium import install_chromium

if __name__ == "__main__":
    install_chromium()
    try:
        real_models.centerface()
        real_models.face_embedding()
    except real_models.Unavailable as reason:
        raise SystemExit(f"The tests need a network that is not here: {reason}.") from None
