"""The running WebUI: which one it is, and what FaceSnap can rely on in it.

AUTOMATIC1111, Forge and Forge's forks share their API, their page and most module names, but differ in how they report
errors and manage memory. Everything here is derived from the host's own modules and files, not from its folder's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Fork:
    """A WebUI and its capabilities.

    Attributes:
        name: the project's name.
        version: as the host states it; empty if unknown.
        commit: the first digits of the git commit; empty if the folder is not a git repository.
        gradio: version of gradio; empty if it is not installed.
        shows_sampling_errors: whether the page shows the text of an exception in sampling. If not, it shows an
            unrelated `TypeError`.
        shows_comments: whether the page shows the comments of a job.
        loads_partially: whether the host can leave a part of a network on the CPU.
    """

    name: str
    version: str = ""
    commit: str = ""
    gradio: str = ""
    shows_sampling_errors: bool = True
    shows_comments: bool = True
    loads_partially: bool = False

    @property
    def title(self) -> str:
        """Name, version and commit, for messages."""
        parts = (self.name, self.version, f"({self.commit})" if self.commit else "")
        return " ".join(part for part in parts if part)


def require_supported() -> None:
    """Check the running WebUI before any of its modules is imported that other WebUIs do not have.

    Raises:
        ImportError: it lacks the callback through which FaceSnap reaches the UNet.
    """
    if _exists("modules.processing_diffusers"):
        raise ImportError(
            "FaceSnap cannot run in SD.Next, whose diffusers pipelines have no hook for the UNet; use AUTOMATIC1111 "
            "1.10 or later, Forge, Forge Neo or reForge."
        )
    from modules import scripts

    if not hasattr(scripts.Script, "process_before_every_sampling"):  # otherwise residuals are never added
        raise ImportError("FaceSnap needs AUTOMATIC1111 1.10 or later, or Forge or one of its forks; update the WebUI.")


@lru_cache(maxsize=1)
def current() -> Fork:
    """The running WebUI."""
    name, release = _identify()
    main_thread = _imported("modules_forge.main_thread")
    processing = _imported("modules.processing")
    job = getattr(processing, "StableDiffusionProcessing", None)
    return Fork(
        name,
        release,
        _commit(),
        _gradio(),
        # Forge runs jobs in another thread, and newer versions pass the exception on
        shows_sampling_errors=main_thread is None or hasattr(main_thread, "last_exception"),
        shows_comments=job is None or hasattr(job, "comment"),
        loads_partially=_exists("modules_forge"),
    )


def _identify() -> tuple[str, str]:
    """The name and the version of the running WebUI."""
    if not _exists("modules_forge"):
        tag = _called("modules.launch_utils", "git_tag")
        return "AUTOMATIC1111", "" if tag == "<none>" else tag.removeprefix("v")
    stated = _imported("modules_forge.forge_version")
    written = str(getattr(stated, "version", ""))
    release = str(getattr(stated, "release", ""))
    if "neo" in written:
        return "Forge Neo", release
    if "classic" in written:
        return "Forge Classic", release
    if "ersatz" in written:
        return "ersatzForge", release
    if _exists("ldm_patched") and not _exists("backend"):
        return "reForge", written
    # reForge's branch with Forge's backend states Forge's version, and calls itself reForge2 in its README
    root = _root()
    own = root is not None and any((root / "extensions-builtin").glob("reForge-*"))
    return "reForge2" if own else "Forge", written


def _called(module: str, function: str) -> str:
    found = getattr(_imported(module), function, None)
    try:
        return str(found()) if found is not None else ""
    except Exception:  # git is missing, for example
        return ""


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _imported(module: str) -> ModuleType | None:
    return import_module(module) if _exists(module) else None


def _gradio() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return ""


def _root() -> Path | None:
    """The WebUI's folder; None if there is no WebUI."""
    spec = find_spec("modules") if _exists("modules") else None
    places = list(getattr(spec, "submodule_search_locations", None) or ())
    return Path(places[0]).parent if places else None


def _commit() -> str:
    """The checked out commit, read from git's files, because running git takes longer and may be impossible."""
    if (root := _root()) is None:
        return ""
    git = root / ".git"
    try:
        head = (git / "HEAD").read_text("utf-8").strip()
        if head.startswith("ref: "):
            reference = head.removeprefix("ref: ")
            loose = git / reference
            packed = git / "packed-refs"
            head = loose.read_text("utf-8") if loose.is_file() else _packed(packed.read_text("utf-8"), reference)
    except (OSError, UnicodeDecodeError):
        return ""
    return head[:8] if re.fullmatch(r"[0-9a-f]{40,64}\s*", head) else ""


def _packed(text: str, reference: str) -> str:
    """A reference's commit in git's `packed-refs`; empty if it is not in there."""
    return next((line.split()[0] for line in text.splitlines() if line.endswith(f" {reference}")), "")
