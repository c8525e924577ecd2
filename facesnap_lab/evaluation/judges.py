"""The networks that measure, from files on this disk. None of them should be one that a measured method is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

INCEPTION_SIDE = 299
FACENET_SIDE = 160


@dataclass(frozen=True, eq=False)
class Clip:
    """Both halves of a CLIP. tokens: from texts to token numbers [N,T] and their mask [N,T], None where all count."""

    model: Any  # transformers' CLIPModel
    tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor | None]]
    name: str

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings [N,D] float32, not normalised, of the middle squares of pictures [H,W,3] uint8 RGB."""
        pixels = preprocess(
            [_middle_square(picture) for picture in pictures], self.model.config.vision_config.image_size
        )
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.device, self.model.dtype)).pooler_output
        return self.model.visual_projection(seen).float().cpu().numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [N,D] float32, not normalised; what exceeds CLIP's length is cut off."""
        tokens, mask = self.tokens(texts)
        mask = None if mask is None else mask.to(self.model.device)
        read = self.model.text_model(input_ids=tokens.to(self.model.device), attention_mask=mask).pooler_output
        return self.model.text_projection(read).float().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Extractor:
    """Features for FID: from pictures [H,W,3] uint8 RGB to [N,D]."""

    features: Callable[[Sequence[np.ndarray]], np.ndarray]
    name: str


@dataclass(frozen=True, eq=False)
class Judges:
    """What measures; where there is None, its metrics are not measured."""

    clip: Clip | None = None  # CLIP-T, and with `pack` CLIP-face
    pack: FacePack | None = None  # finds the faces
    embed: Callable[[Face], np.ndarray] | None = None  # FaceSim: from a face that `pack` found to its embedding [E]
    face_name: str = ""  # of the network behind `embed`
    extractor: Extractor | None = None  # FID

    @property
    def names(self) -> dict[str, str | None]:
        """What measured what, for the results."""
        return {
            "clip": self.clip and self.clip.name,
            "face recognition": self.face_name or None,
            "fid features": self.extractor and self.extractor.name,
        }


def find_face(pack: FacePack, photo: Photo) -> Face | None:
    """The largest face, None where there is none."""
    try:
        return faces.find_faces(pack, photo)[0]
    except NoFaceError:
        return None


def load_clip(folder: Path, device: torch.device | str = "cpu") -> Clip:
    """A whole CLIP with its tokenizer, transformers' folder.

    Raises:
        FaceSnapError: it is not one.
    """
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).float()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever it meets
        reason = reason_of(error)
        raise FaceSnapError(
            f"{folder} is not a whole CLIP ({reason}); give transformers' folder with both halves and the tokenizer, "
            "such as clip-vit-large-patch14."
        ) from error
    length = model.config.text_config.max_position_embeddings

    def tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    return Clip(model.to(device).eval().requires_grad_(False), tokens, Path(folder).name)


def load_face_judge(file: Path, pack: FacePack) -> tuple[FacePack, Callable[[Face], np.ndarray]]:
    """A face recognition network: FaceNet in ONNX or TorchScript (160 pixels), or insightface's in ONNX (112 pixels).

    FaceNet sees the detector's box, stretched to a square, as (x − 127.5) / 128 (facenet-pytorch, models/mtcnn.py);
    insightface's networks see the face turned to ArcFace's template.

    Args:
        pack: whose detector finds the faces.

    Returns:
        The pack to find faces with, and the function from a face to its embedding [E].

    Raises:
        FaceSnapError: the file is missing, or none of these.
    """
    if not file.is_file():
        raise FaceSnapError(f"There is no face recognition network {file}; correct its name.")
    try:
        if file.suffix.lower() != ".onnx":
            return pack, _facenet(_torchscript(file))
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=pack.providers)
        inputs = session.get_inputs()[0]
        _, first, _, last = inputs.shape
    except FaceSnapError:
        raise
    except Exception as error:  # onnxruntime's own errors, or an input that is no picture
        reason = reason_of(error)
        raise FaceSnapError(f"{file} cannot be read as a face recognition network ({reason}); use another.") from error
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
    raise FaceSnapError(f"{file} wants pictures of {inputs.shape}; use a FaceNet of 160 or an ArcFace of 112 pixels.")


def load_inception(file: Path, device: torch.device | str = "cpu") -> Extractor:
    """FID's Inception in TorchScript, such as NVIDIA's and clean-fid's inception-2015-12-05.pt; pictures are resized as
    clean-fid does (Parmar et al. 2022).

    Raises:
        FaceSnapError: the file is missing or no TorchScript.
    """
    if not file.is_file():
        raise FaceSnapError(f"There is no Inception {file}; correct its name.")
    network = _torchscript(file).to(device)
    arguments = [argument.name for argument in network.forward.schema.arguments]
    # NVIDIA's gives the classes without this
    asked = {"return_features": True} if "return_features" in arguments else {}

    @torch.no_grad()
    def features(pictures: Sequence[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([resize_float(picture, INCEPTION_SIDE) for picture in pictures]))
        found = network(pixels.permute(0, 3, 1, 2).to(device), **asked)
        return found.flatten(1).double().cpu().numpy()

    return Extractor(features, file.name)


def clip_extractor(clip: Clip) -> Extractor:
    """CLIP's embeddings as features, where there is no Inception."""
    return Extractor(clip.embed_images, f"CLIP {clip.name}")


def resize_float(picture: np.ndarray, side: int) -> np.ndarray:
    """[side,side,3] float32 0…255 of a picture [H,W,3] uint8: bicubic, antialiased, not rounded."""
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
        raise FaceSnapError(f"{file} is no TorchScript ({reason}); export it with torch.jit.trace.") from error


def _middle_square(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]
