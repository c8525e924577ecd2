"""How residuals are added to each host's UNet.

A WebUI's adapter is a module with `check(p, people)`, `attach(p, people)`, `refuse(p, refusal)`, `detach(p)` and
`on_cfg_denoiser(params)`.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType


def current() -> ModuleType:
    """The adapter of the running WebUI."""
    from facesnap_ext.hosts import a1111, forge

    return forge if find_spec("modules_forge") else a1111
