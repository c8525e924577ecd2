"""Test aid, an extension of its own: makes a UNet evaluation fail on request and counts what was left behind.

API: `"FaceSnap probe": {"args": [{"fail_at": 2}]}` makes the second UNet call of that job raise in its middle block.
GET /facesnap-probe/state answers what hangs on the UNet now, the memory of the process and the last job's evaluations.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import gradio as gr
import psutil
from modules import script_callbacks, scripts, shared

_evaluations = 0


def unet():
    """None until the first job: Forge loads its checkpoint then."""
    objects = getattr(shared.sd_model, "forge_objects", None)
    holder = shared.sd_model if objects is None else objects.unet
    return holder.model.diffusion_model if hasattr(holder, "model") else None


class FailingHook:
    """Raises at its k-th call, half-way through the UNet, and is gone."""

    def __init__(self, at: int):
        self.left = at
        self.handle = unet().middle_block.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.left -= 1
        if self.left == 0:
            self.handle.remove()
            raise RuntimeError("the probe raised, as it was told to")


class Script(scripts.Script):
    failing = None

    def title(self):
        return "FaceSnap probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", visible=False)]

    def process(self, p, settings):
        global _evaluations
        _evaluations = 0
        self.remove()

    def process_before_every_sampling(self, p, settings, **kwargs):
        self.remove()
        if isinstance(settings, dict) and settings.get("fail_at"):
            Script.failing = FailingHook(settings["fail_at"])

    def postprocess(self, p, processed, settings):
        self.remove()

    @staticmethod
    def remove():
        if Script.failing is not None:
            Script.failing.handle.remove()
            Script.failing = None


def count_evaluation(params):
    global _evaluations
    _evaluations += 1


def state(collect: bool = False):
    """With `collect` after Python's garbage collection: a job that failed is held by its own traceback until then."""
    Script.remove()
    if collect:
        gc.collect()
    network = unet()
    modules = [] if network is None else list(network.modules())
    return {
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
        "controls": controls(),
        "memory": own_memory(),
        "evaluations": _evaluations,
    }


def own_memory():
    """Bytes that the process has in use.

    Without the pages of files that it has mapped, weights among them, of which the system keeps as many in memory as it
    likes; and without what is free but not given back: glibc keeps that in a heap for each thread, and hosts run each
    job in another thread.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)  # elsewhere than on Linux not told apart


def controls():
    """Class names of the controls on each of Forge's UNet patchers; none on A1111."""
    names = []
    for objects in ("forge_objects", "forge_objects_original", "forge_objects_after_applying_lora"):
        link = getattr(getattr(shared.sd_model, objects, None), "unet", None)
        link = getattr(link, "controlnet_linked_list", None)
        while link is not None:
            names.append(type(link).__name__)
            link = link.previous_controlnet
    return names


script_callbacks.on_cfg_denoiser(count_evaluation)
script_callbacks.on_app_started(lambda _, app: app.add_api_route("/facesnap-probe/state", state, methods=["GET"]))
