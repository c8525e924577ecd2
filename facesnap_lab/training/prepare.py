"""Load everything that a training run needs, and check that the parts match."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import facesnap_lab.ablated_mixers  # noqa: F401 (registers the ablated Mixers, so that files with them load)
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.facesnap_file import FaceSnapInfo
from facesnap_ext.weights.network_names import TITLES
from facesnap_ext.weights.networks import network_hash
from facesnap_ext.weights.sources import combine_sources
from facesnap_lab.rivals.attention import install
from facesnap_lab.rivals.method import Rival
from facesnap_lab.rivals.methods import METHODS
from facesnap_lab.training import checkpoints, uploads
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.data import ImageSizes, TrainingImages
from facesnap_lab.training.exclusions import read_exclusions
from facesnap_lab.training.frozen import Frozen, load_frozen
from facesnap_lab.training.networks import TokensInText, TrainedNetworks, checkpoint_activations
from facesnap_lab.training.objective import Objective
from facesnap_lab.training.provenance import leave_out, read_sources
from facesnap_lab.training.run import Run
from facesnap_lab.training.shards import read_networks, read_shard_index


def prepare_run(config: TrainConfig, resume: bool = False) -> Run:
    """Load and check everything that a run needs.

    Raises:
        FaceSnapError: a file is missing or does not match the others, or the run's folder cannot be used.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation, mixed_precision=config.mixed_precision
    )
    _check_fsdp(accelerator, config.method)
    if accelerator.is_main_process:
        checkpoints.prepare_out(config.out, resume)
    accelerator.wait_for_everyone()
    if config.upload is not None:
        if accelerator.is_local_main_process:
            uploads.prepare(config.upload, config.out, resume)
        accelerator.wait_for_everyone()

    index = read_shard_index(config.shards)
    if config.exclude:
        index, message = leave_out(index, read_exclusions(config.exclude))
        if accelerator.is_main_process:
            print(message, file=sys.stderr)
    start = facesnap_file.load(config.start)
    frozen = load_frozen(config, accelerator.device)
    sizes = _image_sizes(config, start.info, frozen)
    hint = start.info.hint if config.method == "facesnap" else METHODS[config.method].hint
    images = TrainingImages(index, sizes, config.seed, config.reference, config.landmarks, config.jitter, hint)
    _check_fit(config, start.info, frozen, images)
    networks_used = _check_networks(config, start.info, frozen, read_networks(index))
    recognition = start.info.recognition if frozen.arcface is None else frozen.arcface.name
    sources = combine_sources(start.info.sources, read_sources(index))
    info = replace(start.info, networks=networks_used, recognition=recognition, sources=sources)

    file_dtype = start.ffrnet.dtype
    networks, build = _trained_networks(config, start, frozen)
    networks, optimizer = accelerator.prepare(networks, _optimizer(config, networks, accelerator))
    return Run(
        config=config,
        accelerator=accelerator,
        info=info,
        file_dtype=file_dtype,
        networks=networks,
        build=build,
        optimizer=optimizer,
        average=[parameter.detach().clone() for parameter in networks.parameters()],
        frozen=frozen,
        images=images,
        objective=_objective(config, start.info),
    )


def _check_fsdp(accelerator: Any, method: str) -> None:
    """FFRNet calls parts of its blocks outside of their `forward`, where FSDP would not have gathered their weights;
    a UNet does so with a rival's LoRAs."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and method != "facesnap":
        raise FaceSnapError(f"FSDP cannot shard '{method}'; use DDP, whose processes hold all of its weights.")
    if plugin is not None and plugin.auto_wrap_policy is not None:
        raise FaceSnapError(
            "FSDP can shard FFRNet and the Mixer only as a whole; set 'fsdp_auto_wrap_policy' to NO_WRAP in the "
            "configuration of accelerate."
        )


def _image_sizes(config: TrainConfig, info: FaceSnapInfo, frozen: Frozen) -> ImageSizes:
    multiple = frozen.vae_scale * 2 ** (len(frozen.unet.config.block_out_channels) - 1)
    if config.resolution % multiple:
        raise FaceSnapError(
            f"'resolution' is {config.resolution} but must be a multiple of {multiple} for {config.base.name}; "
            "correct it."
        )
    side = config.resolution // frozen.vae_scale
    return ImageSizes(config.resolution, side, info.ffrnet.pixels_per_latent * side, frozen.clip.image_size)


def _check_fit(config: TrainConfig, info: FaceSnapInfo, frozen: Frozen, images: TrainingImages) -> None:
    name = config.start.name
    widths = tuple(frozen.unet.config.block_out_channels)
    if widths != info.ffrnet.widths:
        raise FaceSnapError(
            f"{name} was created for a UNet with widths {info.ffrnet.widths}, but {config.base.name} has {widths}; "
            "create it from this base with 'facesnap init'."
        )
    if frozen.clip.width != info.mixer.clip_dim:
        raise FaceSnapError(
            f"{name} expects CLIP tokens of {info.mixer.clip_dim} dimensions, but {config.clip.name} has "
            f"{frozen.clip.width}; use the image encoder that the file was created for."
        )
    id_dim = len(images.read(0).embedding)
    if id_dim != info.mixer.id_dim:
        raise FaceSnapError(
            f"{name} expects ArcFace embeddings of {info.mixer.id_dim} dimensions, but those in "
            f"{config.shards[0].name} have {id_dim}; build the shards with the face model pack that the file was "
            "created for."
        )


def _check_networks(
    config: TrainConfig, info: FaceSnapInfo, frozen: Frozen, in_shards: dict[str, str]
) -> dict[str, str]:
    """Check, by the networks' content, that shards, L_id, the image encoder and the start file belong together.

    Returns:
        The networks that the trained file is made for, see `FaceSnapInfo.networks`.

    Raises:
        FaceSnapError: the shards do not name their recognition model, or two of these were made with different
            networks.
    """
    shard, pack = config.shards[0].name, config.face_pack
    if "face_pack" not in in_shards:
        raise FaceSnapError(
            f"{shard} does not name the recognition model that its embeddings come from; build the shards again."
        )
    if frozen.arcface is not None and frozen.arcface.content != in_shards["face_pack"]:
        raise FaceSnapError(
            f"The embeddings in {shard} come from a different recognition model than {frozen.arcface.name} in {pack}, "
            "with which the identity loss compares them; set 'face_pack' to the pack that the shards were built with."
        )
    networks = {**in_shards, **({"clip": network_hash("clip", config.clip)} if info.mixer.clip_dim else {})}
    for part, expected in info.networks.items():
        if networks.get(part, expected) != expected:
            origin = config.clip.name if part == "clip" else shard
            raise FaceSnapError(
                f"{config.start.name} was trained with a different {TITLES[part]} than {origin}; use the same one, "
                "or start from a file that has not been trained."
            )
    return networks


def _trained_networks(
    config: TrainConfig, start: facesnap_file.FaceSnapWeights, frozen: Frozen
) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Return the networks to train, and a function that creates networks of the same sizes."""
    start.mixer.requires_grad_(True)
    start.ffrnet.requires_grad_(True)
    if config.method == "facesnap":
        kind = TrainedNetworks if config.tokens == "ffrnet" else TokensInText
        networks: nn.Module = kind(start.mixer, start.ffrnet)
        build = partial(_build_facesnap, start.info)
    else:
        networks = _rival(config, start, frozen)
        build = partial(type(networks), networks.config)
    networks.train()
    for parameter in networks.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)  # copy: the file is memory-mapped
    if config.gradient_checkpointing:
        checkpoint_activations(networks)
    return networks, build


def _build_facesnap(info: FaceSnapInfo) -> TrainedNetworks:
    return TrainedNetworks(facesnap_file.build_mixer(info.mixer), FFRNet(info.ffrnet))


def _rival(config: TrainConfig, start: facesnap_file.FaceSnapWeights, frozen: Frozen) -> Rival:
    """Create a rival, with initial weights from the run's seed, and let it into the frozen UNets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rival = METHODS[config.method].create(start, frozen.unet)
    for unet in {id(one): one for one in (frozen.unet, frozen.few_step and frozen.few_step.unet) if one}.values():
        install(unet)
    return rival


def _optimizer(config: TrainConfig, networks: nn.Module, accelerator: Any) -> torch.optim.AdamW:
    mixer_rate = config.mixer_rate if config.method == "facesnap" else 1.0  # a rival's mixer is not the Mixer
    mixer = {name: parameter for name, parameter in networks.named_parameters() if name.startswith("mixer.")}
    others = [parameter for name, parameter in networks.named_parameters() if name not in mixer]
    groups = [{"params": others, "rate": 1.0}, {"params": list(mixer.values()), "rate": mixer_rate}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        if plugin.zero_stage == 3:
            raise FaceSnapError(
                "The moving average cannot be computed with DeepSpeed's ZeRO stage 3; use stage 2 or lower, or FSDP."
            )
        # DeepSpeed cannot infer it, because the data loader is not accelerate's
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
    return optimizer


def _objective(config: TrainConfig, info: FaceSnapInfo) -> Objective:
    return Objective(
        method=METHODS.get(config.method),
        text_free=info.text_free,
        size_dim=info.ffrnet.size_dim,
        drop_text=config.drop_text,
        lightning_scale=config.lightning_scale,
        outside=config.outside,
        terminal=config.terminal,
        snr_bounds=(config.snr_low, config.snr_high) if config.snr_weights else None,
        id_weight=config.id_weight,
        lightning_steps=config.lightning_steps,
        lightning_grad_steps=config.lightning_grad_steps,
    )
