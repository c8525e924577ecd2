"""Write the miniature world's images as the shards that FaceSnap trains on.

python -m facesnap_lab.miniature.shards --data DIR --pack DIR --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from facesnap_ext.identity import faces
from facesnap_ext.landmarks.points72 import five_points
from facesnap_ext.weights.networks import network_hash
from facesnap_lab.miniature import dataset
from facesnap_lab.training.shards import Sample, write_shards

KEYPOINT_NOISE = 0.5  # standard deviation in pixels, since a detector's points are never exact
PER_SHARD = 2000


def samples(data: Path, pack: Path, seed: int = 0) -> Iterator[Sample]:
    """Yield the images in the training split with the conditioning network's embeddings."""
    from insightface.app.common import Face

    world = dataset.load(data)
    recognition = faces.load_pack(pack).recognition
    networks = {"face_pack": network_hash("face_pack", pack)}
    random = np.random.default_rng(seed)
    for i, picture in enumerate(world.pictures):
        picture, points = np.array(picture), np.array(world.points[i])
        keypoints = five_points(points) - 0.5 + random.normal(0, KEYPOINT_NOISE, (5, 2))
        embedding = recognition.get(picture[:, :, ::-1], Face(kps=keypoints.astype(np.float32)))
        shot = i - int(np.searchsorted(world.people, world.people[i]))
        yield Sample(
            key=f"{world.people[i]:06d}-{shot:02d}",
            image=picture,
            mask=np.array(world.masks[i]),
            embedding=embedding,
            caption=world.captions[i],
            person=f"{world.people[i]:06d}",
            points=points,
            box=np.array(world.boxes[i]),
            networks=networks,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the miniature world's training shards.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the training split")
    parser.add_argument("--pack", type=Path, required=True, help="face model pack with the identity network")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print(*write_shards(options.out, samples(options.data, options.pack), PER_SHARD), sep="\n")
