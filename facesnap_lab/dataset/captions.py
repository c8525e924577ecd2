"""Captions of photos: from a text file next to the photo, or from BLIP-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.storage import Location
from facesnap_lab.workers import local_gpu

MAX_TOKENS = 40

Captioner = Callable[[Sequence[np.ndarray]], list[str]]


def read_caption(path: Location) -> str:
    """Read the caption in a text file, as one line.

    Raises:
        ValueError: the file is empty or not UTF-8; the message is a sentence for the report.
        FaceSnapError: the file does not exist, or its object store fails.
    """
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        raise FaceSnapError(f"{path} has been removed since the build was started; put it back.") from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be opened ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text.") from error
    if not text:
        raise ValueError(f"{path.name} is empty.")
    return text


def check_blip2(folder: Path) -> None:
    """Raise `FaceSnapError` if a folder contains no transformers model."""
    if not (folder / "config.json").is_file():
        raise FaceSnapError(
            f"{folder} does not contain a BLIP-2 model; put the files of Salesforce/blip2-opt-2.7b there."
        )


@lru_cache(maxsize=1)
def load_blip2(folder: Path) -> Captioner:
    """Load BLIP-2 from a local folder in the format of `save_pretrained` and the Hugging Face Hub.

    It runs in half precision on a GPU, in single precision on the CPU, and decodes greedily. Nothing is downloaded.

    Source: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training" (2023), as implemented in transformers.

    Returns:
        A function that captions a batch of photos, each [H,W,3] uint8 RGB.

    Raises:
        FaceSnapError: the folder is missing, or does not contain a complete BLIP-2 model.
    """
    import torch
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    check_blip2(folder)
    gpu = torch.cuda.is_available()
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = Blip2ForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.float16 if gpu else torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FaceSnapError(
            f"BLIP-2 in {folder} cannot be loaded ({' '.join(str(error).split())}); download the folder again."
        ) from error
    model = model.eval().requires_grad_(False).to(f"cuda:{local_gpu()}" if gpu else "cpu")

    def caption(photos: Sequence[np.ndarray]) -> list[str]:
        inputs = processor(images=list(photos), return_tensors="pt").to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return [" ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    return caption
