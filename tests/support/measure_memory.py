"""Measure how much memory photos take that are sent all at once: `python -m tests.support.measure_memory`.

One job with 200 photos of 24 million pixels, one with as many as are accepted, and eight parallel requests to
/facesnap/detect with a photo of 79 million pixels each. Prints the peak of each above the process's memory after one
small request. Linux only.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.settings.script_args import from_script_args
from facesnap_ext.ui import routes
from facesnap_ext.weights.search import find_models
from tests.support.stand_in_pack import scrfd_from_centerface, stand_in_arcface
from tests.support.stand_ins import centerface

LIMIT = 1500  # MB above idle


def encoded(width: int, height: int, seed: int) -> str:
    """A smooth photo in base64, without a face: the detector looks for one in all turns and tiles."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=60)
    return base64.b64encode(file.getvalue()).decode()


def memory(name: str) -> float:
    """A value of this process in MB: VmRSS is its memory now, VmHWM the peak since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{name}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1000


def measure(title: str, idle: float, run: Any) -> bool:
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    start = time.perf_counter()
    outcome = run()
    peak = memory("VmHWM") - idle
    print(f"{title}: {outcome}; peak {peak:.0f} MB above idle, {time.perf_counter() - start:.0f} s", flush=True)
    return peak < LIMIT


def job(photos: list[str]) -> str:
    try:
        units = from_script_args([{"references": photos}])
    except FaceSnapError as error:
        return str(error)
    return f"{len(units[1].references)} photos accepted"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        pack = Path(name) / "pack"
        pack.mkdir()
        scrfd_from_centerface(centerface(), pack / "scrfd_10g_bnkps.onnx")
        stand_in_arcface(pack / "glintr100.onnx", 0)
        app, engine = FastAPI(), Engine(lambda: find_models(Path(name)))
        routes.add_routes(app, lambda: find_models(Path(name)), lambda: engine)
        client = TestClient(app)

        def detect(photo: str) -> int:
            return client.post("/facesnap/detect", json={"photos": [photo]}).status_code

        detect(encoded(640, 480, 0))
        of_24, of_79 = encoded(6000, 4000, 1), [encoded(10280, 7685, seed) for seed in range(8)]
        idle = memory("VmRSS")
        print(f"idle: {idle:.0f} MB", flush=True)

        def parallel() -> str:
            with ThreadPoolExecutor(8) as pool:
                return f"statuses {dict(Counter(pool.map(detect, of_79)))}"

        return int(
            not all(
                [
                    measure("200 photos of 24 MP", idle, lambda: job([of_24] * 200)),
                    measure("11 photos of 24 MP", idle, lambda: job([of_24] * 11)),
                    measure("10 photos of 24 MP", idle, lambda: job([of_24] * 10)),
                    measure("8 requests of 79 MP", idle, parallel),
                ]
            )
        )


if __name__ == "__main__":
    raise SystemExit(main())
