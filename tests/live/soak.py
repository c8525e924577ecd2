"""Many jobs in a running WebUI, with FaceSnap and without, interrupted and failing: nothing stays behind.

    python -m tests.live.soak http://127.0.0.1:7860 --jobs 300 --out out/soak

Prints JSON, draws the process's memory to OUT/HOST.png and ends with 1 where a promise was broken. The WebUI is as
README.md asks for, with the probe.
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
    Host,
    Job,
    Refused,
    encode,
    equal,
    failing,
    grace_hopper,
    grey,
    leftovers,
    never_seen,
    with_facesnap,
    with_people,
)

GROWTH = 0.02  # of the process's memory between the second fifth of the jobs and the last


@dataclass(frozen=True)
class Done:
    """One job: of which kind, what hung on the UNet afterwards beyond what hung there before the first job, the
    process's memory in MiB, and whether a plain picture was the first one again."""

    kind: str
    left: Job
    memory: float
    same: bool = True


def on(host: Host) -> None:
    host.pictures(with_facesnap({}))


def other_photo(host: Host) -> None:
    host.pictures(with_facesnap({}, references=[encode(never_seen())]))


def failing_in_the_unet(host: Host) -> None:
    with pytest.raises(Refused, match="the probe raised"):
        host.pictures(failing({}, at=2))


def two_people(host: Host) -> None:
    host.pictures(with_people({}, {}, {"references": [encode(grace_hopper())]}))


def refused(host: Host) -> None:
    with pytest.raises(Refused, match="No face"):
        host.pictures(with_facesnap({}, references=[encode(grey())]))


OFF = "off"
KINDS: dict[str, Callable[[Host], object]] = {
    "on": on,
    "other photo": other_photo,
    "interrupted": Host.interrupted,
    "failing": failing_in_the_unet,
    "two people": two_people,
    "refused": refused,
}


def soak(host: Host, jobs: int) -> list[Done]:
    """Run the kinds of jobs in turn, each followed by a plain one."""
    host.settle()
    first, clean = host.pictures({}), leftovers(host.probe(collect=True))
    done = []
    kinds = cycle([kind for name in KINDS for kind in (name, OFF)])
    for kind in tqdm(list(islice(kinds, jobs)), unit="job"):
        if kind == OFF:
            same = equal(host.pictures({}), first)
        else:
            KINDS[kind](host)
            same = True
        state = host.probe(collect=True)
        left = leftovers(state)
        done.append(Done(kind, {} if left == clean else left, state["memory"] / 2**20, same))
    return done


def report(host: Host, done: list[Done], seconds: float) -> dict[str, object]:
    fifth = len(done) // 5
    memory = [one.memory for one in done]
    warm, end = median(memory[fifth : 2 * fifth]), median(memory[-fifth:])
    plain = [one.same for one in done if one.kind == OFF]
    return {
        "host": host.name,
        "jobs": dict(Counter(one.kind for one in done)),
        "seconds": round(seconds),
        "left on the UNet": {one.kind: one.left for one in done if one.left},
        "plain pictures equal to the first": f"{sum(plain)} of {len(plain)}",
        "MiB": {"second fifth": round(warm), "last fifth": round(end), "growth": round(end / warm - 1, 4)},
        "kept": all(plain) and not any(one.left for one in done) and end / warm - 1 <= GROWTH,
    }


def draw_memory(done: list[Done], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for kind in (OFF, *KINDS):
        places = [number for number, one in enumerate(done) if one.kind == kind]
        axes.plot(places, [done[place].memory for place in places], ".", label=kind)
    axes.set(xlabel="job", ylabel="process memory in MiB", ylim=(0, 1.1 * max(one.memory for one in done)))
    axes.legend(ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    options = parser.parse_args()
    host = Host(options.url)
    if not host.has("/facesnap-probe/state"):
        parser.error("the WebUI was started without the probe extension, tests/live/probe; link it and restart")
    start = time.monotonic()
    done = soak(host, options.jobs)
    found = report(host, done, time.monotonic() - start)
    draw_memory(done, options.out / f"{host.name}.png")
    print(json.dumps(found, indent=2))
    return 0 if found["kept"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
