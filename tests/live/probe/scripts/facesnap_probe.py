"""An extension for the tests: it makes a UNet call fail on request and counts what a job leaves behind.

In a request to the API, `"FaceSnap probe": {"args": [{"fail_at": 2}]}` makes the second UNet call of the job raise an
error in its middle block. GET /facesnap-probe/state returns the hooks on the UNet, the memory of the process, and the
number of UNet evaluations and the comments of the last job.

POST /facesnap-probe/catalogue replaces the address, size and hash of parts that FaceSnap can download, so that they
come from a local server. Its body is a list of objects with the keys name, url, size and sha256.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import replace

import gradio as gr
import psutil
from modules import script_callbacks, scripts, shared

_evaluations = 0
_comments: list[str] = []  # below the image on the page, but not in the API's response


def unet():
    """The UNet; None before the first job, because Forge loads its checkpoint only then."""
    objects = getattr(shared.sd_model, "forge_objects", None)
    holder = shared.sd_model if objects is None else objects.unet
    return holder.model.diffusion_model if hasattr(holder, "model") else None


class FailingHook:
    """A hook in the middle of the UNet that raises an error at its n-th call and removes itself.

    It is on the middle block's first layer, because reForge calls the layers of a block, and not the block itself.
    """

    def __init__(self, at: int):
        self.left = at
        self.handle = unet().middle_block[0].register_forward_hook(self)

    def __call__(self, module, args, output):
        self.left -= 1
        if self.left == 0:
            self.handle.remove()
            raise RuntimeError("the probe raised this error on request")


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
        _comments[:] = list(p.comments)
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
    """The state of the host.

    Args:
        collect: run Python's garbage collection first, because a failed job is kept alive by its own traceback.
    """
    Script.remove()
    if collect:
        gc.collect()
    network = unet()
    modules = [] if network is None else list(network.modules())
    return {
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
        "controls": controls(),
        "memory": used_memory(),
        "evaluations": _evaluations,
        "comments": list(_comments),
    }


def used_memory():
    """Bytes in use by the process.

    Memory-mapped files such as weights are not counted, because the system decides how much of them stays in memory.
    Free memory that glibc keeps in the heaps of threads is not counted either, because hosts run each job in a
    different thread.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)  # known only on Linux


def controls():
    """Class names of the controls on each of Forge's UNet patchers; empty on A1111."""
    names = []
    for objects in ("forge_objects", "forge_objects_original", "forge_objects_after_applying_lora"):
        link = getattr(getattr(shared.sd_model, objects, None), "unet", None)
        link = getattr(link, "controlnet_linked_list", None)
        while link is not None:
            names.append(type(link).__name__)
            link = link.previous_controlnet
    return names


def replace_parts(parts: list[dict]):
    """Change parts of FaceSnap's catalogue until the WebUI is restarted."""
    catalogue = sys.modules["facesnap_ext.weights.catalogue"]
    changes = {part.pop("name"): part for part in parts}
    catalogue.PARTS = tuple(replace(part, **changes.get(part.name, {})) for part in catalogue.PARTS)


def add_routes(_, app):
    app.add_api_route("/facesnap-probe/state", state, methods=["GET"])
    app.add_api_route("/facesnap-probe/catalogue", replace_parts, methods=["POST"])


script_callbacks.on_cfg_denoiser(count_evaluation)
script_callbacks.on_app_started(add_routes)
