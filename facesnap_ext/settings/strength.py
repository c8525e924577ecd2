"""How strongly a person's conditioning is applied, and in which part of sampling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strength:
    """One person's strength settings. They are part of `Unit`, and travel unchanged in `Conditioning`.

    Attributes:
        weight: scale of FFRNet's residuals, from 0 to 2.
        adapter_weight: scale of InstantID's attention adapter, from 0 to 2. `weight` does not scale the adapter, and
            files without an adapter ignore this setting.
        start, end: the fractions of the sampling pass between which the conditioning is active, from 0 to 1.
        ffrnet_interval: run FFRNet on every n-th UNet evaluation and reuse its residuals in between, from 1 to 4.
        cond_only: do not condition unconditional rows.
        hires: the passes in which it is active: "first", "second" (hires fix) or "both".
        block_weights: one factor per residual, from the shallowest skip to the middle block, from 0 to 2; empty means
            1 for all of them.
    """

    weight: float = 1.0
    adapter_weight: float = 0.8
    start: float = 0.0
    end: float = 1.0
    ffrnet_interval: int = 1
    cond_only: bool = False
    hires: str = "both"
    block_weights: tuple[float, ...] = ()

    @property
    def active(self) -> bool:
        """Whether there is any effect; a weight of 0 leaves the image unchanged."""
        return self.weight > 0 and self.start < self.end

    def acts_at(self, progress: float) -> bool:
        """Whether it is active at this fraction of the pass: `start <= progress < end`.

        An end of 1 means no end, because samplers with several UNet calls per step run past their own step count.
        """
        return self.start <= progress and (progress < self.end or self.end >= 1)

    def acts_in(self, second_pass: bool) -> bool:
        """Whether it is active in this pass: the second pass of hires fix, or the first or only pass."""
        return self.hires in ("both", "second" if second_pass else "first")
