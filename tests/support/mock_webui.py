"""Mocks of the parts of a WebUI's modules and of gradio that `scripts/facesnap.py` uses."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tests.support import mock_processing

SCRIPT = Path(__file__).parents[2] / "scripts" / "facesnap.py"
CALLBACKS = (
    *("before_process", "process", "process_batch", "process_before_every_sampling", "post_sample"),
    *("postprocess_image", "postprocess_image_after_composite", "postprocess"),
)


def do_nothing(self, *args, **values) -> None:
    """The host's default for each callback."""


class Component:
    def __init__(self, *args, **values):
        self.args, self.values, self.listeners = args, values, []

    def change(self, function, inputs, outputs, **values):
        self.listeners.append((function, inputs, outputs))

    click = input = change
    DEFAULT_TEMP_DIR = "/tmp/gradio"


class PasteField(tuple):
    def __new__(cls, component, target, *, api=None):
        return super().__new__(cls, (component, target))


def install(models: Path) -> SimpleNamespace:
    """Put the mocks into `sys.modules`. Return the state that they share with the script."""
    state = SimpleNamespace(textinfo=None, job="", job_no=0, job_count=-1, interrupted=False, skipped=False)
    cmd_opts = SimpleNamespace(api_auth=None, no_prompt_history=False)
    seen = SimpleNamespace(denoiser_callbacks=[], state=state, opts=SimpleNamespace(), cmd_opts=cmd_opts)
    mock_processing.install(seen)

    def module(name: str, **attributes) -> ModuleType:
        mock = ModuleType(name)
        mock.__dict__.update(attributes)
        sys.modules[name] = mock
        if "." in name:
            setattr(sys.modules[name.rsplit(".", 1)[0]], name.rsplit(".", 1)[1], mock)
        return mock

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
    script = type("Script", (), {"elem_id": lambda self, name: name, **dict.fromkeys(CALLBACKS, do_nothing)})
    module("modules.scripts", Script=script, AlwaysVisible="always", scripts_data=[])
    module("modules.shared", state=seen.state, opts=seen.opts, cmd_opts=cmd_opts)
    module("modules.sd_unet", current_unet=None)
    merge = lambda model, ratio: setattr(model, "applied_token_merged_ratio", ratio)  # noqa: E731
    module("modules.sd_models", apply_token_merging=merge)
    img2img = mock_processing.Img2Img
    processing = mock_processing.process_images
    module("modules.processing", process_images=processing, StableDiffusionProcessingImg2Img=img2img)
    module("modules.ui_components", InputAccordion=container)
    return seen
