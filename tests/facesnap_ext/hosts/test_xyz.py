"""Axes of the X/Y/Z plot: each cell gets its own values, and no other job does."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import xyz
from facesnap_ext.photos import Photo
from tests.support.units import changed, make_unit

PHOTOS = tuple(Photo(np.full((4, 4, 3), i, np.uint8), f"photo {i}") for i in range(3))
UNIT = make_unit(True, PHOTOS, weight=0.7)


@dataclass
class AxisOption:
    """Like the host's class."""

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


def test_each_cell_keeps_its_own_values(axes):
    """As in the plot: each cell is a shallow copy of the job, and the values of several axes are applied one by one."""
    job = SimpleNamespace()
    axes["weight"].apply(job, 0.9, [])
    cells = []
    for value in (0.2, 1.5):
        cell = copy.copy(job)
        axes["start"].apply(cell, value / 2, [])
        axes["weight"].apply(cell, value, [])
        cells.append(cell)
    assert [xyz.with_axes(cell, {1: UNIT}) for cell in cells] == [
        {1: changed(UNIT, weight=value, start=value / 2)} for value in (0.2, 1.5)
    ]
    assert xyz.with_axes(job, {1: UNIT}) == {1: changed(UNIT, weight=0.9)}
    assert xyz.with_axes(SimpleNamespace(), {1: UNIT}) == {1: UNIT}


def test_the_cells_weight_decides_who_is_active(axes):
    """A weight of 0 in the plot removes a person; a higher one adds a person whose weight on the page is 0."""
    job = SimpleNamespace()
    out = changed(UNIT, weight=0.0)
    assert xyz.with_axes(job, {1: UNIT, 2: out}) == {1: UNIT}
    axes["weight"].apply(job, 0.0, [])
    assert xyz.with_axes(job, {1: UNIT, 2: out}) == {}
    axes["weight"].apply(job, 0.4, [])
    assert xyz.with_axes(job, {1: out}) == {1: changed(UNIT, weight=0.4)}


def test_yaw_switches_the_pose_to_sliders(axes):
    job = SimpleNamespace()
    axes["yaw"].apply(job, 30.0, [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: changed(UNIT, yaw=30.0, pose="sliders")}


def test_references_can_be_used_one_by_one(axes):
    job = SimpleNamespace()
    axes["reference"].apply(job, 2, [])
    assert xyz.with_axes(job, {1: UNIT})[1].references == (PHOTOS[1],)
    for wrong in (0, 4):
        axes["reference"].apply(job, wrong, [])
        with pytest.raises(FaceSnapError, match=f"reference {wrong}, but the number of references is 3"):
            xyz.with_axes(job, {1: UNIT})


def test_a_missing_reference_is_reported_before_the_plot_begins(axes):
    """The plot passes the whole job, with FaceSnap's arguments among those of other scripts."""
    picture = Image.new("RGB", (8, 8))
    person = {"references": [picture, picture]}
    ours = SimpleNamespace(title=lambda: "FaceSnap", args_from=1, args_to=3)
    other = SimpleNamespace(title=lambda: "Other", args_from=0, args_to=1)
    job = SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[other, ours]), script_args=["other", person, None])
    axes["reference"].confirm(job, [1, 2])
    for wrong in (0, 3):
        with pytest.raises(FaceSnapError, match=f"uses reference {wrong}, but the number of references is 2"):
            axes["reference"].confirm(job, [1, wrong])
    job.script_args[1] = {**person, "enabled": False}
    axes["reference"].confirm(job, [3])


def test_a_saved_identity_replaces_the_photos(axes):
    assert axes["identity"].choices() == ["Ada", "Grace"]
    job = SimpleNamespace()
    axes["identity"].apply(job, "Grace", [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: changed(UNIT, references=(), identity="Grace")}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("weight", 2.1), ("adapter weight", -0.1), ("start", -0.1), ("yaw", 80.0), ("ffrnet interval", 5)],
)
def test_a_value_out_of_range_is_reported_before_the_plot_begins(axes, name, wrong):
    axes[name].confirm(None, [1, 1.0])
    with pytest.raises(FaceSnapError, match=f"{name.replace(' ', '_')} is {wrong:g}"):
        axes[name].confirm(None, [1, wrong])


def test_values_have_the_type_of_their_setting(axes):
    """The plot makes them from text; FFRNet cannot run every 2.0 steps."""
    job = SimpleNamespace()
    for name, text in (("ffrnet interval", "2"), ("weight", "1")):
        axes[name].apply(job, axes[name].type(text), [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: changed(UNIT, ffrnet_interval=2, weight=1.0)}
