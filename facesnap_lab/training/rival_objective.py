"""How a rival takes part in the training objective: its conditioning of the UNet, and its own losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from facesnap_lab.rivals.attention import Attended, Injection
from facesnap_lab.rivals.method import Features, References, Rival, Text, UNetCall, without_person
from facesnap_lab.training.data import Batch
from facesnap_lab.training.frozen import Frozen, size_ids, text_y

Predictor = Callable[[Tensor, Tensor], Tensor]


def condition_rival(
    batch: Batch, frozen: Frozen, networks: nn.Module, method: type[Rival], size_dim: int, drop_text: float
) -> RivalConditioning:
    """Encode a batch's references for a rival."""
    references = References(batch.embeddings, batch.clip_pixels, batch.references, batch.reference_points)
    features = tuple([feature[:, None] for feature in method.features(frozen.clip, references)])
    return RivalConditioning(batch, features, networks, method, size_dim, drop_text)


def encode_text(frozen: Frozen, captions: Sequence[str | None], method: type[Rival]) -> Text:
    """Encode captions; None stands for the pipeline's null text."""
    context, pooled = frozen.text(captions)
    words = method.class_words(frozen.pipe.tokenizer, captions, context.shape[1])
    return Text(context, pooled, words.to(context.device))


def rows_without_person(text: Sequence[float], drop_text: float) -> Tensor:
    """Return in which rows [N] the person is left out, from the numbers that decide about the captions.

    As in IP-Adapter's training (`tutorial_train_sdxl.py`): with `drop_text` 0.1, 5 % of the rows have neither text nor
    person, 5 % only no text, and 5 % only no person.
    """
    return torch.tensor([u < drop_text / 2 or drop_text <= u < 1.5 * drop_text for u in text])


@dataclass(frozen=True, eq=False)
class RivalConditioning:
    """A batch's conditioning by a rival. All UNets' attention processors are `InjectedAttention`.

    features: of the batch's references, [N,1,…]. networks: the rival, possibly in a data-parallel wrapper.
    """

    batch: Batch
    features: Features
    networks: nn.Module
    method: type[Rival]
    size_dim: int
    drop_text: float

    def diffusion_branch(
        self, frozen: Frozen, captions: Sequence[str | None], numbers: Sequence[float], z: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the UNet's prediction for noisy latents [N,C,h,w], and the method's own loss or None.

        Args:
            numbers: in 0…1, see `rows_without_person`.
        """
        rows = rows_without_person(numbers, self.drop_text).to(z.device)
        kept = replace(self, features=without_person(self.features, rows))
        attended: list[dict[int, Attended]] | None = None if self.method.diffusion_loss is None else []
        text = encode_text(frozen, captions, self.method)
        prediction = kept.predictor(frozen.unet, text, attended=attended)(z, timesteps)
        if self.method.diffusion_loss is None or not attended:
            return prediction, None
        return prediction, self.method.diffusion_loss(attended[0], self.batch.points, self.batch.images.shape[-1])

    def lightning_branch(
        self, frozen: Frozen, captions: Sequence[str], sample: Callable[[Predictor], Tensor], scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the latents of portraits of the first rows, and the method's own loss or None.

        Args:
            captions: one for each of these rows. sample: the few-step sampler. scale: of classifier-free guidance.
        """
        text = encode_text(frozen, captions, self.method)
        null = encode_text(frozen, [None] * len(captions), self.method) if scale != 1 else None
        align = self.method.alignment_loss
        attended: list[dict[int, Attended]] | None = None if align is None else []
        with frozen.few_step.active() as unet:
            latents = sample(self.predictor(unet, text, null, scale, attended))
            if align is None or attended is None:
                return latents, None
            without: list[dict[int, Attended]] = []
            with torch.no_grad():
                sample(self.predictor(unet, text, null, scale, without, injects=False))
        trained = [any(layer.queries.requires_grad for layer in own.values()) for own in attended]
        losses = [align(own, other) for own, other, use in zip(attended, without, trained) if use]
        return latents, torch.stack(losses).mean() if losses else None

    def predictor(
        self,
        unet: nn.Module,
        text: Text,
        null: Text | None = None,
        scale: float = 1.0,
        attended: list[dict[int, Attended]] | None = None,
        injects: bool = True,
    ) -> Predictor:
        """Return the conditioned UNet as a function from scaled latents [N,C,h,w] and timesteps [N] to its prediction.

        Args:
            text: of the first N rows of the batch.
            null: null text for classifier-free guidance, whose prediction is without the person, as at inference; None
                for no guidance. scale: the guidance scale.
            attended: receives what the cross-attentions computed in each call with the text.
            injects: False returns the UNet without the method.
        """
        rows = len(text.context)
        features = tuple([feature[:rows] for feature in self.features])
        landmark_images = self.batch.landmark_images[:rows]
        sizes = size_ids(self.batch.images.shape[-1], rows, self.batch.images.device)

        def call(
            x: Tensor, timesteps: Tensor, text: Text, features: Features, record: dict[int, Attended] | None = None
        ) -> Tensor:
            injection = Injection(text.context)
            if injects:
                y = text_y(text.pooled, sizes, self.size_dim)
                injection = self.networks(features, text, UNetCall(x, timesteps, y, landmark_images))
            return call_unet(unet, x, timesteps, replace(injection, attended=record), text.pooled, sizes)

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            record: dict[int, Attended] | None = None
            if attended is not None:
                attended.append(record := {})
            prediction = call(x, timesteps, text, features, record)
            if null is None:
                return prediction
            unconditional = call(x, timesteps, null.without_class_words, without_person(features))
            return unconditional + scale * (prediction - unconditional)

        return predict


def call_unet(
    unet: nn.Module, x: Tensor, timesteps: Tensor, injection: Injection, pooled: Tensor, sizes: Tensor
) -> Tensor:
    """Return the prediction of a UNet whose attention processors are `InjectedAttention`."""
    residuals = {}
    if injection.residuals:
        *skips, middle = (residual.to(unet.dtype) for residual in injection.residuals)
        residuals = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
    return unet(
        x.to(unet.dtype),
        timesteps,
        injection.context.to(unet.dtype),
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes.to(unet.dtype)},
        cross_attention_kwargs={"injection": injection},
        return_dict=False,
        **residuals,
    )[0]
