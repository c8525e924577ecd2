"""Coverage-guided fuzzing: `python -m tests.fuzz.guided NAME -runs=5000`.

NAME is the name of a test in a module of this folder without `test_`; those that need a fixture are left out. The
options are those of atheris, which must be installed (`pip install atheris`) and is available only for Linux and macOS.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["facesnap_ext"]):
    from tests.fuzz import test_fuzz, test_fuzz_face_packs, test_fuzz_numbers, test_fuzz_requests

MODULES = (test_fuzz, test_fuzz_face_packs, test_fuzz_numbers, test_fuzz_requests)

if __name__ == "__main__":
    name = f"test_{sys.argv[1]}"
    target = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.hypothesis.fuzz_one_input)
    atheris.Fuzz()
