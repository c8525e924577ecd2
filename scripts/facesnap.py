"""FaceSnap in the WebUI: the accordion, and which of the host's moments mean what."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from modules import paths, script_callbacks, scripts
from modules.ui_components import InputAccordion

from facesnap_ext import hosts
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import webui
from facesnap_ext.settings import from_script_args
from facesnap_ext.weights.places import ModelFiles, find_models

host = hosts.current()
MODELS = Path(paths.models_path)


def model_files() -> ModelFiles:
    return find_models(MODELS / "facesnap", (MODELS / "insightface" / "models", MODELS / "insightface"))


def mistake(error: Exception) -> FaceSnapError:
    """What stops the job at an error of ours, which the host would swallow, going on to a picture of somebody else."""
    return FaceSnapError(f"FaceSnap failed: {error!r}; the console has the whole story, please report it.")


class Script(scripts.Script):
    def title(self):
        return "FaceSnap"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        names = sorted(model_files().facesnap)
        with InputAccordion(False, label="FaceSnap", elem_id=self.elem_id("enable")) as enabled:
            with gr.Row():
                photo = gr.Image(
                    label="Reference photo", type="pil", image_mode=None, elem_id=self.elem_id("photo"), height=280
                )
                driving = gr.Image(
                    label="Driving photo: its pose and expression (optional)",
                    type="pil",
                    image_mode=None,
                    elem_id=self.elem_id("driving"),
                    height=280,
                )
            more_photos = gr.File(
                label="More photos of the same person (optional)",
                file_count="multiple",
                file_types=["image"],
                type="binary",
                height=100,
                elem_id=self.elem_id("more_photos"),
            )
            with gr.Row():
                weight = gr.Slider(0, 2, 1, step=0.05, label="Weight", elem_id=self.elem_id("weight"))
                start = gr.Slider(0, 1, 0, step=0.01, label="Start", elem_id=self.elem_id("start"))
                end = gr.Slider(0, 1, 1, step=0.01, label="End", elem_id=self.elem_id("end"))
            model = gr.Dropdown(
                ["", *names], value="", label="FaceSnap file (empty: the only one)", elem_id=self.elem_id("model")
            )
        return enabled, photo, more_photos, driving, weight, start, end, model

    def before_process(self, p, *args):
        host.detach(p)  # what an exception in an earlier job may have left

    def process(self, p, *args):
        p.facesnap = None
        try:
            if units := from_script_args(args):
                p.facesnap = webui.prepare(p, units, model_files)
        except FaceSnapError as error:
            p.facesnap = FaceSnapError(str(error))  # without its traceback, which would hold on to the whole job
        except Exception as error:
            p.facesnap = mistake(error)
            raise

    def process_before_every_sampling(self, p, *args, **kwargs):
        job = getattr(p, "facesnap", None)
        if job is None:
            return
        try:
            guidances = job if isinstance(job, FaceSnapError) else webui.for_pass(p, job)
        except Exception as error:
            host.attach(p, mistake(error))
            raise
        host.attach(p, guidances)

    def post_sample(self, p, ps, *args):
        host.detach(p)

    def postprocess(self, p, processed, *args):
        host.detach(p)


script_callbacks.on_cfg_denoiser(host.on_cfg_denoiser)
