"""AUTOMATIC1111: residuals enter through module hooks on sgm's UNet, for one sampling pass at a time.

Nothing of the host is replaced. `on_cfg_denoiser` fires before each evaluation of the UNet and says which job it is of
and how many of its rows are conditional; they then pass through the UNet in that order, in one call or in several
(prompts of different length, `--medvram`'s split batches, skipped unconditional rows). Hooks act on rows announced for
their own job only, so one that an exception left behind does nothing; it is taken off when its job goes or the next one
comes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning, Residuals, networks
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.attention import AdapterHooks, call_of
from facesnap_ext.hosts.unet import REFINER_DIFFERS, check_fit, offload, placed, skip_widths

_attached: Attachment | None = None


class Attachment:
    """FaceSnap on one job's UNet: a guidance for each person, or the reason why the job must stop."""

    def __init__(self, p: Any, conditionings: Sequence[Conditioning] | FaceSnapError):
        # only the sentence: with its traceback an error holds on to the job, and the hooks go when that does
        self.refusal = str(conditionings) if isinstance(conditionings, FaceSnapError) else None
        self.residuals = Residuals(conditionings) if self.refusal is None else None
        self.adapters = None if self.residuals is None else AdapterHooks(self.residuals)
        self.job = weakref.ref(p, lambda _: self.remove())
        self.short_of_memory = bool(getattr(p.sd_model, "lowvram", False))
        self.unet: nn.Module | None = None
        self._handles: list[Any] = []
        self._sides: deque[bool] = deque()  # announced rows that have not yet passed: conditional or not
        self._acting: list[bool] = []  # for each guidance, in the announced evaluation
        self._size: tuple[int, ...] | None = None  # of the latents in this job's evaluation under way; None: another's
        self._told = False  # of UNet calls that nobody announced
        self._current: list[Tensor] | None = None  # residuals of the UNet call under way

    def hook(self, unet: nn.Module) -> None:
        """Put the hooks on a UNet, taking them off the one before."""
        self.remove()
        self.unet = unet
        if self.adapters is not None:
            try:
                self.adapters.hook(unet)
            except FaceSnapError as error:
                self.refusal, self.residuals, self.adapters = str(error), None, None
        self._handles = [unet.register_forward_pre_hook(self._before_unet, with_kwargs=True)]
        if self.residuals is not None:
            self._handles.append(unet.middle_block.register_forward_hook(self._after_middle))
            for i, block in enumerate(unet.output_blocks):
                # the decoder takes the skips from deep to shallow; the middle's residual is the last
                self._handles.append(block.register_forward_pre_hook(self._before_output(-2 - i)))

    def remove(self) -> None:
        """Take all hooks off; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sides.clear()
        self._current = self.unet = None
        if self.residuals is not None:
            self.adapters.remove()

    def announce(self, x: Tensor, cond_rows: int, progress: float) -> None:
        """Rows [R, C, h, w] that pass through the UNet next, the conditional ones first."""
        self._size = tuple(x.shape[2:])
        self._sides = deque(i < cond_rows for i in range(len(x)))
        if self.residuals is not None:
            self._acting = [conditioning.acts_at(progress) for conditioning in self.residuals.conditionings]

    def withdraw(self) -> None:
        """The next evaluation is another job's."""
        self._sides.clear()
        self._size = None

    def _tell_of_calls_that_nobody_announced(self) -> None:
        if self._size is not None and not self._told and (p := self.job()) is not None:
            self._told = True
            p.comment(
                "FaceSnap: Another extension runs the UNet beside the WebUI's own calls, or in tiles as MultiDiffusion "
                "does, and FaceSnap does not act there; switch one of the two off."
            )

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = None
        if self.adapters is not None:
            self.adapters.call = None
        x = args[0]
        if self.refusal is not None and self._size is not None:
            raise FaceSnapError(self.refusal)
        if len(self._sides) < len(x) or x.shape[2:] != self._size:
            self._tell_of_calls_that_nobody_announced()
            return
        sides = [self._sides.popleft() for _ in range(len(x))]
        if any(self._acting):
            timesteps = kwargs["timesteps"] if "timesteps" in kwargs else args[1]
            placed.update(networks(self.residuals.conditionings))  # before: it may run out of memory halfway
            self.residuals.to(x.device, x.dtype)
            self._current = self.residuals.rows(x, timesteps, sides, kwargs.get("y"), self._acting)
            self.adapters.call = call_of(x, sides, self._acting)

    def _after_middle(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self._current is None else output + self._current[-1].to(output.dtype)

    def _before_output(self, index: int) -> Any:
        def add_to_skip(block: nn.Module, args: tuple[Any, ...]) -> None:
            if self._current is not None:
                # the skip is the last part of a tensor that was concatenated for this block alone
                residual = self._current[index]
                args[0][:, -residual.shape[1] :] += residual.to(args[0].dtype)

        return add_to_skip


def attach(p: Any, conditionings: Sequence[Conditioning] | FaceSnapError) -> None:
    """Guide the sampling pass that is about to begin, or stop the job with an error at its first UNet call.

    Without any guidance the pass is left alone, and has all of the GPU's memory.
    A script's exceptions are swallowed by the host; one inside sampling stops the job and reaches the browser.
    """
    global _attached
    detach()
    if not conditionings:
        offload()
        return
    unet = p.sd_model.model.diffusion_model
    if not isinstance(conditionings, FaceSnapError):
        try:
            check_fit(p, conditionings, unet)
            _check_unet_is_run()
        except FaceSnapError as error:
            conditionings = error
    _attached = Attachment(p, conditionings)
    _attached.hook(unet)


def detach(p: Any = None) -> None:
    """Take FaceSnap off again; with nothing attached it does nothing.

    FFRNet stays in the GPU's memory for the next picture, as the host's own networks do, and goes with them where the
    host moves them out after use (`--medvram`, `--lowvram`).
    """
    global _attached
    if _attached is not None:
        _attached.remove()
        if _attached.short_of_memory:
            offload()
        _attached = None


def on_cfg_denoiser(params: Any) -> None:
    """Announce the rows of the next evaluation; register once with `script_callbacks.on_cfg_denoiser`."""
    attached, p = _attached, params.denoiser.p
    if attached is None or attached.job() is None:
        return
    if attached.job() is not p:
        attached.withdraw()
        return
    if (unet := p.sd_model.model.diffusion_model) is not attached.unet:
        _follow_refiner(attached, p, unet)
    denoiser = params.denoiser
    attached.announce(params.x, params.text_cond.shape[0], denoiser.step / denoiser.total_steps)


def _follow_refiner(attached: Attachment, p: Any, unet: nn.Module) -> None:
    """The host has switched to another model in mid-sampling, without a word to scripts."""
    residuals = attached.residuals
    # all people's files have the first UNet's widths
    if residuals is not None and skip_widths(unet) != residuals.conditionings[0].ffrnet.config.skip_widths:
        attached.remove()
        detach()
        p.comment(REFINER_DIFFERS)
    else:
        attached.hook(unet)


def _check_unet_is_run() -> None:
    from modules import sd_unet

    if getattr(sd_unet, "current_unet", None) is not None:
        raise FaceSnapError(
            "An alternative UNet (such as TensorRT's) is active and lets no guidance in; "
            "set SD Unet to None in the settings."
        )
