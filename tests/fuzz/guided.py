"""Coverage-guided fuzzing: `python -m tests.fuzz.guided NAME -runs=5000`.

NAME is the name of a test in test_fuzz.py without `test_`. The options are those of atheris, which must be installed
(`pip install atheris`) and is available only for Linux and macOS.
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
