"""The judges of the second edition: recognition networks, CLIP and DECA applied to generated pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from facesnap_ext.identity import faces
from facesnap_ext.identity.clip import preprocess
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import NoFaceError, square_crop
from facesnap_ext.photos import Photo
from facesnap_lab.miniature.clip_pair import embeddings
from facesnap_lab.miniature.identity import aligned
from facesnap_lab.miniature.second.clip_pair import word_logits
from facesnap_lab.miniature.second.details import PARTS, PHRASES, token_ids
from facesnap_lab.miniature.second.identity import RECIPES

JUDGES = ("judge", "judge_inner", "details")  # `details` recognises a person in a look, the others in any look
SCENE_PARTS = ("expression", "clothes", "background", "light")  # parts of the prompt


@dataclass(frozen=True, eq=False)
class Seen:
    """A face in a picture: its box [4] and five points [5,2], in pixels."""

    picture: np.ndarray
    box: np.ndarray
    keypoints: np.ndarray


class Judges:
    """Networks that measure and never condition.

    Args:
        out: folder of all stages.
    """

    def __init__(self, out: Path) -> None:
        from onnxruntime import InferenceSession

        self.pack = faces.load_pack(out / "identity")
        self.sessions = {
            name: InferenceSession(str(out / name / "recognition.onnx"), providers=["CPUExecutionProvider"])
            for name in JUDGES
        }

    def find(self, picture: np.ndarray) -> Seen | None:
        """Return the largest face of a picture [H,W,3] uint8, or None."""
        try:
            face = faces.find_faces(self.pack, Photo(picture, "Picture"))[0]
        except NoFaceError:
            return None
        return Seen(picture, face.box, face.keypoints)

    def embed(self, name: str, seen: Seen | None) -> np.ndarray | None:
        """Embed a face with one of `JUDGES` as a unit vector; None without a face."""
        if seen is None:
            return None
        points = seen.keypoints[None] + 0.5  # of the detector, whose pixels have their centres at whole numbers
        crop = aligned(seen.picture[None], points, RECIPES[name].zoom).numpy()
        session = self.sessions[name]
        found = session.run(None, {session.get_inputs()[0].name: crop})[0][0]
        return found / np.linalg.norm(found)


@torch.no_grad()
def words_found(clip: Any, faces_seen: Sequence[Seen | None], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """Return whether CLIP finds the right word of each of `SCENE_PARTS`, [N,4]; False without a face.

    Args:
        clip: transformers' CLIPModel of the second edition.
        answers: the index of the right word of each part, [N,4].
    """
    texts = clip.text_model(input_ids=torch.tensor(token_ids(PHRASES))).pooler_output
    phrases = F.normalize(clip.text_projection(texts))
    indices = [list(PARTS).index(part) for part in SCENE_PARTS]
    right = np.zeros((len(faces_seen), len(SCENE_PARTS)), bool)
    for row, seen in enumerate(faces_seen):
        if seen is None:
            continue
        pixels = preprocess([square_crop(seen.picture, seen.box)], clip.config.vision_config.image_size)
        images, _ = embeddings(clip, pixels, torch.tensor(token_ids(PHRASES[:1])))
        logits = word_logits(clip, F.normalize(images), phrases)
        right[row] = [int(logits[index].argmax()) == answer for index, answer in zip(indices, answers[row])]
    return right


def expression_and_pose(encoders: Encoders, seen: Seen | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return DECA's expression codes and head pose (axis-angle [3]) of a face; None without a face."""
    if seen is None:
        return None
    found = encoders.predictor().encode(seen.picture, seen.box)
    return found.expression.numpy(), found.pose[:3].numpy()
