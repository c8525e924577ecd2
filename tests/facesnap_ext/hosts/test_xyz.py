"""Axes of the X/Y/Z plot: each cell gets its own values, and nothing else ever does."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import xyz
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit

PHOTOS = tuple(Photo(np.full((4, 4, 3), i, np.uint8), f"photo {i}") for i in range(3))
UNIT = Unit(True, references=PHOTOS, weight=0.7)


@dataclass
class AxisOption:
    """The host's."""

    label: str
    type: type
    apply: Any
    confirm: Any = None
    choices: Any = None


@pytest.fixture
def axes(monkeypatch) -> dict[str, AxisOption]:
    plot = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Seed", int, None)])
    other = SimpleNamespace()
    scripts = ModuleType("modules.scripts")
    scripts.scripts_data = [
        SimpleNamespace(module=module, script_class=type("Script", (), {"__module__": name}))
        for module, name in ((plot, "xyz_grid.py"), (other, "other.py"))
    ]
    monkeypatch.setitem(sys.modules, "modules", ModuleType("modules"))
    monkeypatch.setitem(sys.modules, "modules.scripts", scripts)
    sys.modules["modules"].scripts = scripts
    for _ in range(2):  # the page may be built twice
        xyz.add_axes(lambda: ["Ada", "Grace"])
    labels = [axis.label for axis in plot.axis_options]
    assert len(labels) == len(set(labels))
    return {axis.label.removeprefix(xyz.PREFIX): axis for axis in plot.axis_options}


def test_a_cells_values_are_its_own(axes):
    """As the plot does it: each cell is a shallow copy of the job, and values of several axes come one by one."""
    job = SimpleNamespace()
    axes["weight"].apply(job, 0.9, [])
    cells = []
    for value in (0.2, 1.5):
        cell = copy.copy(job)
        axes["start"].apply(cell, value / 2, [])
        axes["weight"].apply(cell, value, [])
        cells.append(cell)
    assert [xyz.with_axes(cell, {1: UNIT}) for cell in cells] == [
        {1: replace(UNIT, weight=value, start=value / 2)} for value in (0.2, 1.5)
    ]
    assert xyz.with_axes(job, {1: UNIT}) == {1: replace(UNIT, weight=0.9)}
    assert xyz.with_axes(SimpleNamespace(), {1: UNIT}) == {1: UNIT}


def test_who_has_nothing_to_do_is_told_by_the_cells_values(axes):
    """A weight of 0 in the plot takes somebody out, one above brings somebody in whom the page leaves out."""
    job = SimpleNamespace()
    out = replace(UNIT, weight=0.0)
    assert xyz.with_axes(job, {1: UNIT, 2: out}) == {1: UNIT}
    axes["weight"].apply(job, 0.0, [])
    assert xyz.with_axes(job, {1: UNIT, 2: out}) == {}
    axes["weight"].apply(job, 0.4, [])
    assert xyz.with_axes(job, {1: out}) == {1: replace(UNIT, weight=0.4)}


def test_a_turn_makes_the_pose_that_of_the_sliders(axes):
    job = SimpleNamespace()
    axes["yaw"].apply(job, 30.0, [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: replace(UNIT, yaw=30.0, pose="sliders")}


def test_references_one_by_one(axes):
    job = SimpleNamespace()
    axes["reference"].apply(job, 2, [])
    assert xyz.with_axes(job, {1: UNIT})[1].references == (PHOTOS[1],)
    for wrong in (0, 4):
        axes["reference"].apply(job, wrong, [])
        with pytest.raises(FaceSnapError, match=f"reference {wrong}, and there are 3"):
            xyz.with_axes(job, {1: UNIT})


def test_a_reference_that_is_not_there_is_told_before_the_plot_begins(axes):
    """The plot hands over the whole job, in which FaceSnap's arguments stand among those of other scripts."""
    picture = Image.new("RGB", (8, 8))
    person = {"references": [picture, picture]}
    ours = SimpleNamespace(title=lambda: "FaceSnap", args_from=1, args_to=3)
    other = SimpleNamespace(title=lambda: "Other", args_from=0, args_to=1)
    job = SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[other, ours]), script_args=["other", person, None])
    axes["reference"].confirm(job, [1, 2])
    for wrong in (0, 3):
        with pytest.raises(FaceSnapError, match=f"asks for reference {wrong}, and there are 2"):
            axes["reference"].confirm(job, [1, wrong])
    job.script_args[1] = {**person, "enabled": False}
    axes["reference"].confirm(job, [3])


def test_a_saved_identity_takes_the_place_of_the_photos(axes):
    assert axes["identity"].choices() == ["Ada", "Grace"]
    job = SimpleNamespace()
    axes["identity"].apply(job, "Grace", [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: replace(UNIT, references=(), identity="Grace")}


@pytest.mark.parametrize(
    ("name", "wrong"), [("weight", 2.1), ("adapter", -0.1), ("start", -0.1), ("yaw", 80.0), ("every", 5)]
)
def test_a_value_out_of_range_is_told_before_the_plot_begins(axes, name, wrong):
    axes[name].confirm(None, [1, 1.0])
    with pytest.raises(FaceSnapError, match=f"{name} is {wrong:g}"):
        axes[name].confirm(None, [1, wrong])


def test_values_are_read_as_what_the_setting_is(axes):
    """The plot makes them of text; FFRNet cannot run every 2.0 steps."""
    job = SimpleNamespace()
    for name, text in (("every", "2"), ("weight", "1")):
        axes[name].apply(job, axes[name].type(text), [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: replace(UNIT, every=2, weight=1.0)}
