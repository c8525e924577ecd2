"""FaceSnap in the WebUI: the accordion, and the host's callbacks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from facesnap_ext.hosts import fork

fork.require_supported()  # other WebUIs lack some of the modules imported below

import gradio as gr
from modules import script_callbacks, scripts, shared
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion

from facesnap_ext import hosts
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import init_image, job, results, selected_script, stopping, webui, windows, xyz
from facesnap_ext.hosts.errors import refusal_of
from facesnap_ext.hosts.job import JobState
from facesnap_ext.hosts.model_folders import model_files
from facesnap_ext.settings.infotext import PHOTOS
from facesnap_ext.settings.saved_poses import find_poses
from facesnap_ext.settings.script_args import UI_ORDER, batches_by_photo, from_script_args
from facesnap_ext.ui import accordion, models_panel, routes, settings_html, starter
from facesnap_ext.ui.markup import problem
from facesnap_ext.weights.identity_folder import find_identities

host = hosts.current()
log = logging.getLogger("facesnap")
PEOPLE = 2  # default number of tabs on the page
PREPARATION = (("compile", False), ("identity_names", True), ("strip", False))  # arguments of `job.prepare`


def engine():
    return webui.shared_engine(model_files)


@contextmanager
def abort_on_error(p) -> Iterator[None]:
    """Refuse the job after an error inside the `with` block, and undo FaceSnap's changes to it."""
    try:
        yield
    except Exception as error:
        p.facesnap = JobState(refusal=refusal_of(error))
        job.resume_saving(p)
        job.restore_job(p)
        if not isinstance(error, FaceSnapError):
            raise


class Script(scripts.Script):
    failure = None  # the reason why there is no accordion, in one sentence

    def title(self):
        return "FaceSnap"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        """The accordion, or an explanation if it cannot be drawn: an exception here would stop the host."""
        self.failure, self.infotext_fields = None, []
        try:
            with gr.Column(elem_id=self.elem_id("accordion")) as column:
                if is_img2img:
                    gr.HTML(settings_html.CARRY_OVER, elem_id=self.elem_id("carry_over"))
                return self.accordion()
        except Exception as error:
            reason = str(error) if isinstance(error, FaceSnapError) else f"{error!r}; please report it"
            self.failure = f"FaceSnap's accordion could not be drawn: {reason.rstrip('.')}."
            log.error(self.failure, exc_info=error)
        column.visible = False  # this also hides the components drawn so far
        with gr.Accordion("FaceSnap", open=False, elem_id=self.elem_id("failed")):
            gr.HTML(problem(self.failure))
            return [gr.Checkbox(False, label="Enabled", visible=False, elem_id=self.elem_id("failed_enable"))]

    def accordion(self):
        files = model_files()
        people = range(1, int(results.option("people", PEOPLE)) + 1)
        components = []
        with InputAccordion(False, label="FaceSnap", elem_id=self.elem_id("enable")) as enabled:
            needed = starter.missing(files)
            top = models_panel.top(files, needed, self.elem_id)
            status = gr.HTML(accordion.status(files, needed), elem_id=self.elem_id("status"))
            for number in people:
                with gr.Tab(f"Person {number}", elem_id=self.ident("person", number)):
                    on = enabled
                    if number > 1:
                        on = gr.Checkbox(False, label="Add this person", elem_id=self.ident("enable", number))
                    ident = partial(self.ident, number=number)
                    components.append(accordion.person_controls(on, engine, ident))
                    if number > 1:  # the host saves defaults by label, so they would be Person 1's
                        for component in components[-1]:
                            component.do_not_save_to_config = True
            models_panel.panel(files, needed, model_files, self.elem_id, status, top)
        self.infotext_fields = [
            PasteField(component, partial(accordion.paste_value, number=number, name=name))
            for number, person in zip(people, components)
            for name, component in zip(UI_ORDER, person)
            if name not in PHOTOS
        ]
        return [component for person in components for component in person]

    def ident(self, name, number):
        return self.elem_id(name if number == 1 else f"{name}_{number}")

    def setup(self, p, *args):
        init_image.remember_request(p)

    def before_process(self, p, *args):
        host.detach(p)  # removes what an exception in an earlier job may have left behind
        job.resume_saving(p)
        p.facesnap = JobState()
        with abort_on_error(p):
            units = xyz.with_axes(p, from_script_args(args))
            if units and self.failure:
                raise FaceSnapError(f"{self.failure} FaceSnap cannot be used until this is fixed.")
            p.facesnap.requested = job.expand_iterations(p, batches_by_photo(units), engine(), webui.progress)
        webui.forget_infotext(p)

    def process(self, p, *args):
        if requested := job.state_of(p).requested:
            with abort_on_error(p):
                options = [bool(results.option(*one)) for one in PREPARATION]
                p.facesnap.prepared = job.prepare(p, requested, engine(), webui.progress, *options)
                results.begin(p, engine())
                job.begin_batch(p, webui.progress)
                if stopping.hides_exceptions(p):
                    host.check(p, [prepared.conditioning for batch in p.facesnap.prepared for prepared in batch.people])
        if job.state_of(p).refusal:
            selected_script.stop_plot_cell(p)
            stopping.end_without_images(p)

    def process_batch(self, p, *args, **kwargs):
        job.begin_batch(p, webui.progress)

    def process_before_every_sampling(self, p, *args, **kwargs):
        if refusal := job.state_of(p).refusal:
            host.refuse(p, refusal)
            return
        batch = job.current_batch(p)
        try:
            host.attach(p, windows.for_pass(p, batch) if batch else ())
        except Exception as error:
            host.refuse(p, refusal_of(error))
            raise

    def post_sample(self, p, ps, *args):
        host.detach(p)
        if batch := job.current_batch(p):
            webui.comment_on_compiling(p, batch)

    def postprocess_image(self, p, pp, *args):
        if batch := job.current_batch(p):
            pp.image = results.finish_image(p, batch, pp.image, host, engine())

    def postprocess_image_after_composite(self, p, pp, *args):
        pp.image = results.finish_composite(p, pp.image)

    def postprocess(self, p, processed, *args):
        host.detach(p)
        results.finish_job(p, processed)
        job.restore_job(p)
        if refusal := job.state_of(p).refusal:
            stopping.drop_images(p, processed)
            selected_script.explain_job(p, processed, refusal.message)


def add_settings():
    option = partial(shared.OptionInfo, section=("facesnap", "FaceSnap"))
    options = {
        "people": option(
            PEOPLE, "People in one image", gr.Slider, {"minimum": 1, "maximum": 4, "step": 1}
        ).needs_reload_ui(),
        "likeness": option(False, "Measure the likeness of each image to each person").info(
            "shown below the images and written into infotext; takes about a second per image"
        ),
        "best_first": option(False, "Order a job's images by likeness, best first").info(
            "with several people, by the lowest likeness among them; has no effect in scripts that depend on the order"
        ),
        "keep_best": option(
            0,
            "Keep only the best images of each job, by likeness",
            gr.Slider,
            {"minimum": 0, "maximum": 32, "step": 1},
        ).info(
            "number of images to keep from all batches of a job, or for each photo in batch mode; 0 keeps all. The "
            "other images are neither shown nor saved. Images are saved only at the end of the job"
        ),
        "strip": option(False, "Add an image that shows the reference photo beside the result").info(
            "shown, but not saved"
        ),
        "check": option(True, "Blur images that the image classifier rejects").info(
            "only if there is an image classifier in the model folder; see docs/responsible-use.md"
        ),
        "identity_names": option(True, "Write the names of saved people into infotext").info(
            "if off, the infotext does not name the saved person, so you have to choose the person again after "
            "pasting it"
        ),
        "compile": option(False, "Compile FFRNet").info(
            "somewhat faster if Triton is installed; the first image of each size takes longer"
        ),
    }
    for name, info in options.items():
        shared.opts.add_option(f"facesnap_{name}", info)


def add_routes(demo, app):
    origins = routes.cors_origins(shared.cmd_opts)
    routes.add_routes(app, model_files, engine, shared.cmd_opts.api_auth, origins)


script_callbacks.on_cfg_denoiser(host.on_cfg_denoiser)
script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_before_ui(
    lambda: xyz.add_axes(
        {
            "identity": lambda: sorted(find_identities(model_files().folder)),
            "model": lambda: sorted(model_files().facesnap),
            "saved_pose": lambda: list(find_poses(model_files().folder)),
        }
    )
)
script_callbacks.on_app_started(add_routes)
