"""Outlines of how Forge's forks load a network into too little GPU memory, and a CPU that stands in for the GPU.

`Elsewhere` is a tensor that is not on the GPU. Computing with it and with another tensor fails, unless it was copied
with `to` before.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class Elsewhere(Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "to":
            copied = args[0].as_subclass(Tensor).to(*args[1:], **kwargs)
            return copied if isinstance(args[1], torch.device) else copied.as_subclass(cls)
        if any(isinstance(value, Tensor) and not isinstance(value, Elsewhere) for value in (*args, *kwargs.values())):
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(function, types, args, kwargs)


def send(module: nn.Module, away: bool) -> None:
    """Move a layer's own weights out of the GPU or back."""
    for name, weight in module.named_parameters(recurse=False):
        data = weight.detach().as_subclass(Elsewhere if away else Tensor)
        setattr(module, name, nn.Parameter(data, requires_grad=False))


def size_of(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


class ModelPatcher:
    """What the hosts' patchers have in common; see Neo's `backend/patcher/base.py`, reForge's
    `ldm_patched/modules/model_patcher.py` and Forge's `backend/memory_management.py`.

    Attributes:
        casting: the attribute of layers that may be left on the CPU.
    """

    casting = "parameters_manual_cast"

    def __init__(self, model: nn.Module, load_device: str = "gpu", offload_device: str = "cpu"):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        for module in model.modules():
            send(module, away=True)

    def partially_load(self, memory: float) -> int:
        """Load layers, the largest first, for as long as they fit, and return how many are left on the CPU.

        Without the attribute, a layer is loaded if it fits, and otherwise left behind as well. Parameters of modules
        that are not leaves are not loaded.
        """
        leaves = [module for module in self.model.modules() if not list(module.children())]
        left = 0
        for module in sorted(leaves, key=size_of, reverse=True):
            fits = memory > size_of(module)
            memory -= size_of(module) if fits else 0
            left += not fits
            send(module, away=not fits)
            if hasattr(module, self.casting) and not fits:
                setattr(module, self.casting, True)
        return left

    def detach(self) -> None:
        for module in self.model.modules():
            send(module, away=True)
            if hasattr(module, self.casting):
                setattr(module, self.casting, False)

    def model_dtype(self) -> torch.dtype:
        return torch.float32


class Loaded:
    """The host's list of loaded networks, which refers weakly to patchers and their networks."""

    def __init__(self) -> None:
        self.entries: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []
        self.requests: list[Any] = []

    def load(self, patchers: list[Any]) -> None:
        assert not self.leaked()
        for patcher in patchers:
            if not any(known() is patcher for known, _ in self.entries):
                self.requests.append(weakref.ref(patcher))
                self.entries.append((weakref.ref(patcher), weakref.ref(patcher.model)))

    def leaked(self) -> list[Any]:
        """Networks that still exist although their patcher does not: "Memory leak with model …"."""
        return [model() for patcher, model in self.entries if patcher() is None and model() is not None]
