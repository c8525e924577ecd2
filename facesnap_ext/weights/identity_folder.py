"""The folder of saved identities, in the model folder: its path and its contents."""

from __future__ import annotations

from pathlib import Path

from facesnap_ext.errors import FaceSnapError, printable, reason_of
from facesnap_ext.files import state_of, user_delete
from facesnap_ext.weights.identity_file import safe_name
from facesnap_ext.weights.recognise import Kind, recognise_cached, require

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


def rename_identity(models: Path, name: str, new_name: str) -> Path:
    """Rename a saved identity. The file's content does not change, so the person stays the same.

    Returns:
        The renamed file.

    Raises:
        FaceSnapError: there is no such identity, the new name cannot be used or belongs to a different one, or the file
            cannot be renamed.
    """
    path = choose_identity(models, name)
    require(path, Kind.IDENTITY, "it is not renamed.")
    target = path.with_name(f"{safe_name(new_name)}.safetensors")
    if target.exists() and not target.samefile(path):  # on some systems, upper and lower case are the same file
        raise FaceSnapError(f"There is already an identity named {target.stem}; choose a different name.")
    try:
        return path.rename(target)
    except OSError as error:
        raise FaceSnapError(
            f"{path} cannot be renamed ({reason_of(error)}); check your write permission for the folder."
        ) from error


def delete_identity(models: Path, name: str) -> Path:
    """Delete the file of a saved identity and return its path.

    Raises:
        FaceSnapError: there is no such identity, or the file cannot be deleted.
    """
    path = choose_identity(models, name)
    require(path, Kind.IDENTITY, "it is not deleted.")
    user_delete(path)
    return path


def _is_identity(path: Path) -> bool:
    try:
        return recognise_cached(path, state_of(path)) is Kind.IDENTITY
    except OSError:  # a damaged file is reported when it is chosen by name
        return False
