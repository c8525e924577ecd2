"""Forge and reForge: residuals enter as one more control in the UNet patcher's chain of ControlNets.

Both hosts drop the patched UNet after each job. reForge's signatures differ (`transformer_options` is an argument,
rows carry no marks but `cond_or_uncond`, `model_sampling` in place of `predictor`), which duck typing covers. How far
sampling is, `on_cfg_denoiser` says before each evaluation of the UNet, as a part of the pass: sigmas would be parts of
the whole noise schedule, of which hires fix and img2img see the end alone. An adapter's hooks are on the UNet itself,
which all jobs share: they act in those calls alone whose options their control has marked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning, Residuals, networks
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.attention import AdapterHooks, call_of
from facesnap_ext.hosts.unet import REFINER_DIFFERS, check_fit, offload, placed

Control = dict[str, list[Tensor | None]]
CALL = "facesnap"  # in a UNet call's transformer options: what the adapters are to do in it
_attached: weakref.ref[FaceSnapControl] | None = None  # the latest; one job samples at a time
_hooked: list[FaceSnapControl] = []  # those whose adapters have hooks on a UNet


class FaceSnapControl:
    """A link in the chain of controls: a guidance for each person, or the reason why the job must stop.

    Attributes that the hosts read and write: `previous_controlnet`, `transformer_options`.

    progress: part of the pass that lies behind, 0…1.
    """

    def __init__(self, p: Any, conditionings: Sequence[Conditioning] | FaceSnapError, patchers: Sequence[Any] = ()):
        self.job = weakref.ref(p)
        # only the sentence: with its traceback an error holds on to the job, and this goes when that does
        self.refusal = str(conditionings) if isinstance(conditionings, FaceSnapError) else None
        self.patchers = patchers  # of FFRNets, under the host's memory management; the host keeps weak references only
        self.residuals = Residuals(conditionings) if self.refusal is None else None
        self.adapters = None if self.residuals is None else AdapterHooks(self.residuals)
        self.previous_controlnet: Any = None
        self.transformer_options: dict[str, Any] = {}
        self.progress = 0.0
        self.finalizer: Any = None  # takes it off when its job goes
        self._predictor: Any = None

    def set_previous_controlnet(self, control: Any) -> FaceSnapControl:
        self.previous_controlnet = control
        return self

    def pre_run(self, model: Any, percent_to_sigma: Callable[[float], float]) -> None:
        """Called before sampling, several times: for each link, and by each later link."""
        self._predictor = getattr(model, "predictor", None) or model.model_sampling
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_sigma)

    def cleanup(self) -> None:
        """Called after sampling, several times."""
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

    def get_control(
        self,
        x_noisy: Tensor,
        t: Tensor,
        cond: dict[str, Any],
        batched_number: int,
        transformer_options: dict[str, Any] | None = None,
    ) -> Control | None:
        """Residuals for one UNet call, added to those of the links before.

        Args:
            x_noisy: unscaled latents [R, C, h, w]. t: sigmas [R].
            cond: the call's conditions; `y` is the pooled text and sizes.
        """
        if self.refusal is not None:
            raise FaceSnapError(self.refusal)
        previous = None
        if self.previous_controlnet is not None:
            extra = () if transformer_options is None else (transformer_options,)
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, *extra)
        acting = [conditioning.acts_at(self.progress) for conditioning in self.residuals.conditionings]
        if not any(acting):
            return previous

        options = transformer_options or cond.get("transformer_options") or self.transformer_options
        chunks = options["cond_or_uncond"]  # 0 is conditional
        is_cond = [side == 0 for side in chunks for _ in range(len(x_noisy) // len(chunks))]
        x = self._predictor.calculate_input(t, x_noisy)
        residuals = self.residuals.rows(x, self._predictor.timestep(t), is_cond, cond.get("y"), acting)
        options[CALL] = (self, call_of(x, is_cond, acting))  # the dictionary is the call's own
        *skips, middle = (residual.to(x_noisy.dtype) for residual in residuals)
        return merge({"input": [], "middle": [middle], "output": skips}, previous)

    @property
    def cond_hint(self) -> Any:
        """Forge's MultiDiffusion asks each control for a picture to cut into tiles; this one has none."""
        raise FaceSnapError("FaceSnap cannot act in MultiDiffusion's tiles; switch one of the two off.")

    cond_hint_original = cond_hint  # whichever it asks for first

    def hook(self, unet: nn.Module) -> None:
        """Let the adapters into a UNet.

        Raises:
            FaceSnapError: see `AdapterHooks.hook`.
        """
        self.adapters.hook(unet)
        self._handle = unet.register_forward_pre_hook(self._before_unet, with_kwargs=True)
        _hooked.append(self)

    def unhook(self) -> None:
        """Take all hooks off; may be called again."""
        if self in _hooked:
            _hooked.remove(self)
            self.adapters.remove()
            self._handle.remove()

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner, call = (kwargs.get("transformer_options") or {}).get(CALL, (None, None))
        self.adapters.call = call if owner is self else None


def merge(own: Control, previous: Control | None) -> Control:
    """Add two controls, either of which may have gaps, as new lists: the UNet empties those that it gets."""
    merged: Control = {}
    for part, residuals in own.items():
        others = list(previous.get(part, [])) if previous is not None else []
        length = max(len(residuals), len(others))
        pairs = zip(
            residuals + [None] * (length - len(residuals)),
            others + [None] * (length - len(others)),
        )
        merged[part] = [b if a is None else a if b is None else a + b for a, b in pairs]
    return merged


def attach(p: Any, conditionings: Sequence[Conditioning] | FaceSnapError) -> None:
    """Guide the sampling pass that is about to begin, or stop the job with an error at its first UNet call.

    Without any guidance the pass is left alone, and has all of the GPU's memory.
    """
    global _attached
    detach(p)  # hires fix calls this once on a UNet that still carries the first pass's control
    if not conditionings:
        offload()  # the host forgets about networks of earlier jobs and leaves them there
        return
    unet = p.sd_model.forge_objects.unet.clone()
    patchers = []
    if not isinstance(conditionings, FaceSnapError):
        try:
            check_fit(p, conditionings, unet.model.diffusion_model)
            for network in networks(conditionings):
                network.to(_compute_dtype(unet))
                placed.add(network)
                patchers.append(type_of_model_patcher(unet)(network, unet.load_device, unet.offload_device))
        except FaceSnapError as error:
            conditionings = error
    control = FaceSnapControl(p, conditionings, patchers)
    if control.adapters is not None and any(conditioning.has_adapter for conditioning in conditionings):
        try:
            control.hook(unet.model.diffusion_model)
        except FaceSnapError as error:
            control = FaceSnapControl(p, error)
    unet.add_patched_controlnet(control)
    p.sd_model.forge_objects.unet = unet
    _attached = weakref.ref(control)
    # an exception ends the job unannounced; `detach` calls this off, or each pass's residuals would stay to its end
    control.finalizer = weakref.finalize(p, _forget, weakref.ref(p.sd_model), control)


def detach(p: Any) -> None:
    """Take every FaceSnap control out of the chain of the current UNet."""
    global _attached
    if _attached is not None and (control := _attached()) is not None:
        control.finalizer.detach()
    _attached = None
    _take_out(p.sd_model, lambda link: isinstance(link, FaceSnapControl))
    while _hooked:
        _hooked[-1].unhook()


def _forget(model: weakref.ref[Any], control: FaceSnapControl) -> None:
    """Take a control off when its job is gone; the model may be, since a refiner takes its place in memory."""
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


def type_of_model_patcher(unet: Any) -> type:
    """The host's own `ModelPatcher`, the class below its `UnetPatcher`."""
    return type(unet).__mro__[1]


def _compute_dtype(unet: Any) -> Any:
    """What the UNet computes in; its storage may be a quantised type."""
    dtype = getattr(unet.model, "computation_dtype", None)
    return dtype or unet.model_dtype()


def on_cfg_denoiser(params: Any) -> None:
    """Say how far the pass is; register once with `script_callbacks.on_cfg_denoiser`."""
    denoiser = params.denoiser
    if (control := _of_job(denoiser.p)) is None:
        return
    if control not in _links(denoiser.p.sd_model.forge_objects.unet):
        _follow_refiner(denoiser.p, control, params.x)
        if (control := _of_job(denoiser.p)) is None:
            return
    control.progress = denoiser.step / denoiser.total_steps


def _of_job(p: Any) -> FaceSnapControl | None:
    control = None if _attached is None else _attached()
    return control if control is not None and control.job() is p else None


def _links(unet: Any) -> Iterator[Any]:
    link = unet.controlnet_linked_list
    while link is not None:
        yield link
        link = link.previous_controlnet


def _follow_refiner(p: Any, control: FaceSnapControl, x: Tensor) -> None:
    """The host has switched to another model in mid-sampling, without a word to scripts."""
    if control.refusal is not None:  # the host may switch before the first UNet call
        attach(p, FaceSnapError(control.refusal))
        return
    conditionings = control.residuals.conditionings
    try:
        check_fit(p, conditionings, p.sd_model.forge_objects.unet.model.diffusion_model)
    except FaceSnapError:
        detach(p)
        p.comment(REFINER_DIFFERS)
        return
    from modules.sd_samplers_common import sampling_prepare

    attach(p, conditionings)
    sampling_prepare(p.sd_model.forge_objects.unet, x)
