"""An evaluation that does not need any other files: people of the miniature world, generated and measured by its
networks."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.files import atomic_write
from facesnap_ext.identity import faces
from facesnap_lab.evaluation.draw import Base, EvaluationPipeline
from facesnap_lab.evaluation.judges import Clip, Judges, clip_extractor, load_face_judge
from facesnap_lab.evaluation.protocol import Identity, Pose, Prompt, Protocol
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.captions import scene_caption
from facesnap_lab.miniature.clip_pair import token_ids
from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.shipped import SCALE, STEPS
from facesnap_lab.miniature.world import Scene, person, scene

DRIVER = 199  # the person from the test split whose head shows the poses
REAL_SHOTS = (2, 3, 4)
# yaw, pitch and roll in degrees, and the head's scale within the world's range: the paper's "head orientation and size"
POSES = {
    "front": (0, 0, 0, 8.5),
    "left": (-22, 0, 0, 8.5),
    "half-left": (-11, 0, 0, 8.5),
    "right": (22, 0, 0, 8.5),
    "half-right": (11, 0, 0, 8.5),
    "up": (0, -10, 0, 8.5),
    "down": (0, 10, 0, 8.5),
    "tilted": (0, 0, 8, 8.5),
    "small": (8, 4, -4, 8.0),
    "large": (-8, -4, 4, 9.1),
}
PROMPTS = {
    "red-on-blue": scene_caption("smiling", "red", "blue", "front"),
    "white-on-green": scene_caption("neutral", "white", "green", "left"),
}


def miniature_protocol(folder: Path, people: int, poses: int = len(POSES), prompts: int = len(PROMPTS)) -> Protocol:
    """Render references, real photos and driving photos of the test split's first people into `folder`."""
    driver = person("test", DRIVER)
    driving = []
    for name, seen in list(posed_scenes(scene(driver, 1)).items())[:poses]:
        path = folder / "poses" / f"{name}.png"
        driving.append(Pose(name, save_picture(path, render([driver], [seen], SIDE)[0].picture)))
    identities = []
    for index in range(people):
        who = person("test", index)
        shots = (0, *REAL_SHOTS)
        drawn = render([who] * len(shots), [scene(who, shot) for shot in shots], SIDE)
        paths = [
            save_picture(folder / who.name / f"{shot}.png", rendering.picture) for shot, rendering in zip(shots, drawn)
        ]
        identities.append(Identity(who.name, tuple(paths[:1]), tuple(paths[1:])))
    texts = [Prompt(name, text) for name, text in list(PROMPTS.items())[:prompts]]
    return Protocol(tuple(identities), tuple(driving), tuple(texts))


@lru_cache(maxsize=1)
def miniature_judges() -> Judges:
    """Load the miniature's judge in place of FaceNet, and its CLIP, whose embeddings also serve as features for FID."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(shipped.MODELS / "clip", local_files_only=True).float().eval()
    clip = Clip(model, lambda texts: (token_ids(list(texts)), None), "the miniature's CLIP")
    pack = faces.load_pack(shipped.MODELS / "identity")
    pack, embed = load_face_judge(shipped.JUDGES / "judge.onnx", pack)
    return Judges(clip, pack, embed, "the miniature's judge", clip_extractor(clip))


def miniature_pipeline(
    models: Path, device: torch.device | str = "cpu", steps: int = STEPS, scale: float = SCALE
) -> EvaluationPipeline:
    """Load the miniature's SDXL and FaceSnap.

    Args:
        models: a folder to write the model files to; it must not be removed while the pipeline is in use.
    """
    files = shipped.write_models(models)
    pipe = shipped.base_sampler().pipe.to(device)
    base = Base(pipe, "the miniature's SDXL", SIDE, SIDE, steps, scale)
    return EvaluationPipeline(base, Engine(lambda: files), files)


def posed_scenes(resting: Scene) -> dict[str, Scene]:
    """Return a scene with the head in each of `POSES`."""
    scenes = {}
    for name, (yaw, pitch, roll, size) in POSES.items():
        pose = np.array([*np.radians([pitch, yaw, roll]), resting.pose[3], 0, 0])
        scenes[name] = replace(resting, pose=pose, cam=np.array([size, *resting.cam[1:]]))
    return scenes


def save_picture(path: Path, picture: np.ndarray) -> Path:
    """Write an image [H,W,3] uint8 as PNG atomically, and return its path."""
    with atomic_write(path) as part:
        Image.fromarray(picture).save(part, format="PNG")
    return path
