"""As much of a WebUI's modules as `scripts/facesnap.py` touches, and of gradio."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace


class Component:
    def __init__(self, *args, **values):
        self.args, self.values = args, values

    def change(self, *args, **values):
        pass

    click = change


class PasteField(tuple):
    def __new__(cls, component, target, *, api=None):
        return super().__new__(cls, (component, target))


def install(models: Path) -> SimpleNamespace:
    """Put the modules into `sys.modules`; returns what the script leaves in them."""
    seen = SimpleNamespace(denoiser_callbacks=[], state=SimpleNamespace(textinfo=None), opts=SimpleNamespace())

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

    names = (
        "Button",
        "Checkbox",
        "Dropdown",
        "File",
        "Gallery",
        "HTML",
        "Image",
        "Number",
        "Radio",
        "Slider",
        "Textbox",
    )
    containers = ("Accordion", "Column", "Row", "Tab")
    module("gradio", **dict.fromkeys(names, Component), **dict.fromkeys(containers, container), update=dict)
    module("modules")
    module("modules.paths", models_path=str(models), data_path=str(models))
    module("modules.infotext_utils", PasteField=PasteField)
    others = ("on_ui_settings", "on_before_ui", "on_app_started")
    callbacks = {name: lambda callback: None for name in others}
    module("modules.script_callbacks", on_cfg_denoiser=seen.denoiser_callbacks.append, **callbacks)
    script = type("Script", (), {"elem_id": lambda self, name: name})
    module("modules.scripts", Script=script, AlwaysVisible="always", scripts_data=[])
    module("modules.shared", state=seen.state, opts=seen.opts, cmd_opts=SimpleNamespace(api_auth=None))
    module("modules.sd_unet", current_unet=None)
    module("modules.ui_components", InputAccordion=container)
    return seen
