"""FaceSnap in the WebUI: the accordion, and which of the host's moments mean what."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gradio as gr
from modules import paths, script_callbacks, scripts, shared
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion

from facesnap_ext import hosts
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import webui, xyz
from facesnap_ext.hosts.folders import usual_places
from facesnap_ext.settings.infotext import PHOTOS
from facesnap_ext.settings.unit import UI_ORDER, from_script_args, sittings
from facesnap_ext.ui import accordion as page
from facesnap_ext.ui import models_panel, routes
from facesnap_ext.weights.places import ModelFiles, find_identities, find_models

if not hasattr(scripts.Script, "process_before_every_sampling"):  # without which no guidance would ever get in
    raise ImportError("FaceSnap needs AUTOMATIC1111 1.10 or later, or Forge; update the WebUI.")

host = hosts.current()
MODELS, DATA = Path(paths.models_path), Path(paths.data_path)
log = logging.getLogger("facesnap")
PEOPLE = 2  # that the page has room for, until the settings say otherwise


def model_files() -> ModelFiles:
    return find_models(option("facesnap_models_dir", MODELS / "facesnap"), elsewhere())


def elsewhere():
    controlnet = [option("controlnet_dir"), setting("control_net_models_path")]
    annotators = [
        option("controlnet_preprocessor_models_dir"),
        option("controlnet_annotator_models_path"),
        setting("control_net_modules_path"),
    ]
    named = getattr(shared.cmd_opts, "facesnap_also_look_in", None) or []
    return usual_places(MODELS, DATA, filter(None, controlnet), filter(None, annotators), map(Path, named))


def option(name, default=None):
    """A folder of the command line; extensions add options only when the WebUI starts."""
    value = getattr(shared.cmd_opts, name, None)
    return Path(value) if value else default


def setting(name):
    value = getattr(shared.opts, name, None)
    return Path(value) if value else None


def engine():
    return webui.the_engine(model_files)


def internal_error(error: Exception) -> FaceSnapError:
    """What stops the job at an error of ours, which the host would swallow, going on to a picture of somebody else."""
    return FaceSnapError(f"FaceSnap failed: {error!r}; the console has the whole story, please report it.")


@contextmanager
def abort_on_error(p) -> Iterator[None]:
    """An error inside the `with` block stops the job when sampling begins, and leaves nothing of ours in it."""
    try:
        yield
    except FaceSnapError as error:
        p.facesnap = FaceSnapError(str(error))  # without its traceback, which would hold on to the whole job
        webui.restore_job(p)
    except Exception as error:
        p.facesnap = internal_error(error)
        webui.restore_job(p)
        raise


class Script(scripts.Script):
    failure = None  # why there is no accordion, in a sentence

    def title(self):
        return "FaceSnap"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        """The accordion; one that says why where drawing it fails, which would keep the host from starting."""
        self.failure, self.infotext_fields = None, []
        try:
            with gr.Column(elem_id=self.elem_id("accordion")) as whole:
                return self.accordion()
        except Exception as error:
            reason = str(error) if isinstance(error, FaceSnapError) else f"{error!r}; please report it"
            self.failure = f"FaceSnap's accordion could not be drawn: {reason.rstrip('.')}."
            log.error(self.failure, exc_info=error)
        whole.visible = False  # with what had been drawn by then
        with gr.Accordion("FaceSnap", open=False, elem_id=self.elem_id("failed")):
            gr.HTML(page.problem(self.failure))
            return [gr.Checkbox(False, label="Enabled", visible=False, elem_id=self.elem_id("failed_enable"))]

    def accordion(self):
        files = model_files()
        identities = sorted(find_identities(files.folder))
        people = range(1, int(getattr(shared.opts, "facesnap_people", PEOPLE)) + 1)
        components = []
        with InputAccordion(False, label="FaceSnap", elem_id=self.elem_id("enable")) as enabled:
            status = gr.HTML(page.status(files), elem_id=self.elem_id("status"))
            for number in people:
                with gr.Tab(f"Person {number}", elem_id=self.ident("person", number)):
                    on = enabled
                    if number > 1:
                        on = gr.Checkbox(False, label="Add this person", elem_id=self.ident("enable", number))
                    ident = partial(self.ident, number=number)
                    components.append(page.person_controls(on, files, identities, engine, ident))
            lists = [person[UI_ORDER.index("model")] for person in components]
            models_panel.panel(files, model_files, self.elem_id, status, lists)
        self.infotext_fields = [
            PasteField(component, partial(page.paste_value, number=number, name=name))
            for number, person in zip(people, components)
            for name, component in zip(UI_ORDER, person)
            if name not in PHOTOS
        ]
        return [component for person in components for component in person]

    def ident(self, name, number):
        return self.elem_id(name if number == 1 else f"{name}_{number}")

    def before_process(self, p, *args):
        host.detach(p)  # what an exception in an earlier job may have left
        p.facesnap = None  # then the sittings, the jobs prepared of them, or the error that stops it all
        with abort_on_error(p):
            units = xyz.with_axes(p, from_script_args(args))
            if units and self.failure:
                raise FaceSnapError(f"{self.failure} FaceSnap cannot be used until that is mended.")
            p.facesnap = webui.expand_iterations(p, sittings(units), model_files) or None
        webui.forget_infotext(p)

    def process(self, p, *args):
        if isinstance(wanted := getattr(p, "facesnap", None), list):
            with abort_on_error(p):
                compiling = bool(getattr(shared.opts, "facesnap_compile", False))
                p.facesnap = webui.prepare(p, wanted, model_files, compiling)
                webui.begin_batch(p)

    def process_batch(self, p, *args, **kwargs):
        webui.begin_batch(p)

    def process_before_every_sampling(self, p, *args, **kwargs):
        job = webui.current_job(p)
        try:
            host.attach(p, webui.for_pass(p, job) if isinstance(job, webui.Job) else job or ())
        except Exception as error:
            host.attach(p, internal_error(error))
            raise

    def post_sample(self, p, ps, *args):
        host.detach(p)
        if isinstance(job := webui.current_job(p), webui.Job):
            webui.comment_on_compiling(p, job)

    def postprocess_image(self, p, pp, *args):
        job = webui.current_job(p)
        if not isinstance(job, webui.Job):
            return
        pp.image = webui.redraw_small_faces(p, job, pp.image, host)
        if getattr(shared.opts, "facesnap_likeness", False):
            webui.add_likeness(p, job, pp.image)

    def postprocess(self, p, processed, *args):
        host.detach(p)
        webui.restore_job(p)


def add_settings():
    section = ("facesnap", "FaceSnap")
    people = shared.OptionInfo(
        PEOPLE, "People in one picture", gr.Slider, {"minimum": 1, "maximum": 4, "step": 1}, section=section
    )
    shared.opts.add_option("facesnap_people", people.needs_reload_ui())
    likeness = shared.OptionInfo(False, "Measure each picture's likeness to the first person", section=section)
    shared.opts.add_option("facesnap_likeness", likeness.info("stands in the infotext; a second or so for a picture"))
    compiling = shared.OptionInfo(False, "Compile FFRNet", section=section)
    shared.opts.add_option(
        "facesnap_compile",
        compiling.info("somewhat faster where Triton is; the first picture of each size takes longer"),
    )


def add_routes(demo, app):
    routes.add_routes(app, model_files, engine, shared.cmd_opts.api_auth)


script_callbacks.on_cfg_denoiser(host.on_cfg_denoiser)
script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_before_ui(lambda: xyz.add_axes(lambda: sorted(find_identities(model_files().folder))))
script_callbacks.on_app_started(add_routes)
