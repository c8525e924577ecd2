"""Serve the script's accordion on a page of real gradio, with a minimal WebUI that generates images.

    PYTHONPATH=<folder with gradio> python -m tests.page.page_server PORT MODELS

The script, its callbacks, its components and the engine are FaceSnap's own. The checkpoint is the miniature's SDXL.
MODELS is the WebUI's model folder.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub

ROOT = Path(__file__).parents[2]

if not hasattr(huggingface_hub, "HfFolder"):  # gradio imports it for logging in, but recent versions do not have it
    huggingface_hub.HfFolder = None

import gradio as gr
from PIL import Image

from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.hosts.errors import Refusal
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.dataset import SIDE
from tests.support import mock_webui, onnx_memo

PREFIX = "script_txt2img_facesnap_"
PROMPT = "portrait of a neutral person in a red shirt, blue background, light from front"
JOBS = count(1)
PARAMETER = re.compile(r'([\w ]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)')


class Host:
    """The host adapter for the miniature's pipeline, with the same functions as the WebUIs' adapters."""

    def __init__(self) -> None:
        self.attached: Any = ()

    def attach(self, p: Any, people: Any) -> None:
        self.attached = people

    def refuse(self, p: Any, refusal: Refusal) -> None:
        self.attached = refusal

    def detach(self, p: Any = None) -> None:
        self.attached = ()

    def sample(self, p: Any) -> Image.Image:
        import torch

        if isinstance(self.attached, Refusal):
            raise self.attached.error()
        few_steps = sampler()
        with conditioned(few_steps.pipe, *self.attached):
            return few_steps.pipe(
                PROMPT,
                width=p.width,
                height=p.height,
                num_inference_steps=few_steps.steps,
                guidance_scale=few_steps.scale,
                generator=torch.Generator().manual_seed(p.seed),
            ).images[0]


@cache
def sampler() -> shipped.Sampler:
    return shipped.few_step_sampler()


def load_script(models: Path, host: Host) -> Any:
    """Load the script as a WebUI does, with a mock of the WebUI and real gradio."""
    mock_webui.install(models)
    sys.modules["gradio"] = gr
    sys.modules["modules.ui_components"].InputAccordion = input_accordion
    sys.modules["modules.scripts"].Script.elem_id = lambda self, name: PREFIX + name
    spec = spec_from_file_location("facesnap_script", ROOT / "scripts" / "facesnap.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.host = host
    return module.Script()


@contextmanager
def input_accordion(value: bool, label: str, elem_id: str) -> Iterator[Any]:
    """A checkbox that opens an accordion. In the hosts, it is part of the accordion's title."""
    checkbox = gr.Checkbox(value, label=label, elem_id=elem_id)
    with gr.Accordion(f"{label}: settings", open=value, elem_id=f"{elem_id}_contents") as contents:
        yield checkbox
    checkbox.change(lambda on: gr.update(open=on), [checkbox], [contents], show_progress="hidden")


def generate(script: Any, host: Host, width: float, height: float, *args: Any) -> tuple[str, str, str]:
    """Run a job as the hosts do.

    Exceptions of callbacks are swallowed. An exception in sampling ends the job and is shown on the page.

    Returns:
        HTML of the image, its infotext, and HTML of the error or the comments.
    """
    job = f"<p class='job'>Job {next(JOBS)}</p>"  # tells the test that the job is finished
    notes: list[str] = []
    p = SimpleNamespace(width=int(width), height=int(height), seed=1, extra_generation_params={}, comment=notes.append)

    def hook(name: str, *values: Any) -> None:
        with suppress(Exception):
            getattr(script, name)(p, *values, *args)

    hook("before_process")
    hook("process")
    hook("process_before_every_sampling")
    try:
        image = host.sample(p)
    except Exception as error:
        return "", "", f"{job}<div class='error'>{html.escape(f'{type(error).__name__}: {error}')}</div>"
    hook("post_sample", None)
    hook("postprocess_image", SimpleNamespace(image=image))
    hook("postprocess", None)
    parameters = {
        "Steps": sampler().steps,
        "Seed": p.seed,
        "Size": f"{p.width}x{p.height}",
        **p.extra_generation_params,
    }
    line = ", ".join(f"{name}: {quoted(value)}" for name, value in parameters.items() if value is not None)
    return image_html(image), f"{PROMPT}\n{line}", job + "".join(f"<p>{html.escape(note)}</p>" for note in notes)


def image_html(image: Image.Image) -> str:
    """HTML of a losslessly encoded image. One version of gradio would use lossy compression."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"<img alt='Image' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def parse(text: str) -> dict[str, str]:
    """The parameters in infotext."""
    pairs = PARAMETER.findall(text.strip().split("\n")[-1])
    return {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}


def paste(script: Any, text: str) -> list[Any]:
    """The updates of the script's fields, in their order.

    As in the hosts, a value is converted to the type of the component's initial value, and None changes nothing.
    """
    return [paste_field(component, target, parse(text)) for component, target in script.infotext_fields]


def paste_field(component: Any, target: Any, parameters: Mapping[str, str]) -> Any:
    value = target(parameters) if callable(target) else parameters.get(target)
    if value is None:
        return gr.update()
    kind = type(component.value)
    if kind is bool and value == "False":
        return gr.update(value=False)
    return gr.update(value=float(value) if kind is int else kind(value))


def page(script: Any, host: Host) -> gr.Blocks:
    with gr.Blocks(title="FaceSnap") as blocks:
        sizes = [
            gr.Slider(64, 512, SIDE, step=8, label=name.capitalize(), elem_id=f"txt2img_{name}")
            for name in ("width", "height")
        ]
        controls = script.ui(False)
        button = gr.Button("Generate", elem_id="txt2img_generate")
        image = gr.HTML(elem_id="txt2img_gallery")
        infotext = gr.Textbox(label="Infotext", elem_id="txt2img_infotext", interactive=False)
        log = gr.HTML(elem_id="html_log_txt2img")
        text = gr.Textbox(label="Infotext to paste", elem_id="txt2img_prompt")
        paste_button = gr.Button("Paste", elem_id="paste")
        button.click(partial(generate, script, host), [*sizes, *controls], [image, infotext, log])
        paste_button.click(partial(paste, script), [text], [component for component, _ in script.infotext_fields])
    return blocks


def main(port: str, models: str) -> None:
    host = Host()
    script = load_script(Path(models), host)
    page(script, host).queue().launch(server_name="127.0.0.1", server_port=int(port), show_api=False, quiet=True)


if __name__ == "__main__":
    onnx_memo.install()
    main(*sys.argv[1:])
