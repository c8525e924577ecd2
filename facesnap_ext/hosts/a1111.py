"""AUTOMATIC1111: residuals are added by module hooks on sgm's UNet, for one sampling pass at a time.

Nothing in the host is replaced. `on_cfg_denoiser` fires before each evaluation of the UNet and reports its job and its
number of conditional rows. The rows then pass through the UNet in that order, in one call or in several (prompts of
different lengths, `--medvram`'s split batches, skipped unconditional rows). Hooks act only on rows that were announced
for their own job, so a hook that an exception left behind does nothing. Such a hook is removed when its job is deleted
or the next job starts.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning, ffrnets
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.attention import AdapterHooks, Call
from facesnap_ext.hosts.errors import Refusal, refusal_of, report_stop
from facesnap_ext.hosts.progress import Progress, prompt_parts
from facesnap_ext.hosts.unet import REFINER_DIFFERS, check_fit, fitted, offload, on_gpu, skip_widths
from facesnap_ext.residuals import Residuals

_attached: PassHooks | None = None


class PassHooks:
    """Hooks on the UNet of one job's sampling pass, and the rows that were announced for it."""

    def __init__(self, p: Any):
        self.job = weakref.ref(p, lambda _: self.remove())
        self.progress = Progress()
        self.low_memory = bool(getattr(p.sd_model, "lowvram", False))
        self.unet: nn.Module | None = None
        self._handles: list[Any] = []
        # for each announced row that has not arrived yet: whether it is conditional, and its image
        self._rows: deque[tuple[bool, int]] = deque()
        self._size: tuple[int, ...] | None = None  # latent size of the running evaluation; None if it is another job's

    def hook(self, unet: Any) -> None:
        """Install the hooks on a UNet, and remove them from the previous one."""
        self.remove()
        self.unet = unet
        self._handles = [unet.register_forward_pre_hook(self._before_unet, with_kwargs=True)]

    def remove(self) -> None:
        """Remove all hooks; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._rows.clear()
        self.unet = None

    def announce(self, x: Tensor, cond_rows: int, progress: float, parts: Sequence[int] = ()) -> None:
        """Announce the rows [R, C, h, w] that pass through the UNet next, the conditional ones first.

        Args:
            progress: progress of the pass, from 0 to 1.
            parts: see `images_of_rows`.
        """
        self._size = tuple(x.shape[2:])
        self._rows = deque(zip((i < cond_rows for i in range(len(x))), images_of_rows(x, cond_rows, parts)))

    def withdraw(self) -> None:
        """Note that the next evaluation belongs to another job."""
        self._rows.clear()
        self._size = None

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError


class RefusedPass(PassHooks):
    """A pass of a job that must stop: its first UNet call raises an error."""

    def __init__(self, p: Any, refusal: Refusal):
        super().__init__(p)
        self.refusal = refusal

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._size is not None:
            raise self.refusal.error()


class ConditionedPass(PassHooks):
    """A pass that adds the residuals of all people, and their adapters' attention."""

    def __init__(self, p: Any, people: Sequence[Conditioning]):
        super().__init__(p)
        self.progress = Progress([person.strength for person in people])
        self.residuals = Residuals(people)
        self.adapters = AdapterHooks(self.residuals)
        self._acting: list[bool] = []  # whether each person is active in the announced evaluation
        self._commented = False  # whether an unannounced UNet call has been reported
        self._blocks: tuple[nn.Module, ...] = ()  # the blocks that have hooks: the middle block, then the output blocks
        self._block_handles: list[Any] = []
        self._current: list[Tensor] | None = None  # residuals of the running UNet call

    def hook(self, unet: Any) -> None:
        """See `PassHooks.hook`.

        Raises:
            FaceSnapError: see `AdapterHooks.hook`.
        """
        super().hook(unet)
        self.adapters.hook(unet)
        self._hook_blocks(unet)

    def _hook_blocks(self, unet: Any) -> None:
        """Put hooks on the blocks that the UNet has now; other extensions wrap some of them and unwrap them again."""
        blocks = (unet.middle_block, *unet.output_blocks)
        if len(blocks) == len(self._blocks) and all(block is known for block, known in zip(blocks, self._blocks)):
            return
        self._unhook_blocks()
        self._blocks = blocks
        middle, *outputs = blocks
        self._block_handles.append(middle.register_forward_hook(self._after_middle))
        for i, block in enumerate(outputs):
            # the decoder takes the skips from deep to shallow; the middle block's residual is the last
            self._block_handles.append(block.register_forward_pre_hook(self._before_output(-2 - i)))

    def _unhook_blocks(self) -> None:
        for handle in self._block_handles:
            handle.remove()
        self._block_handles.clear()
        self._blocks = ()

    def remove(self) -> None:
        super().remove()
        self._unhook_blocks()
        self._current = None
        self.adapters.remove()

    def announce(self, x: Tensor, cond_rows: int, progress: float, parts: Sequence[int] = ()) -> None:
        super().announce(x, cond_rows, progress, parts)
        self.residuals.begin_evaluation()
        self._acting = [person.strength.acts_at(progress) for person in self.residuals.people]

    def _comment_on_unannounced_call(self) -> None:
        if self._size is not None and not self._commented and (p := self.job()) is not None:
            self._commented = True
            report_stop(
                p,
                "UNet calls of another extension",
                "FaceSnap: Another extension calls the UNet outside the WebUI's own sampling, or in tiles as "
                "MultiDiffusion does. FaceSnap is not applied to those calls; disable one of the two.",
            )

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = self.adapters.call = None
        x = args[0]
        if len(self._rows) < len(x) or x.shape[2:] != self._size:
            self._comment_on_unannounced_call()
            return
        sides, images = zip(*(self._rows.popleft() for _ in range(len(x))))
        if any(self._acting):
            timesteps = kwargs["timesteps"] if "timesteps" in kwargs else args[1]
            on_gpu.update(ffrnets(self.residuals.people))  # before the move, because memory may run out during it
            self.residuals.to(x.device, x.dtype)
            self._current = self.residuals.rows(x, timesteps, sides, kwargs.get("y"), self._acting, images, True)
            self.adapters.call = Call(tuple(sides), tuple(self._acting), tuple(images))
            self._hook_blocks(unet)

    def _after_middle(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self._current is None else output + fitted(self._current[-1], output).to(output.dtype)

    def _before_output(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add_to_skip(block: nn.Module, args: tuple[Any, ...]) -> None:
            if self._current is not None:
                # the skip is the last part of a tensor that was concatenated for this block only
                residual = self._current[index]
                args[0][:, -residual.shape[1] :] += fitted(residual, args[0]).to(args[0].dtype)

        return add_to_skip


def images_of_rows(x: Tensor, cond_rows: int, parts: Sequence[int] = ()) -> list[int]:
    """The index in the batch of each announced row's image.

    The host first sends each image's conditional rows, one for each part of an AND prompt, and then one unconditional
    row per image. Both kinds are copies of the image's latent.

    Args:
        parts: the number of parts of each image's prompt; if they are unknown, the rows are compared by value.
    """
    count = len(x) - cond_rows
    if cond_rows == count or not count:
        return [*range(cond_rows), *range(count)]
    if len(parts) == count and sum(parts) == cond_rows:
        return [*(image for image, number in enumerate(parts) for _ in range(number)), *range(count)]
    images, image = [], 0
    for row in x[:cond_rows]:
        while image < count - 1 and not torch.equal(row, x[cond_rows + image]):
            image += 1
        images.append(image)
    return [*images, *range(count)]


def attach(p: Any, people: Sequence[Conditioning]) -> None:
    """Condition the sampling pass that is about to begin, or refuse the job if its checkpoint does not fit.

    Without people, the pass is not changed and can use all of the GPU's memory.
    """
    global _attached
    detach()
    if not people:
        offload()
        return
    unet = p.sd_model.model.diffusion_model
    try:
        check(p, people)
        _attached = ConditionedPass(p, people)
        _attached.hook(unet)
    except FaceSnapError as error:
        refuse(p, refusal_of(error))


def check(p: Any, people: Sequence[Conditioning]) -> None:
    """Check that the loaded checkpoint fits; `attach` does this for each pass.

    Raises:
        FaceSnapError: see `check_fit`, or an alternative UNet is active.
    """
    check_fit(p, people, p.sd_model.model.diffusion_model)
    _check_unet_is_run()


def refuse(p: Any, refusal: Refusal) -> None:
    """Stop a job at its first UNet call: the host swallows a script's exceptions, but shows exceptions in sampling."""
    global _attached
    detach()
    _attached = RefusedPass(p, refusal)
    _attached.hook(p.sd_model.model.diffusion_model)


def detach(p: Any = None) -> None:
    """Remove FaceSnap; does nothing if nothing is attached.

    FFRNet stays in GPU memory for the next image, as the host's own networks do, and is moved out with them if the host
    moves networks out after use (`--medvram`, `--lowvram`).
    """
    global _attached
    if _attached is not None:
        _attached.remove()
        if _attached.low_memory:
            offload()
        _attached = None


def on_cfg_denoiser(params: Any) -> None:
    """Announce the rows of the next evaluation; register once with `script_callbacks.on_cfg_denoiser`."""
    attached, p = _attached, params.denoiser.p
    job = None if attached is None else attached.job()
    if attached is None or job is None:
        return
    if job is not p:
        attached.withdraw()
        return
    if (unet := p.sd_model.model.diffusion_model) is not attached.unet:
        _follow_refiner(attached, p, unet)
    hooks = _attached or attached
    progress = hooks.progress.at(p, params)
    hooks.announce(params.x, params.text_cond.shape[0], progress, prompt_parts(params.denoiser))


def _follow_refiner(attached: PassHooks, p: Any, unet: nn.Module) -> None:
    """Hook the refiner's UNet: the host switches to another model during sampling without calling scripts."""
    if isinstance(attached, ConditionedPass):
        # all people's files have the widths of the first UNet
        if skip_widths(unet) != attached.residuals.people[0].ffrnet.config.skip_widths:
            detach()
            report_stop(p, "refiner", REFINER_DIFFERS)
            return
        try:
            attached.hook(unet)
        except FaceSnapError as error:
            refuse(p, refusal_of(error))
    else:
        attached.hook(unet)


def _check_unet_is_run() -> None:
    from modules import sd_unet

    if getattr(sd_unet, "current_unet", None) is not None:
        raise FaceSnapError(
            "An alternative UNet such as TensorRT's is active, which FaceSnap cannot condition; set SD Unet to None in "
            "the settings."
        )
