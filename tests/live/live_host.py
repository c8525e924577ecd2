"""Client of a running WebUI: send jobs to its API, and get decoded images or the error."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

Job = dict[str, Any]
Images = list[np.ndarray]

RANDOM, INIT, OTHER_WIDTHS = "random.safetensors", "init.safetensors", "other-widths.safetensors"
PLAIN: Job = {
    "prompt": "a photo of a red house",
    "negative_prompt": "blurry",
    "seed": 1,
    "steps": 2,
    "width": 256,
    "height": 256,
    "cfg_scale": 5,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
}


LONG: Job = {"steps": 16}  # long enough to be interrupted


class Refused(Exception):
    """The host responded to a job with an error: the HTTP `status` and the `message` for the user."""

    def __init__(self, status: int, message: str):
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


class Host:
    """A WebUI at a URL.

    Attributes:
        forge: whether jobs have the settings that Forge 2 added, as in its forks that have its presets.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy for a local host
        self._session.headers["Connection"] = "close"  # Forge's server closes the connection after an error
        self.forge = "forge_preset" in self.get("/sdapi/v1/options")

    @cached_property
    def webui(self) -> Job:
        """What FaceSnap knows about the WebUI; see `hosts.fork.Fork`."""
        return self.get("/facesnap/version")["webui"]

    @property
    def name(self) -> str:
        """The WebUI's name, for file names."""
        return self.webui["name"].lower().replace(" ", "-")

    def get(self, path: str) -> Any:
        answer = self._session.get(self.url + path, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def has(self, path: str) -> bool:
        return self._session.get(self.url + path, timeout=60).ok

    def post(self, path: str, payload: Job | None = None) -> Any:
        answer = self._session.post(self.url + path, json=payload, timeout=900)
        if not answer.ok:
            raise Refused(answer.status_code, _message(answer))
        return answer.json()

    def images(self, job: Job) -> Images:
        """The images of a job, [H, W, 3] uint8 each.

        Args:
            job: changes to `PLAIN`; with `init_images` it is img2img.
        """
        kind = "img2img" if "init_images" in job else "txt2img"
        if kind == "img2img":
            # the latent of an init image is sampled with torch's global generator: make its state independent of
            # earlier jobs
            self.post("/sdapi/v1/txt2img", {**PLAIN, "steps": 1})
        answer = self.post(f"/sdapi/v1/{kind}", {**PLAIN, **job})
        return [decode(image) for image in answer["images"]]

    def infotext(self, job: Job) -> str:
        """The infotext of the first image of a txt2img job."""
        return json.loads(self.post("/sdapi/v1/txt2img", {**PLAIN, **job})["info"])["infotexts"][0]

    def settle(self) -> None:
        """Switch to another checkpoint and back. In A1111, the first switch changes a pixel by 1; later ones do not."""
        if (other := self.checkpoint("sd15")) is not None:
            self.images({"override_settings": {"sd_model_checkpoint": other}})
            self.images({})

    def start(self, job: Job) -> Future[Images]:
        """Start a job without waiting for its images."""
        pool = ThreadPoolExecutor(1)
        future = pool.submit(self.images, job)
        pool.shutdown(wait=False)
        return future

    def interrupted(self) -> Images:
        """The images of a long job with FaceSnap that is interrupted during sampling."""
        future = self.start(with_facesnap(LONG))
        self.wait_for_step(3)
        self.post("/sdapi/v1/interrupt")
        return future.result(timeout=120)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.get("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] >= step)

    def checkpoint(self, part: str) -> str | None:
        """The name of the first checkpoint whose name contains this."""
        return next((name for name in self._checkpoints if part in name), None)

    @cached_property
    def _checkpoints(self) -> list[str]:
        if self.has("/sdapi/v1/sd-models"):
            return [Path(model["filename"]).name for model in self.get("/sdapi/v1/sd-models")]
        # ersatzForge responds with HTTP 500, but its refiner offers the same checkpoints as "name [hash]"
        choices = next(argument["choices"] for argument in self.script("Refiner")["args"] if argument["choices"])
        return [title.split(" [")[0] for title in choices]

    def script(self, title: str, img2img: bool = False) -> Job | None:
        """The host's description of a script, with the `label` and `value` of each argument; None if there is no script
        whose title begins like this."""
        scripts = [script for script in self.get("/sdapi/v1/script-info") if script["is_img2img"] == img2img]
        return next((script for script in scripts if script["name"].startswith(title.lower())), None)

    @cached_property
    def upscaler(self) -> str:
        """An upscaler for hires fix that needs no download."""
        latent = [mode["name"] for mode in self.get("/sdapi/v1/latent-upscale-modes")]
        names = [*latent, *(upscaler["name"] for upscaler in self.get("/sdapi/v1/upscalers"))]
        return next(name for name in names if name in ("Latent", "Lanczos", "None"))

    @cached_property
    def lora(self) -> str | None:
        return next((lora["name"] for lora in self.get("/sdapi/v1/loras")), None)

    @cached_property
    def controlnet(self) -> Job | None:
        """The arguments of the first ControlNet that changes the image."""
        if not self.has("/controlnet/model_list"):
            return None
        modules = self.get("/controlnet/module_list")["module_list"]
        none = next(name for name in modules if name.lower() == "none")  # A1111's extension writes it in lower case
        models = self.get("/controlnet/model_list")["model_list"]
        for model in [name for name in models if name != "None"]:  # reForge lists the empty choice too
            unit = {"enabled": True, "module": none, "model": model, "weight": 1.0}
            job = {"ControlNet": {"args": [{**unit, "image": encode(stripes())}]}}
            if differ(self.images({"alwayson_scripts": job})[:1], self.images({})):
                return job
        return None

    def probe(self, collect: bool = False) -> Job:
        """The hooks on the UNet and more; see probe/scripts/facesnap_probe.py."""
        return self.get(f"/facesnap-probe/state?collect={collect}")


def enabled(script: Job, values: Job) -> Job:
    """A job with a script that is enabled by its first argument.

    Args:
        script: from `Host.script`.
        values: other arguments by their labels; the rest keep their default.
    """
    arguments = [values.get(argument["label"], argument["value"]) for argument in script["args"]]
    return {"alwayson_scripts": {script["name"]: {"args": [True, *arguments[1:]]}}}


def with_facesnap(job: Job, **settings: Any) -> Job:
    """A job with FaceSnap, by default with the astronaut and the random FaceSnap file."""
    return with_people(job, settings)


def failing(job: Job, at: int) -> Job:
    """A job with FaceSnap in which the UNet call with this number raises an error. Requires the probe."""
    return with_facesnap({**job, "alwayson_scripts": {"FaceSnap probe": {"args": [{"fail_at": at}]}}})


def leftovers(state: Job) -> Job:
    """The part of `Host.probe` that a job must not change."""
    return {name: state[name] for name in ("hooks", "controls")}


def with_people(job: Job, *people: Job) -> Job:
    """A job with several people, each with their own settings."""
    units = [{"enabled": True, "references": [encode(astronaut())], "model": RANDOM, **person} for person in people]
    return {**job, "alwayson_scripts": {**job.get("alwayson_scripts", {}), "FaceSnap": {"args": units}}}


def equal(one: Images, other: Images) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def differ(one: Images, other: Images) -> bool:
    """Whether each image differs from its counterpart."""
    return len(one) == len(other) and not any(map(np.array_equal, one, other))


@cache
def astronaut() -> np.ndarray:
    from skimage import data

    return data.astronaut()


@cache
def grace_hopper() -> np.ndarray:
    import matplotlib as mpl

    path = Path(mpl.get_data_path(), "sample_data", "grace_hopper.jpg")
    return np.asarray(Image.open(path).convert("RGB"))


def new_photo() -> np.ndarray:
    """The astronaut with one random pixel, so that cached results of earlier photos are not used."""
    pixels = astronaut().copy()
    pixels[0, 0] = np.random.default_rng().integers(256, size=3)
    return pixels


def grey() -> np.ndarray:
    return np.full((256, 256, 3), 128, np.uint8)


def stripes() -> np.ndarray:
    y, x = np.mgrid[:256, :256]
    return np.stack([x // 32 % 2 * 255, y // 32 % 2 * 255, x], 2).astype(np.uint8)


def rectangle() -> np.ndarray:
    """An inpainting mask."""
    mask = np.zeros((256, 256, 3), np.uint8)
    mask[40:160, 60:180] = 255
    return mask


def small(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((256, 256), Image.LANCZOS))


def image_file(pixels: np.ndarray, suffix: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


def truncated_jpeg() -> bytes:
    """The first half of a JPEG file."""
    data = image_file(astronaut(), "JPEG")
    return data[: len(data) // 2]


def encode(pixels: np.ndarray) -> str:
    return base64.b64encode(image_file(pixels)).decode()


def decode(image: str | bytes) -> np.ndarray:
    data = base64.b64decode(image.split(",", 1)[-1]) if isinstance(image, str) else image
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    for _ in _ticks(seconds):
        if condition():
            return
    raise TimeoutError(f"the condition was not met within {seconds} s")


def _ticks(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.05)


def _message(answer: requests.Response) -> str:
    try:
        body = answer.json()
    except ValueError:
        return answer.text
    return str(body.get("errors") or body.get("message") or body.get("detail") or body)
