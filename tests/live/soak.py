"""Run many jobs in a WebUI, with and without FaceSnap, interrupted and failing, and check that nothing is left behind.

    python -m tests.live.soak http://127.0.0.1:7860 --jobs 300 --out out/soak

Print the results as JSON and plot the memory of the process to OUT/HOST.png. The exit status is 1 if a check failed.
README.md describes the WebUI, which must have the probe.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import pytest
from tqdm import tqdm

from tests.live.live_host import (
    PLAIN,
    Host,
    Job,
    Refused,
    encode,
    equal,
    failing,
    grace_hopper,
    grey,
    leftovers,
    new_photo,
    with_facesnap,
    with_people,
)

GROWTH = 0.02  # allowed growth of the process's memory from the second to the last fifth of the jobs


@dataclass(frozen=True)
class Result:
    """The result of one job.

    Attributes:
        kind: a key of `KINDS`, or `OFF`.
        left: state of the UNet afterwards, if it differs from the state before the first job.
        memory: memory of the process, in MiB.
        same: whether a job without FaceSnap produced the same image as the first one.
    """

    kind: str
    left: Job
    memory: float
    same: bool = True


def on(host: Host) -> None:
    host.images(with_facesnap({}))


def other_photo(host: Host) -> None:
    host.images(with_facesnap({}, references=[encode(new_photo())]))


def failing_in_the_unet(host: Host) -> None:
    with pytest.raises(Refused, match="the probe raised"):
        host.images(failing({}, at=2))


def two_people(host: Host) -> None:
    host.images(with_people({}, {}, {"references": [encode(grace_hopper())]}))


def refused(host: Host) -> None:
    with pytest.raises(Refused, match="No face"):
        host.images(with_facesnap({}, references=[encode(grey())]))


OFF = "off"
KINDS: dict[str, Callable[[Host], object]] = {
    "on": on,
    "other photo": other_photo,
    "interrupted": Host.interrupted,
    "failing": failing_in_the_unet,
    "two people": two_people,
    "refused": refused,
}


def soak(host: Host, jobs: int) -> list[Result]:
    """Run the kinds of jobs in turn, each followed by one without FaceSnap."""
    host.settle()
    first, clean = host.images({}), leftovers(host.probe(collect=True))
    results = []
    kinds = cycle([kind for name in KINDS for kind in (name, OFF)])
    for kind in tqdm(list(islice(kinds, jobs)), unit="job"):
        if kind == OFF:
            same = equal(host.images({}), first)
        else:
            KINDS[kind](host)
            same = True
        state = host.probe(collect=True)
        left = leftovers(state)
        results.append(Result(kind, {} if left == clean else left, state["memory"] / 2**20, same))
    return results


def report(host: Host, results: list[Result], seconds: float) -> dict[str, object]:
    fifth = len(results) // 5
    memory = [one.memory for one in results]
    warm, end = median(memory[fifth : 2 * fifth]), median(memory[-fifth:])
    plain = [one.same for one in results if one.kind == OFF]
    return {
        "host": host.name,
        "side": PLAIN["width"],
        "jobs": dict(Counter(one.kind for one in results)),
        "seconds": round(seconds),
        "left on the UNet": {one.kind: one.left for one in results if one.left},
        "images without FaceSnap equal to the first": f"{sum(plain)} of {len(plain)}",
        "MiB": {"second fifth": round(warm), "last fifth": round(end), "growth": round(end / warm - 1, 4)},
        "passed": all(plain) and not any(one.left for one in results) and end / warm - 1 <= GROWTH,
    }


def plot_memory(results: list[Result], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for kind in (OFF, *KINDS):
        places = [number for number, one in enumerate(results) if one.kind == kind]
        axes.plot(places, [results[place].memory for place in places], ".", label=kind)
    axes.set(xlabel="job", ylabel="process memory in MiB", ylim=(0, 1.1 * max(one.memory for one in results)))
    axes.legend(ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--side", type=int, default=PLAIN["width"], help="of the square images, in pixels")
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    options = parser.parse_args()
    PLAIN.update(width=options.side, height=options.side)
    host = Host(options.url)
    if not host.has("/facesnap-probe/state"):
        parser.error("the WebUI has no probe extension; link tests/live/probe into its extensions and restart it")
    start = time.monotonic()
    results = soak(host, options.jobs)
    summary = report(host, results, time.monotonic() - start)
    plot_memory(results, options.out / f"{host.name}.png")
    print(json.dumps(summary, indent=2))
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
