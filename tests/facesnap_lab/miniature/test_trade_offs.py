"""Settings compared with the first one, on portraits with known figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from facesnap_ext.settings.unit import Unit
from facesnap_lab.miniature import trade_offs
from facesnap_lab.miniature.trade_offs import ROWS, SHEET_PEOPLE, markdown, people_sheet, results
from tests.facesnap_lab.miniature.test_measure import portrait

FIRST = "faithful"


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(trade_offs, "caption_accuracy", lambda portraits: {"words_found": {"shirt": 0.5}})
    likeness = np.random.default_rng(0).normal(0.5, 0.2, 200)
    gain = np.random.default_rng(1).normal(-0.1, 0.01, 200)
    rows = {FIRST: [portrait(value) for value in likeness], "other": [portrait(v) for v in likeness + gain]}
    rows["other"][0] = replace(rows["other"][0], pose_error=float("nan"))
    return rows


def test_differences_are_paired_by_person(measured):
    """The setting's effect is much smaller than the differences between people, so unpaired means would not show it."""
    found = results(measured)
    assert found[FIRST]["difference"] == {"mean": 0, "low": 0, "high": 0}
    difference = found["other"]["difference"]
    assert difference["mean"] == pytest.approx(-0.1, abs=0.003)
    assert difference["high"] - difference["low"] == pytest.approx(2 * 1.96 * 0.01 / 200**0.5, rel=0.2)
    assert found["other"]["likeness"]["mean"] == pytest.approx(0.4, abs=0.03)
    assert (found["other"]["pose_error_degrees"], found["other"]["without_a_face"]) == (3.0, 1)


def test_table_has_a_row_for_each_setting(measured):
    table = markdown(results(measured)).splitlines()
    assert table[0].endswith("| shirt |")
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {FIRST}", "| other"]
    assert "-10." in table[3] or "-9.9" in table[3]
    assert all(line.count("|") == table[0].count("|") for line in table)


def test_sheet_has_the_references_and_a_row_for_each_setting(measured):
    width, height = people_sheet(measured).size
    one = people_sheet({FIRST: measured[FIRST]}).height
    assert height > one
    assert width > SHEET_PEOPLE * 64


def test_rows_are_valid_and_different_settings():
    units = [Unit(enabled=True, **settings) for settings in ROWS.values()]
    assert len(set(units)) == len(units)
    assert units[0] == Unit(enabled=True)
