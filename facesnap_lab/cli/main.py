"""The `facesnap` command line, with the extension's and the lab's commands."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from facesnap_ext.cli import main as extension
from facesnap_lab.cli import ablation, bench, dataset, demo, evaluate, gallery, plan, study, table1, train

COMMANDS: Mapping[str, extension.Command] = {
    **extension.COMMANDS,
    "demo": demo,
    "dataset": dataset,
    "train": train,
    "plan": plan,
    "evaluate": evaluate,
    "study": study,
    "ablation": ablation,
    "table1": table1,
    "bench": bench,
    "gallery": gallery,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    return extension.run(COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
