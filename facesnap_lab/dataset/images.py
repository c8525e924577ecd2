"""Make training images from one photo, or state why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import faces
from facesnap_ext.landmarks.predictor import LandmarkPredictor, load_predictor
from facesnap_ext.photos import Photo
from facesnap_ext.turns import turned
from facesnap_ext.weights.networks import network_hash
from facesnap_lab.dataset import crops, masks
from facesnap_lab.dataset.scan import SkippedPhoto
from facesnap_lab.training.shards import Sample


@dataclass(frozen=True)
class Settings:
    """Settings of the training images.

    resolution: side of an image in pixels. crops: images per photo; the first is upright and centred, the others are
    randomly scaled, rotated, shifted and padded. min_face: minimum length of the longer side of the face's box, in
    pixels of the photo. min_score: minimum detector confidence, 0…1. jpeg: JPEG quality, None for PNG. device:
    the networks' device, "cpu" or "cuda".
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
    """The loaded networks. hashes: the networks' content hashes, for the shards."""

    pack: faces.FacePack
    predictor: LandmarkPredictor
    hashes: dict[str, str]


@lru_cache(maxsize=1)
def load_networks(files: NetworkFiles, device: str) -> Networks:
    """Load detector, ArcFace, DECA and FLAME. On the CPU, each uses one thread.

    Raises:
        FaceSnapError: a model is missing or unsuitable, or onnxruntime does not support CUDA although it is requested.
    """
    pack = faces.load_pack(files.face_pack, device, threads=1)
    if device == "cuda" and "CUDAExecutionProvider" not in pack.providers:
        raise FaceSnapError(
            "The installed onnxruntime does not support CUDA; install onnxruntime-gpu, or omit --device cuda."
        )
    return Networks(pack, load_predictor(files.deca, files.flame, device), network_hashes(files))


def network_hashes(files: NetworkFiles) -> dict[str, str]:
    """Return the content hashes of the networks that compute embeddings and points, by the names that shards use."""
    return {part: network_hash(part, path) for part, path in vars(files).items()}


def training_images(
    networks: Networks,
    settings: Settings,
    photo: Photo,
    caption: str,
    person: str,
    keys: list[str],
    provenance: Mapping[str, str],
) -> Iterator[Sample] | SkippedPhoto:
    """Make training images of the largest face in a photo, one per key.

    Points, mask and box are computed in the photo and transformed to the crop; the box stays upright. The embedding is
    computed in the photo, because ArcFace aligns the face wherever it lies in the crop.
    """
    try:
        face = faces.find_faces(networks.pack, photo)[0]
        if face.turn:
            photo = Photo(np.ascontiguousarray(turned(photo.pixels, face.turn)), photo.name)
            face = faces.find_faces(networks.pack, photo)[0]
    except faces.NoFaceError as error:
        return SkippedPhoto("no face", str(error))
    if face.score < settings.min_score:
        return SkippedPhoto(
            "low confidence",
            f"The detector's confidence is {face.score:.2f}, below the minimum of {settings.min_score}.",
        )
    left, top, right, bottom = face.box
    side = max(right - left, bottom - top)
    if side < settings.min_face:
        return SkippedPhoto(
            "face too small", f"The face is {side:.0f} pixels in size, below the minimum of {settings.min_face}."
        )
    images = _crop_all(networks, settings, face, caption, person, keys)
    return (replace(image, provenance=provenance) for image in images)


def _crop_all(
    networks: Networks, settings: Settings, face: faces.Face, caption: str, person: str, keys: list[str]
) -> Iterator[Sample]:
    predictor = networks.predictor
    pixels, resolution = face.photo.pixels, settings.resolution
    height, width = pixels.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    codes = predictor.encode(pixels, face.box)
    landmarks, head = predictor.predict_head(codes, codes)
    outlines = masks.silhouette(head, predictor.flame.faces.cpu().numpy(), 2 * resolution)
    for crop, key in enumerate(keys):
        if crop == 0:
            transform = crops.plain_transform(face.box, width, height, resolution)
        else:
            transform = crops.random_transform(face.box, resolution, crops.crop_rng(face.photo.digest, crop))
        head_outlines = [crops.transform_points(transform, outline) for outline in outlines]
        yield Sample(
            key=key,
            image=crops.warp(pixels, transform, resolution),
            mask=masks.fill_mask(head_outlines, crops.transform_points(transform, corners), resolution),
            embedding=face.embedding,
            caption=caption,
            person=person,
            points=crops.transform_points(transform, landmarks.points),
            box=crops.transform_box(transform, face.box),
            networks=networks.hashes,
        )
