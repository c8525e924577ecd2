"""Fuzzing that is led by the code's coverage: `python -m tests.fuzz.guided NAME -runs=5000`.

NAME is that of a test in test_fuzz.py without `test_`; the options are atheris' own. It wants `pip install atheris`,
which there is for Linux and macOS alone.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["facesnap_ext"]):
    from tests.fuzz import test_fuzz

if __name__ == "__main__":
    target = getattr(test_fuzz, f"test_{sys.argv[1]}")
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.hypothesis.fuzz_one_input)
    atheris.Fuzz()
