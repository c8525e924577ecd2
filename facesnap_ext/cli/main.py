"""The `facesnap` command line, with the commands that only need the extension."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from facesnap_ext.cli import compress, convert, identity, init, models, prepare
from facesnap_ext.errors import FaceSnapError


class Command(Protocol):
    """A module that implements one command. Importing it must not import torch."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Define the command's arguments."""

    def run(self, options: argparse.Namespace) -> None:
        """Run the command; raise `FaceSnapError` for an error that the user can act on."""


COMMANDS: Mapping[str, Command] = {
    "models": models,
    "convert": convert,
    "prepare": prepare,
    "identity": identity,
    "init": init,
    "compress": compress,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the extension's commands and return the exit code."""
    return run(COMMANDS, arguments)


def run(commands: Mapping[str, Command], arguments: Sequence[str] | None = None) -> int:
    """Run one of `commands` and return the exit code. A `FaceSnapError` becomes one line on stderr and exit code 1."""
    options = _parser(commands).parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # on Windows, a redirected stdout cannot encode every character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options.run(options)
    except FaceSnapError as error:
        print(f"facesnap: {error}", file=sys.stderr)
        return 1
    return 0


def _parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="facesnap", description="Portraits of a person from one photo, on any SDXL checkpoint."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in commands.items():
        description = f"{command.HELP[0].upper()}{command.HELP[1:]}."
        subparser = subparsers.add_parser(name, help=command.HELP, description=description)
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
