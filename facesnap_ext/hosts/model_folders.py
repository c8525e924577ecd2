"""Where FaceSnap looks for model files: in its own folder, and in folders of the WebUI and other programs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.search import find_models


def model_files() -> ModelFiles:
    """The model files of the running WebUI, according to its command line and settings."""
    from modules import paths, shared

    def option(name: str) -> Path | None:  # extensions add options only when the WebUI starts
        value = getattr(shared.cmd_opts, name, None)
        return Path(value) if value else None

    def setting(name: str) -> Path | None:
        value = getattr(shared.opts, name, None)
        return Path(value) if value else None

    models = Path(paths.models_path)
    controlnet = [option("controlnet_dir"), setting("control_net_models_path")]
    annotators = [
        option("controlnet_preprocessor_models_dir"),
        option("controlnet_annotator_models_path"),
        setting("control_net_modules_path"),
    ]
    shared_folders = shared_model_folders(
        models,
        Path(paths.data_path),
        controlnet=[folder for folder in controlnet if folder],
        annotators=[folder for folder in annotators if folder],
        named=map(Path, getattr(shared.cmd_opts, "facesnap_also_look_in", None) or []),
    )
    return find_models(option("facesnap_models_dir") or models / "facesnap", shared_folders)


def shared_model_folders(
    models: Path,
    data: Path,
    controlnet: Iterable[Path] = (),
    annotators: Iterable[Path] = (),
    named: Iterable[Path] = (),
) -> tuple[Path, ...]:
    """Folders to search after FaceSnap's own, in this order; they need not exist.

    Args:
        models: the WebUI's `models` folder.
        data: the WebUI's folder with `extensions`. ComfyUI may be next to it.
        controlnet: further folders of ControlNet models (`--controlnet-dir`).
        annotators: further folders of ControlNet's preprocessors. They hold many models in formats that are slow to
            recognise, so only their CLIP and insightface folders are searched.
        named: folders that the user named (`--facesnap-also-look-in`), such as the `models` folder of a ComfyUI
            elsewhere.
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
