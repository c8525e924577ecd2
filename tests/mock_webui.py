"""As much of a WebUI's modules as `scripts/facesnap.py` touches, and of gradio."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace


class Component:
    def __init__(self, *args, **values):
        self.args, self.values = args, values


def install(models: Path) -> SimpleNamespace:
    """Put the modules into `sys.modules`; returns what the script leaves in them."""
    seen = SimpleNamespace(denoiser_callbacks=[], state=SimpleNamespace(textinfo=None))

    def module(name: str, **attributes) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(attributes)
        sys.modules[name] = made
        if "." in name:
            setattr(sys.modules[name.rsplit(".", 1)[0]], name.rsplit(".", 1)[1], made)
        return made

    @contextmanager
    def container(*args, **values):
        yield Component(*args, **values)

    module("gradio", **dict.fromkeys(("Image", "File", "Slider", "Dropdown"), Component), Row=container)
    module("modules")
    module("modules.paths", models_path=str(models))
    module("modules.script_callbacks", on_cfg_denoiser=seen.denoiser_callbacks.append)
    module("modules.scripts", Script=type("Script", (), {"elem_id": lambda self, name: name}), AlwaysVisible="always")
    module("modules.shared", state=seen.state)
    module("modules.sd_unet", current_unet=None)
    module("modules.ui_components", InputAccordion=container)
    return seen
