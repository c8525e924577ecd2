"""What is said of a photo: by a text beside it, or by BLIP-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from facesnap_ext.errors import FaceSnapError

MAX_TOKENS = 40

Captioner = Callable[[Sequence[np.ndarray]], list[str]]


def read_caption(path: Path) -> str:
    """The caption in a text file, in one line.

    Raises:
        ValueError: the file is empty or no UTF-8 text; the message is a sentence.
        FaceSnapError: it is not there.
    """
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        raise FaceSnapError(f"{path} has gone since the build was begun; put it back.") from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be opened ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text.") from error
    if not text:
        raise ValueError(f"{path.name} is empty.")
    return text


def check_blip2(folder: Path) -> None:
    """Raise `FaceSnapError` where a folder has no transformers model at all."""
    if not (folder / "config.json").is_file():
        raise FaceSnapError(f"There is no BLIP-2 in {folder}; put the files of Salesforce/blip2-opt-2.7b there.")


def load_blip2(folder: Path) -> Captioner:
    """BLIP-2 from a folder on this disk, as `save_pretrained` writes it and the hub has it; nothing is downloaded.

    On a GPU it runs in half precision, without one in single precision. Captions are chosen greedily.

    Source: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training" (2023), by transformers.

    Returns:
        Captions of photos, each [H,W,3] uint8 RGB, in one pass.

    Raises:
        FaceSnapError: the folder is missing, or is not a whole BLIP-2.
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
            f"The BLIP-2 in {folder} cannot be loaded ({' '.join(str(error).split())}); get the whole folder again."
        ) from error
    model = model.eval().requires_grad_(False).to("cuda" if gpu else "cpu")

    def caption(photos: Sequence[np.ndarray]) -> list[str]:
        inputs = processor(images=list(photos), return_tensors="pt").to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return [" ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    return caption
