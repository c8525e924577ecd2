"""The networks used for measuring, loaded from local files. None of them should also condition a measured method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.identity import faces
from facesnap_ext.identity.clip import preprocess
from facesnap_ext.identity.faces import Face, FacePack, NoFaceError
from facesnap_ext.photos import Photo
from facesnap_ext.weights.search import find_models
from facesnap_lab.workers import local_gpu

INCEPTION_SIDE = 299
FACENET_SIDE = 160


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP's image and text encoders. tokens: maps texts to token ids [N,T] and a mask [N,T], or None for no mask."""

    model: Any  # transformers' CLIPModel
    tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor | None]]
    name: str

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Embed the central squares of images [H,W,3] uint8 RGB as [N,D] float32, not normalised."""
        pixels = preprocess(
            [_central_square(picture) for picture in pictures], self.model.config.vision_config.image_size
        )
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.device, self.model.dtype)).pooler_output
        return self.model.visual_projection(seen).float().cpu().numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts as [N,D] float32, not normalised; texts longer than CLIP's context are truncated."""
        tokens, mask = self.tokens(texts)
        mask = None if mask is None else mask.to(self.model.device)
        read = self.model.text_model(input_ids=tokens.to(self.model.device), attention_mask=mask).pooler_output
        return self.model.text_projection(read).float().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Extractor:
    """Features for FID: maps images [H,W,3] uint8 RGB to [N,D]."""

    features: Callable[[Sequence[np.ndarray]], np.ndarray]
    name: str


@dataclass(frozen=True, eq=False)
class Judges:
    """The networks used for measuring; metrics that need a missing network are skipped."""

    clip: Clip | None = None  # CLIP-T, and CLIP-face together with `pack` unless there is `embed_look`
    pack: FacePack | None = None  # detects the faces
    embed: Callable[[Face], np.ndarray] | None = None  # FaceSim: maps a face detected by `pack` to its embedding [E]
    face_name: str = ""  # name of the network behind `embed`
    extractor: Extractor | None = None  # FID
    embed_look: Callable[[Face], np.ndarray] | None = None  # CLIP-face, in place of CLIP
    look_name: str = ""  # name of the network behind `embed_look`

    def clip_face(self, face: Face) -> np.ndarray | None:
        """Embed a face for CLIP-face; None without a network for it."""
        if self.embed_look is not None:
            return self.embed_look(face)
        return self.clip.embed_images([face.crop])[0] if self.clip else None

    @property
    def names(self) -> dict[str, str | None]:
        """The networks' names for the report."""
        return {
            "clip": self.clip and self.clip.name,
            "clip face": self.look_name or (self.clip and self.clip.name),
            "face recognition": self.face_name or None,
            "fid features": self.extractor and self.extractor.name,
        }


@dataclass(frozen=True)
class JudgeFiles:
    """The files of the judges, from which each process loads its own. models: the folder with the face detector."""

    clip: Path | None = None
    facenet: Path | None = None
    inception: Path | None = None
    models: Path | None = None


@lru_cache(maxsize=1)
def load_judges(files: JudgeFiles, device: torch.device | str | None = None) -> Judges:
    """Load the networks.

    Args:
        device: None for this process's GPU, or the CPU if there is none.

    Raises:
        FaceSnapError: a file is missing or unsuitable, or there is no face detector.
    """
    device = torch.device(device or (f"cuda:{local_gpu()}" if torch.cuda.is_available() else "cpu"))
    clip = load_clip(files.clip, device) if files.clip else None
    extractor = load_inception(files.inception, device) if files.inception else None
    pack = embed = None
    if clip or files.facenet:
        if files.models is None:
            raise FaceSnapError("CLIP-face and FaceSim need a face detector; specify its folder with --models.")
        face_pack = find_models(files.models).require("face_pack")
        pack = faces.load_pack(face_pack, "cuda" if device.type == "cuda" else "cpu")
    if files.facenet:
        pack, embed = load_face_judge(files.facenet, pack)
    return Judges(clip, pack, embed, files.facenet.name if files.facenet else "", extractor)


def find_face(pack: FacePack, photo: Photo) -> Face | None:
    """Detect the largest face; None if there is no face."""
    try:
        return faces.find_faces(pack, photo)[0]
    except NoFaceError:
        return None


def load_clip(folder: Path, device: torch.device | str = "cpu") -> Clip:
    """Load a complete CLIP with its tokenizer from a folder in transformers' layout.

    Raises:
        FaceSnapError: the folder does not contain a complete CLIP.
    """
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).float()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises errors of many types
        reason = reason_of(error)
        raise FaceSnapError(
            f"{folder} is not a complete CLIP ({reason}); use a folder in transformers' layout with image encoder, "
            "text encoder and tokenizer, such as clip-vit-large-patch14."
        ) from error
    length = model.config.text_config.max_position_embeddings

    def tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    return Clip(model.to(device).eval().requires_grad_(False), tokens, Path(folder).name)


def load_face_judge(file: Path, pack: FacePack) -> tuple[FacePack, Callable[[Face], np.ndarray]]:
    """Load a face recognition network: FaceNet (160 pixels, ONNX or TorchScript) or insightface's (112 pixels, ONNX).

    FaceNet receives the detector's box, stretched to a square, as (x − 127.5) / 128 (facenet-pytorch, models/mtcnn.py).
    insightface's networks receive the face aligned to ArcFace's template.

    Args:
        pack: provides the face detector.

    Returns:
        The pack to detect faces with, and a function from a face to its embedding [E].

    Raises:
        FaceSnapError: the file is missing or is not such a network.
    """
    if not file.is_file():
        raise FaceSnapError(f"The face recognition network {file} does not exist; correct its name.")
    try:
        if file.suffix.lower() != ".onnx":
            return pack, _facenet(_torchscript(file))
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=pack.providers)
        inputs = session.get_inputs()[0]
        _, first, _, last = inputs.shape
    except FaceSnapError:
        raise
    except Exception as error:  # onnxruntime's own errors, or an input that is not an image
        reason = reason_of(error)
        raise FaceSnapError(
            f"{file} cannot be read as a face recognition network ({reason}); use a different file."
        ) from error
    side = last if first == 3 else first
    if side == FACENET_SIDE:
        order = (0, 1, 2, 3) if first == 3 else (0, 2, 3, 1)

        def run(pixels: Tensor) -> np.ndarray:
            return session.run(None, {inputs.name: pixels.permute(order).numpy()})[0]

        return pack, _facenet(run)
    if side == 112 and first == 3:
        from insightface.model_zoo import get_model

        judge = get_model(str(file), providers=pack.providers)
        return replace(pack, recognition=judge), lambda face: face.embedding
    raise FaceSnapError(
        f"{file} expects images of shape {inputs.shape}; use a FaceNet (160 pixels) or an ArcFace (112 pixels)."
    )


def load_inception(file: Path, device: torch.device | str = "cpu") -> Extractor:
    """Load the Inception network for FID from TorchScript, such as inception-2015-12-05.pt from NVIDIA and clean-fid.

    Images are resized as in clean-fid (Parmar et al., 2022).

    Raises:
        FaceSnapError: the file is missing or not TorchScript.
    """
    if not file.is_file():
        raise FaceSnapError(f"The Inception network {file} does not exist; correct its name.")
    network = _torchscript(file).to(device)
    arguments = [argument.name for argument in network.forward.schema.arguments]
    # NVIDIA's Inception returns classes by default
    options = {"return_features": True} if "return_features" in arguments else {}

    @torch.no_grad()
    def features(pictures: Sequence[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([resize_float(picture, INCEPTION_SIDE) for picture in pictures]))
        output = network(pixels.permute(0, 3, 1, 2).to(device), **options)
        return output.flatten(1).double().cpu().numpy()

    return Extractor(features, file.name)


def clip_extractor(clip: Clip) -> Extractor:
    """Use CLIP's embeddings as features in place of Inception features."""
    return Extractor(clip.embed_images, clip.name)


def resize_float(picture: np.ndarray, side: int) -> np.ndarray:
    """Resize an image [H,W,3] uint8 to [side,side,3] float32 0…255: bicubic, antialiased, not rounded."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC))
        for channel in picture.astype(np.float32).transpose(2, 0, 1)
    ]
    return np.stack(channels, axis=2).clip(0, 255)


def _facenet(run: Callable[[Tensor], Any]) -> Callable[[Face], np.ndarray]:
    def embed(face: Face) -> np.ndarray:
        height, width = face.photo.pixels.shape[:2]
        left, top, right, bottom = np.clip(face.box, 0, [width, height, width, height])
        left, top = int(min(left, width - 1)), int(min(top, height - 1))
        crop = face.photo.pixels[top : max(top + 1, int(bottom)), left : max(left + 1, int(right))]
        square = Image.fromarray(crop).resize((FACENET_SIDE, FACENET_SIDE), Image.Resampling.BILINEAR)
        pixels = (torch.from_numpy(np.array(square, np.float32)) - 127.5) / 128
        with torch.no_grad():
            found = run(pixels.permute(2, 0, 1)[None].contiguous())
        return np.asarray(found, np.float32).reshape(-1)

    return embed


def _torchscript(file: Path) -> Any:
    try:
        return torch.jit.load(str(file), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = reason_of(error, 200)
        raise FaceSnapError(f"{file} is not TorchScript ({reason}); export it with torch.jit.trace.") from error


def _central_square(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]
