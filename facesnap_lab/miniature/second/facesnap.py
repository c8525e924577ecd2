"""Write the inputs of `facesnap train` for the second edition: shards, the start file, and the settings.

A reference and its target share a look, so the tokens have to carry hair, glasses and beard as well as the face.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from facesnap_lab.miniature.second.base import captions_of
from facesnap_lab.miniature.second.dataset import World
from facesnap_lab.miniature.second.render import SIDE
from facesnap_lab.miniature.shards import PER_SHARD, Source, samples
from facesnap_lab.miniature.start import SETTINGS, write_start
from facesnap_lab.training.shard_writer import write_shards

CHANGES: dict[str, Any] = {
    "resolution": SIDE,
    "landmark_jitter": 1.4,
    "batch_size": 6,
    "steps": 12_000,
    "trained_on": "the second edition of FaceSnap's miniature world",
}


def write_inputs(world: World, out: Path) -> Path:
    """Write `out/shards` and, in `out/facesnap`, `start.safetensors` and `train.yaml`; return the latter.

    Args:
        world: the images of the training split.
        out: folder of all stages; `identity`, `clip`, `base` and `lightning` must be complete.
    """
    people = [f"{person:06d}-{look}" for person, look in zip(world.people.tolist(), world.looks.tolist())]
    captions = captions_of("train", len(people))
    source = Source(world.pictures, world.masks, world.points, world.boxes, captions, people)
    pack, folder = out / "identity", out / "facesnap"
    folder.mkdir(exist_ok=True)
    if not any((out / "shards").glob("*.tar")):
        write_shards(out / "shards", samples(source, pack), PER_SHARD)
    return write_start(
        out / "base" / "pipeline",
        out / "clip" / "model",
        pack,
        out / "shards",
        folder,
        out / "lightning" / "lightning.safetensors",
        SETTINGS | CHANGES,
    )
