"""FaceSnap together with the extensions that hosts bring along, and with some that users install."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.live.live_host import Host, Images, Job, differ, enabled, equal, leftovers, with_facesnap

Baseline = Callable[[Job], Images]

# extensions that change the UNet, its attention or the guidance, and the arguments that make a difference in few steps
NEIGHBOURS: dict[str, Job] = {
    "FreeU Integrated": {},
    "HyperTile Integrated": {"Tile Size": 64, "Swap Size": 1, "Max Depth": 2},  # more swaps are random
    "Kohya HRFix Integrated": {"End Percent": 1.0},
    "SelfAttentionGuidance Integrated": {},
    "PerturbedAttentionGuidance Integrated": {},
    "DynamicThresholding (CFG-Fix) Integrated": {"Mimic Scale": 2.0},
    "LatentModifier Integrated": {"Sharpness Multiplier": 10.0},
    "RescaleCFG for reForge": {},
    "Mahiro CFG for reForge": {},
    '"APG\'s now your CFG" and Guidance Limiter for reForge': {},
    "Advanced Model Sampling for reForge": {"Sampling Mode": "Discrete", "Discrete Sampling Type": "v_prediction"},
    "Never OOM Integrated": {},
    "StyleAlign Integrated": {},
    "Forge Couple": {},
}
JOBS: dict[str, Job] = {
    "StyleAlign Integrated": {"batch_size": 2},
    "Forge Couple": {"prompt": "a woman in a red shirt\na man in a blue shirt"},
}
WITHOUT_EFFECT = "Never OOM Integrated"  # it moves networks, and no image changes
LASTING = "Advanced Model Sampling for reForge"  # it also affects the next job, with and without FaceSnap


@pytest.mark.parametrize("title", NEIGHBOURS)
def test_an_extension_and_facesnap_act_together(probed: Host, baseline: Baseline, title: str) -> None:
    if (script := probed.script(title)) is None:
        pytest.skip(f"{probed.webui['name']} has no {title}")
    alone = JOBS.get(title, {})
    job = alone | enabled(script, NEIGHBOURS[title])
    acts = differ(baseline(alone), baseline(job))
    if not acts and title != WITHOUT_EFFECT:
        pytest.skip(f"{title} does not change images of this checkpoint")

    def images(job: Job) -> Images:
        if title == LASTING:
            probed.images({})
        return probed.images(job)

    before = leftovers(probed.probe())
    facesnap, together = images(with_facesnap(alone)), images(with_facesnap(job))
    assert differ(together, baseline(job)), "FaceSnap has no effect"
    assert (differ if acts else equal)(together, facesnap)
    assert leftovers(probed.probe()) == before
    assert equal(images(with_facesnap(job, weight=0)), baseline(job))
    assert equal(images({}), baseline({}))
