"""Where a WebUI and other programs keep models that FaceSnap can share, so that nobody stores them twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def usual_places(
    models: Path,
    data: Path,
    controlnet: Iterable[Path] = (),
    annotators: Iterable[Path] = (),
    named: Iterable[Path] = (),
) -> tuple[Path, ...]:
    """Folders to look through after FaceSnap's own, in that order; they need not be there.

    Args:
        models: the WebUI's `models`.
        data: the WebUI's folder with `extensions`, beside which ComfyUI may be.
        controlnet: where else ControlNet's models are (`--controlnet-dir`).
        annotators: where else its preprocessors keep theirs. Of these, of which there are many in formats that cannot
            be recognised fast, only the folders of CLIP and insightface are looked through.
        named: folders that the user named (`--facesnap-also-look-in`), such as the `models` of a ComfyUI elsewhere.
    """
    extension = data / "extensions" / "sd-webui-controlnet"
    annotators = (*annotators, models / "ControlNetPreprocessor", extension / "annotator" / "downloads")
    return (
        *named,
        models / "insightface",
        Path.home() / ".insightface" / "models",
        *controlnet,
        models / "ControlNet",
        extension / "models",
        *(folder / name for folder in annotators for name in ("clip_vision", "insightface")),
        *(data.parent / comfyui / "models" for comfyui in ("ComfyUI", "ComfyUI_windows_portable/ComfyUI")),
    )
