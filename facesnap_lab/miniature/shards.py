"""Write the miniature world's images as the shards that FaceSnap trains on.

python -m facesnap_lab.miniature.shards --data DIR --pack DIR --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facesnap_ext.identity import faces
from facesnap_ext.landmarks.points72 import five_points
from facesnap_ext.weights.networks import network_hash
from facesnap_lab.miniature import dataset
from facesnap_lab.training.shard_writer import write_shards
from facesnap_lab.training.shards import Sample

KEYPOINT_NOISE = 1 / 128  # standard deviation relative to the side, since a detector's points are never exact
PER_SHARD = 2000


@dataclass(frozen=True, eq=False)
class Source:
    """What the shards are made from: N rendered images, their captions, and the names of the people.

    Only images of the same name are used as each other's references.
    """

    pictures: np.ndarray  # [N,S,S,3] uint8 RGB
    masks: np.ndarray  # [N,S,S] uint8
    points: np.ndarray  # [N,72,2] float32 pixels
    boxes: np.ndarray  # [N,4] float32 pixels
    captions: Sequence[str]
    people: Sequence[str]


def samples(source: Source, pack: Path, seed: int = 0) -> Iterator[Sample]:
    """Yield the images with the conditioning network's embeddings. Images of a person follow each other."""
    from insightface.app.common import Face

    recognition = faces.load_pack(pack).recognition
    networks = {"face_pack": network_hash("face_pack", pack)}
    random = np.random.default_rng(seed)
    noise, shot = KEYPOINT_NOISE * source.pictures.shape[1], 0
    for i, name in enumerate(source.people):
        picture, points = np.array(source.pictures[i]), np.array(source.points[i])
        keypoints = five_points(points) - 0.5 + random.normal(0, noise, (5, 2))
        embedding = recognition.get(picture[:, :, ::-1], Face(kps=keypoints.astype(np.float32)))
        shot = shot + 1 if i and name == source.people[i - 1] else 0
        yield Sample(
            key=f"{name}-{shot:02d}",
            image=picture,
            mask=np.array(source.masks[i]),
            embedding=embedding,
            caption=source.captions[i],
            person=name,
            points=points,
            box=np.array(source.boxes[i]),
            networks=networks,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the miniature world's training shards.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the training split")
    parser.add_argument("--pack", type=Path, required=True, help="face model pack with the identity network")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    world = dataset.load(options.data)
    people = [f"{person:06d}" for person in world.people]
    source = Source(world.pictures, world.masks, world.points, world.boxes, world.captions, people)
    print(*write_shards(options.out, samples(source, options.pack), PER_SHARD), sep="\n")
