"""The folder of saved identities, in the model folder: its path and its contents."""

from __future__ import annotations

from pathlib import Path

from facesnap_ext.errors import FaceSnapError, printable
from facesnap_ext.files import state_of
from facesnap_ext.weights.recognise import Kind, recognise_cached

FOLDER_NAME = "identities"


def identity_folder(models: Path) -> Path:
    """Return the folder of saved identities."""
    return models / FOLDER_NAME


def find_identities(models: Path) -> dict[str, Path]:
    """Return the identity files of the model folder by name: their file names without `.safetensors`."""
    paths = [
        path for path in sorted(identity_folder(models).glob("*.safetensors")) if printable(path.stem) == path.stem
    ]
    return {path.stem: path for path in paths if _is_identity(path)}


def choose_identity(models: Path, name: str) -> Path:
    """Return the identity file of this name.

    The name is looked up among the existing files and never becomes part of a path.

    Raises:
        FaceSnapError: there is no such identity.
    """
    path = {path.stem: path for path in identity_folder(models).glob("*.safetensors")}.get(name)
    if path is None:
        names = ", ".join(find_identities(models))
        advice = f"choose one of {names}" if names else "save one first"
        raise FaceSnapError(f"There is no identity named {name!r} in {identity_folder(models)}; {advice}.")
    return path


def _is_identity(path: Path) -> bool:
    try:
        return recognise_cached(path, state_of(path)) is Kind.IDENTITY
    except OSError:  # a damaged file is reported when it is chosen by name
        return False
