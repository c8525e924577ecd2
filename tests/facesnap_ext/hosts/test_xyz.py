"""Axes of the X/Y/Z plot: each cell gets its own values, and no other job does."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import xyz
from facesnap_ext.landmarks.movements import SLIDERS
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import CHOICES, RANGES, defaults, to_values
from tests.support.units import changed, make_unit

PHOTOS = tuple(Photo(np.full((4, 4, 3), i, np.uint8), f"photo {i}") for i in range(3))
UNIT = make_unit(True, PHOTOS, weight=0.7)
JOB = SimpleNamespace(
    scripts=SimpleNamespace(alwayson_scripts=[SimpleNamespace(title=lambda: "FaceSnap", args_from=0, args_to=1)]),
    script_args=[{"references": [Image.new("RGB", (8, 8))]}],
)
API = Path(__file__).parents[3] / "docs" / "api.md"


@dataclass
class AxisOption:
    """Has the same fields as the host's class."""

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
    for _ in range(2):  # the host may build the page twice
        names = {"identity": ["Ada", "Grace"], "model": ["a.safetensors", "b"], "saved_pose": ["Bold", "Shy"]}
        xyz.add_axes({name: partial(list, files) for name, files in names.items()})
    labels = [axis.label for axis in plot.axis_options]
    assert len(labels) == len(set(labels))
    return {axis.label.removeprefix(xyz.PREFIX): axis for axis in plot.axis_options}


def test_each_cell_keeps_its_own_values(axes):
    """As in the plot, each cell is a shallow copy of the job, and the values of several axes are applied one by one."""
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


def test_driving_photos_can_be_used_one_by_one(axes):
    for driving in (PHOTOS, PHOTOS[1]):
        unit, job = changed(UNIT, driving=driving), SimpleNamespace()
        several = driving if isinstance(driving, tuple) else (driving,)
        for number, photo in enumerate(several, 1):
            axes["driving"].apply(job, number, [])
            assert xyz.with_axes(job, {1: unit}) == {1: changed(unit, driving=photo)}
        axes["driving"].apply(job, len(several) + 1, [])
        with pytest.raises(FaceSnapError, match=f"driving photos is {len(several)}; use the number of an existing"):
            xyz.with_axes(job, {1: unit})


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


@pytest.mark.parametrize("name", ["reference", "weight", "identity", "region"])
def test_an_axis_without_facesnap_is_reported_before_the_plot_begins(axes, name):
    off = [{"references": [Image.new("RGB", (8, 8))], "enabled": False}]
    for job in (
        SimpleNamespace(scripts=JOB.scripts, script_args=off),
        SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[])),
    ):
        with pytest.raises(FaceSnapError, match=rf"has the axis \[FaceSnap\] {name}, but FaceSnap is off; turn it on"):
            axes[name].confirm(job, [])


def test_a_saved_identity_replaces_the_photos(axes):
    assert axes["identity"].choices() == ["Ada", "Grace"]
    job = SimpleNamespace()
    axes["identity"].apply(job, "Grace", [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: changed(UNIT, references=(), identity="Grace")}


def test_every_setting_has_an_axis(axes):
    """The exceptions are the mask, the photos, which two axes select by number, and `enabled`, for which the weight 0
    is used."""
    settings = set(defaults()) - {"enabled", "references", "driving", "mask"}
    assert set(axes) - {"Seed"} == {"reference", "driving", *(name.replace("_", " ") for name in settings)}


def test_docs_list_the_axes(axes):
    paragraphs = API.read_text("utf-8").partition("## X/Y/Z plot")[2].partition("\n## ")[0].split("\n\n")
    (listed,) = [paragraph for paragraph in paragraphs if paragraph.startswith("`reference`")]
    named = [name.replace("_", " ") for name in re.findall(r"`(\w+)`", listed)]
    assert sorted(named) == sorted(set(axes) - {"Seed"})


def some_values(name: str) -> tuple[list[Any], list[Any]]:
    """Values of an axis as the plot parses them, and the resulting values of the setting."""
    default = defaults()[name]
    if name == "reference_mode":
        return ["fused", "averaged"], ["fused", "averaged"]
    if name == "block_weights":
        return ["1 0.5", "0,2,1"], [(1.0, 0.5), (0.0, 2.0, 1.0)]
    if isinstance(default, bool):
        return ["True", "False"], [True, False]
    choices = {
        **CHOICES,
        "template": tuple(TEMPLATES),
        "identity": ("Ada", "Grace"),
        "saved_pose": ("Bold", "Shy"),
        "model": ("a.safetensors", "b"),
    }
    if name in choices:
        return list(choices[name]), list(choices[name])
    low, high = RANGES.get(name, (0, 3))
    values = [type(default)(value) for value in (low, high)] if default is not None else [low, high]
    return values, values


SETTINGS = sorted(set(defaults()) - {"enabled", "references", "driving", "mask"})


@pytest.mark.parametrize("name", SETTINGS)
def test_each_axis_sets_its_setting_and_takes_exactly_the_settings_values(axes, name):
    axis, painted = axes[name.replace("_", " ")], changed(UNIT, mask=PHOTOS[0])
    given, expected = some_values(name)
    if axis.choices is not None:
        assert axis.choices() == given
    if name != "region":  # a painted region needs a mask
        axis.confirm(JOB, given)
    for value, result in zip(given, expected):
        cell = SimpleNamespace()
        axis.apply(cell, axis.type(value), [])
        changed_unit = xyz._with_axis_values(painted, cell.facesnap_axes)
        assert to_values(changed_unit)[name] == result
    if name in RANGES:
        low, high = RANGES[name]
        wrong = [low - 1, high + 1]
    else:
        wrong = ["sideways"] if axis.type is str else [-1]
    for value in wrong:
        with pytest.raises(FaceSnapError, match=rf"FaceSnap's {name} (is|are) .*{value}"):
            axis.confirm(JOB, [*given[:1], value])


@pytest.mark.parametrize(
    ("name", "value", "implied"),
    [
        *((name.replace("_", " "), 0.5, {"pose": "sliders"}) for name in SLIDERS),
        ("template", "close-up", {"pose": "template"}),
        ("saved pose", "Shy", {"pose": "saved"}),
        ("expression", "wink", {"expression_source": "custom"}),
        ("expression strength", 0.5, {"expression_source": "custom"}),
        ("region scale", 2.0, {"region": "face"}),
    ],
)
def test_an_axis_switches_on_what_its_setting_belongs_to(axes, name, value, implied):
    job = SimpleNamespace()
    axes[name].apply(job, value, [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: changed(UNIT, **{name.replace(" ", "_"): value}, **implied)}
    ((switch, _),) = implied.items()
    other = {switch: {"pose": "own", "region": "image", "expression_source": "reference"}[switch]}
    axes[switch.replace("_", " ")].apply(job, other[switch], [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: changed(UNIT, **{name.replace(" ", "_"): value}, **other)}


def test_movements_of_a_chosen_expression_keep_the_pose(axes):
    job = SimpleNamespace()
    axes["mouth"].apply(job, 0.5, [])
    axes["expression"].apply(job, "wink", [])
    unit = changed(UNIT, pose="template")
    assert xyz.with_axes(job, {1: unit}) == {1: changed(unit, mouth=0.5, expression="wink", expression_source="custom")}


def test_one_image_per_photo_is_no_value_of_a_plot(axes):
    """It would only show the image for the first photo."""
    with pytest.raises(FaceSnapError, match="reference_mode is 'batch' in the plot; use fused, averaged"):
        axes["reference mode"].confirm(JOB, ["batch"])


def test_a_painted_region_without_a_mask_is_reported_before_the_plot_begins(axes):
    with pytest.raises(FaceSnapError, match="nothing is painted"):
        axes["region"].confirm(JOB, ["image", "mask"])
    ours = SimpleNamespace(title=lambda: "FaceSnap", args_from=0, args_to=1)
    white = Image.new("RGB", (8, 8), "white")
    scripts = SimpleNamespace(alwayson_scripts=[ours])
    axes["region"].confirm(
        SimpleNamespace(scripts=scripts, script_args=[{"references": [white], "mask": white}]), ["mask"]
    )


def test_values_have_the_type_of_their_setting(axes):
    """The plot parses them from text, and FFRNet cannot run every 2.0 steps."""
    job = SimpleNamespace()
    for name, text in (("ffrnet interval", "2"), ("weight", "1")):
        axes[name].apply(job, axes[name].type(text), [])
    assert xyz.with_axes(job, {1: UNIT}) == {1: changed(UNIT, ffrnet_interval=2, weight=1.0)}
