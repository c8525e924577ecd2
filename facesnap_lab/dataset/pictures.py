"""From one photo to its training pictures, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import faces
from facesnap_ext.landmarks.predictor import LandmarkPredictor, load_predictor
from facesnap_ext.photos import Photo
from facesnap_lab.dataset import crops, masks
from facesnap_lab.dataset.scan import Drop
from facesnap_lab.training.shards import Sample


@dataclass(frozen=True)
class Settings:
    """What the pictures of a photo depend on.

    resolution: side of a picture in pixels. crops: pictures of a photo; the first is plain, the others are scaled,
    turned, moved and padded. min_face: the longer side of the face's box in pixels of the photo below which a photo is
    left out. min_score: the detector's confidence, 0…1, likewise. jpeg: quality of pictures, None for PNG. device: of
    the networks, "cpu" or "cuda".
    """

    resolution: int = 1024
    crops: int = 5
    min_face: int = 64
    min_score: float = 0.5
    jpeg: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class NetworkFiles:
    face_pack: Path
    deca: Path
    flame: Path


@dataclass(frozen=True)
class Networks:
    pack: faces.FacePack
    predictor: LandmarkPredictor


@lru_cache(maxsize=1)
def load_networks(files: NetworkFiles, device: str) -> Networks:
    """Detector, ArcFace, DECA and FLAME, each of which works in one thread on the CPU.

    Raises:
        FaceSnapError: one is missing or unfit, or onnxruntime has no CUDA where it is asked for.
    """
    pack = faces.load_pack(files.face_pack, device, threads=1)
    if device == "cuda" and "CUDAExecutionProvider" not in pack.providers:
        raise FaceSnapError("onnxruntime runs without CUDA here; install onnxruntime-gpu, or leave out --device cuda.")
    return Networks(pack, load_predictor(files.deca, files.flame, device))


def pictures_of(
    networks: Networks, settings: Settings, photo: Photo, caption: str, person: str, keys: list[str]
) -> Iterator[Sample] | Drop:
    """The pictures of the largest face in a photo, one for each key.

    Points and mask are the photo's own, moved with the crop; so is the box, which stays upright. The embedding is the
    photo's: ArcFace sees the face aligned, wherever and however it stands in the crop.
    """
    try:
        face = faces.find_faces(networks.pack, photo)[0]
    except faces.NoFaceError as error:
        return Drop("no face", str(error))
    if face.score < settings.min_score:
        return Drop(
            "unsure face", f"The detector's confidence is {face.score:.2f} where {settings.min_score} is wanted."
        )
    left, top, right, bottom = face.box
    side = max(right - left, bottom - top)
    if side < settings.min_face:
        return Drop("face too small", f"The face is {side:.0f} pixels large where {settings.min_face} are wanted.")
    return _cut_all(networks.predictor, settings, face, caption, person, keys)


def _cut_all(
    predictor: LandmarkPredictor, settings: Settings, face: faces.Face, caption: str, person: str, keys: list[str]
) -> Iterator[Sample]:
    pixels, resolution = face.photo.pixels, settings.resolution
    height, width = pixels.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    codes = predictor.encode(pixels, face.box)
    landmarks, head = predictor.predict_head(codes, codes)
    outlines = masks.silhouette(head, predictor.flame.faces.cpu().numpy(), 2 * resolution)
    for crop, key in enumerate(keys):
        if crop == 0:
            frame = crops.plain_frame(face.box, width, height, resolution)
        else:
            frame = crops.random_frame(face.box, resolution, crops.random_of(face.photo.digest, crop))
        yield Sample(
            key=key,
            picture=crops.cut(pixels, frame, resolution),
            mask=masks.fill([crops.move(frame, line) for line in outlines], crops.move(frame, corners), resolution),
            embedding=face.embedding,
            caption=caption,
            person=person,
            points=crops.move(frame, landmarks.points),
            box=crops.move_box(frame, face.box),
        )
