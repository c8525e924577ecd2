"""Forge and reForge: residuals are an additional link in the UNet patcher's chain of controls.

Both hosts drop the patched UNet after each job. reForge's signatures differ (`transformer_options` is an argument, rows
are marked only by `cond_or_uncond`, `model_sampling` replaces `predictor`), which duck typing covers. The link adds its
residuals in a patch of the output blocks, which sees the size of the features. Before each evaluation of the UNet
`on_cfg_denoiser` reports the progress of the pass. Sigmas would only give the fraction of the whole noise schedule, but
hires fix and img2img run only its end. An adapter's hooks are on the UNet itself, which all jobs share: they act only
in calls whose options were marked by their own control.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning, ffrnets
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.attention import AdapterHooks, Call
from facesnap_ext.hosts.controls import Control, Parts, adding, merge
from facesnap_ext.hosts.errors import Refusal, refusal_of, report_stop
from facesnap_ext.hosts.patchers import patchers_of
from facesnap_ext.hosts.progress import Progress, prompt_parts
from facesnap_ext.hosts.stopping import shown_errors
from facesnap_ext.hosts.unet import REFINER_DIFFERS, check_fit
from facesnap_ext.residuals import Residuals

CALL = "facesnap"  # key in a UNet call's transformer options: the control, and what its adapters do in this call
_attached: weakref.ref[ControlLink] | None = None  # the latest link; only one job samples at a time
_hooked: list[FaceSnapControl] = []  # controls whose adapters have hooks on a UNet


class ControlLink:
    """A link in the chain of controls.

    Attributes:
        previous_controlnet, transformer_options: read and written by the hosts.
        measure: measures the progress of the pass.
        finalizer: removes the link from the chain when its job is deleted.
    """

    def __init__(self, p: Any):
        self.job = weakref.ref(p)
        self.patchers: Sequence[Any] = ()
        self.previous_controlnet: Any = None
        self.transformer_options: dict[str, Any] = {}
        self.measure = Progress()
        self.finalizer: Any = None
        self._predictor: Any = None

    def set_previous_controlnet(self, control: Any) -> ControlLink:
        self.previous_controlnet = control
        return self

    def pre_run(self, model: Any, percent_to_sigma: Callable[[float], float]) -> None:
        """Called several times before sampling: by the host, and by each later link."""
        self._predictor = getattr(model, "predictor", None) or model.model_sampling
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_sigma)

    def cleanup(self) -> None:
        """Called several times after sampling."""
        self._predictor = None
        if self.previous_controlnet is not None:
            self.previous_controlnet.cleanup()

    def get_models(self) -> list[Any]:
        models = [] if self.previous_controlnet is None else self.previous_controlnet.get_models()
        return [*models, *self.patchers]

    def inference_memory_requirements(self, dtype: Any) -> int:
        if self.previous_controlnet is None:
            return 0
        return self.previous_controlnet.inference_memory_requirements(dtype)

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], *rest: Any) -> Control | None:
        """Residuals for one UNet call, added to those of the previous links.

        Args:
            x_noisy: unscaled latents [R, C, h, w].
            t: sigmas [R].
            cond: the call's conditions; `y` is the pooled text and sizes.
            rest: the number of chunks, followed in reForge by the call's transformer options.
        """
        raise NotImplementedError

    def shown_errors(self) -> AbstractContextManager[None]:
        """See `stopping.shown_errors`."""
        return shown_errors(self.job())

    def announce(self, x: Tensor, parts: Sequence[int], progress: float) -> None:
        """Announce the next evaluation, at this progress of the pass (from 0 to 1).

        Args:
            x: the images' latents [N, C, h, w].
            parts: see `prompt_parts`.
        """

    def unhook(self) -> None:
        """Remove all hooks from the UNet; may be called again."""

    @property
    def cond_hint(self) -> Any:
        """Forge's MultiDiffusion asks each control for an image to cut into tiles; this control has none."""
        with self.shown_errors():
            raise FaceSnapError("FaceSnap cannot be applied to MultiDiffusion's tiles; disable one of the two.")

    cond_hint_original = cond_hint  # versions of MultiDiffusion differ in which attribute they read first


class Returned(dict[str, list[Any]]):
    """What `get_control` returns. reForge's MultiDiffusion asks it, and not the control, for an image to cut."""

    def __init__(self, control: ControlLink, **residuals: list[Any]):
        super().__init__(residuals)
        self._control = control

    @property
    def cond_hint(self) -> Any:
        return self._control.cond_hint


class RefusalControl(ControlLink):
    """The control of a job that must stop: its first UNet call raises an error."""

    def __init__(self, p: Any, refusal: Refusal):
        super().__init__(p)
        self.refusal = refusal

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], *rest: Any) -> Control | None:
        with self.shown_errors():
            raise self.refusal.error()


class FaceSnapControl(ControlLink):
    """The control that adds the residuals of all people, and their adapters' attention.

    Args:
        patchers: the FFRNets' model patchers, for the host's memory management; the host keeps only weak references to
            them.
    """

    def __init__(self, p: Any, people: Sequence[Conditioning], patchers: Sequence[Any] = ()):
        super().__init__(p)
        self.patchers = patchers
        self.residuals = Residuals(people)
        self.adapters = AdapterHooks(self.residuals, self.shown_errors)
        self.measure = Progress([person.strength for person in people])
        self.progress = 0.0  # of the pass at the announced evaluation, from 0 to 1
        self._shape: torch.Size | None = None  # of the announced latents [N, C, h, w]
        self._chunks = Counter[int]()  # how many chunks of each kind (0 is conditional) are still to come
        self._handle: Any = None

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], *rest: Any) -> Control | None:
        """See `ControlLink.get_control`."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, *rest)
        transformer_options = rest[1] if len(rest) > 1 else None
        acting = [person.strength.acts_at(self.progress) for person in self.residuals.people]
        options = transformer_options or cond.get("transformer_options") or self.transformer_options
        if not any(acting):
            return previous
        chunks = options["cond_or_uncond"]  # 0 is conditional
        batch = len(x_noisy) // len(chunks)
        is_cond = [side == 0 for side in chunks for _ in range(batch)]
        images = list(range(batch)) * len(chunks)
        announced = self._is_announced(chunks, torch.Size([batch, *x_noisy.shape[1:]]))
        x = self._predictor.calculate_input(t, x_noisy)
        with self.shown_errors():
            timesteps = self._predictor.timestep(t)
            blended = self.residuals.rows(x, timesteps, is_cond, cond.get("y"), acting, images, announced)
        count = len(self.residuals.people[0].ffrnet.config.skip_widths) + 1
        own: list[Tensor | None] = [residual.to(x_noisy.dtype) for residual in blended or []] or [None] * count
        merged = merge({"input": [], "middle": own[-1:], "output": own[:-1]}, previous)
        # `options` belongs to this call, but all calls share `patches`
        options[CALL] = (self, Call(tuple(is_cond), tuple(acting), tuple(images)), self._parts(is_cond))
        patches = options.get("patches", {})
        others = patches.get("output_block_patch", [])
        options["patches"] = {**patches, "output_block_patch": [adding(merged, self._parts(is_cond)), *others]}
        return Returned(self, input=merged["input"], middle=[None], output=[None] * len(merged["output"]))

    def announce(self, x: Tensor, parts: Sequence[int], progress: float) -> None:
        """See `ControlLink.announce`."""
        self.progress = progress
        self._shape = x.shape
        # the host pairs the images' first parts, then their second parts, for as long as all images have one
        self._chunks = Counter({0: min(parts), 1: 1} if len(parts) == len(x) else {})
        self.residuals.begin_evaluation()

    def _is_announced(self, chunks: Sequence[int], shape: torch.Size) -> bool:
        """Whether the host announced a call with these chunks of rows, each of this shape, and has not made it yet;
        extensions make further calls, some of them with changed latents (self-attention guidance)."""
        if shape != self._shape or Counter(chunks) - self._chunks:
            return False
        self._chunks -= Counter(chunks)
        return True

    def hook(self, unet: nn.Module) -> None:
        """Install the adapters' hooks on a UNet.

        Raises:
            FaceSnapError: see `AdapterHooks.hook`.
        """
        self.adapters.hook(unet)
        self._handle = unet.register_forward_pre_hook(self._before_unet, with_kwargs=True)
        _hooked.append(self)

    def unhook(self) -> None:
        if self in _hooked:
            _hooked.remove(self)
            self.adapters.remove()
            self._handle.remove()

    def _parts(self, rows: Sequence[bool]) -> Parts:
        return Parts(len(rows), self.shown_errors)

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.adapters.call = None
        owner, call, parts = (kwargs.get("transformer_options") or {}).get(CALL, (None, None, None))
        if owner is self:
            self.adapters.call = replace(call, is_cond=call.is_cond[parts.next(len(args[0]))])


def attach(p: Any, people: Sequence[Conditioning]) -> None:
    """Condition the sampling pass that is about to begin, or refuse the job if its checkpoint does not fit.

    Without people, the pass is not changed. If it needs the GPU memory of FFRNets, the host moves them out.
    """
    detach(p)  # hires fix first calls this on a UNet that still carries the first pass's control
    if not people:
        return
    unet = p.sd_model.forge_objects.unet.clone()
    try:
        check_fit(p, people, unet.model.diffusion_model)
        control = FaceSnapControl(p, people, patchers_of(ffrnets(people), unet))
        if any(person.has_adapter for person in people):
            control.hook(unet.model.diffusion_model)
    except FaceSnapError as error:
        refuse(p, refusal_of(error))
    else:
        _add_control(p, unet, control)


def check(p: Any, people: Sequence[Conditioning]) -> None:
    """Check that the loaded checkpoint fits; `attach` does this for each pass.

    Raises:
        FaceSnapError: see `check_fit`.
    """
    check_fit(p, people, p.sd_model.forge_objects.unet.model.diffusion_model)


def refuse(p: Any, refusal: Refusal) -> None:
    """Stop a job at its first UNet call: the host swallows a script's exceptions, but shows exceptions in sampling."""
    detach(p)
    _add_control(p, p.sd_model.forge_objects.unet.clone(), RefusalControl(p, refusal))


def _add_control(p: Any, unet: Any, control: ControlLink) -> None:
    global _attached
    unet.add_patched_controlnet(control)
    p.sd_model.forge_objects.unet = unet
    _attached = weakref.ref(control)
    # an exception can end the job without `detach`; without the finalizer, the residuals would then stay in memory
    control.finalizer = weakref.finalize(p, _forget, weakref.ref(p.sd_model), control)


def detach(p: Any) -> None:
    """Remove every FaceSnap control from the current UNet's chain."""
    global _attached
    if _attached is not None and (control := _attached()) is not None:
        control.finalizer.detach()
    _attached = None
    _take_out(p.sd_model, lambda link: isinstance(link, ControlLink))
    while _hooked:
        _hooked[-1].unhook()


def _forget(model: weakref.ref[Any], control: ControlLink) -> None:
    """Remove a control when its job is deleted. By then, a refiner may have replaced the model in memory."""
    if model() is not None:
        _take_out(model(), lambda link: link is control)
    control.unhook()


def _take_out(model: Any, unwanted: Callable[[Any], bool]) -> None:
    objects = getattr(model, "forge_objects", None)
    if objects is None:  # before the first model is loaded
        return
    unet = objects.unet
    while unwanted(unet.controlnet_linked_list):
        unet.controlnet_linked_list = unet.controlnet_linked_list.previous_controlnet
    for link in _links(unet):
        while unwanted(link.previous_controlnet):
            link.previous_controlnet = link.previous_controlnet.previous_controlnet


def on_cfg_denoiser(params: Any) -> None:
    """Record the progress of the pass; register once with `script_callbacks.on_cfg_denoiser`."""
    denoiser = params.denoiser
    if (control := _control_of(denoiser.p)) is None:
        return
    if control not in _links(denoiser.p.sd_model.forge_objects.unet):
        _follow_refiner(denoiser.p, control, params.x)
        if (control := _control_of(denoiser.p)) is None:
            return
    control.announce(params.x, prompt_parts(denoiser), control.measure.at(denoiser.p, params))


def _control_of(p: Any) -> ControlLink | None:
    control = None if _attached is None else _attached()
    return control if control is not None and control.job() is p else None


def _links(unet: Any) -> Iterator[Any]:
    link = unet.controlnet_linked_list
    while link is not None:
        yield link
        link = link.previous_controlnet


def _follow_refiner(p: Any, control: ControlLink, x: Tensor) -> None:
    """Attach to the refiner's UNet: the host switches to another model during sampling without calling scripts."""
    if isinstance(control, RefusalControl):  # the host may switch before the first UNet call
        refuse(p, control.refusal)
        return
    assert isinstance(control, FaceSnapControl)
    people = control.residuals.people
    try:
        check_fit(p, people, p.sd_model.forge_objects.unet.model.diffusion_model)
    except FaceSnapError:
        detach(p)
        report_stop(p, "refiner", REFINER_DIFFERS)
        return
    from modules.sd_samplers_common import sampling_prepare

    attach(p, people)
    sampling_prepare(p.sd_model.forge_objects.unet, x)
