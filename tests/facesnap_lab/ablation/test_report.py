"""The ablation's statistics compared with closed forms, and its tables compared with the scores."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy", reason="intervals are computed with scipy")
for package in ("insightface", "diffusers"):
    pytest.importorskip(package, reason="the ablation's images are generated with it")

from facesnap_lab import statistics
from facesnap_lab.ablation.editions import SECOND
from facesnap_lab.ablation.pictures import METRICS
from facesnap_lab.ablation.report import Scores, differences, estimate, markdown, results, verdicts
from facesnap_lab.ablation.rows import TABLE_2, TABLE_3, distinct, reference_rows

COUNTS = (1, 2, 4)
ROWS = distinct((*TABLE_2, *TABLE_3, *reference_rows(COUNTS)))
SEEDS, PEOPLE = 3, 200
LEVELS = {row.name: 0.1 + 0.05 * i for i, row in enumerate(ROWS)}
ABOUT = {"seeds": [0, 1, 2], "people": PEOPLE, "steps": 9, "images_per_step": 12} | {
    "pair_distance_mm": 3.0,
    "mean_distance_mm": 2.0,
}


@pytest.fixture(scope="module")
def scores():
    """People differ strongly and equally in all rows, seeds by a constant, and images by a little noise."""
    random = np.random.default_rng(0)
    people = random.normal(0, 0.2, PEOPLE)
    seeds = np.array([-0.02, 0.0, 0.02])[:, None]
    values = {
        name: {metric: level + people + seeds + random.normal(0, 0.03, (SEEDS, PEOPLE)) for metric in METRICS}
        for name, level in LEVELS.items()
    }
    fid = {name: np.array([10.0, 11.0, 12.0]) for name in LEVELS}
    return Scores(values, fid, {name: np.array([0, 1, 0]) for name in LEVELS})


def test_estimate_has_mean_interval_over_people_and_spread_of_seeds(scores):
    values = scores.values["id"]["face_sim"]
    found = estimate(values)
    assert found["mean"] == pytest.approx(values.mean())
    # interval of a mean over independent people: 1.96 standard errors on each side
    error = values.mean(0).std(ddof=1) / PEOPLE**0.5
    assert (found["low"], found["high"]) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error
    )
    assert found["seeds"] == pytest.approx(list(values.mean(1)))
    assert found["spread"] == pytest.approx(values.mean(1).std(ddof=1))
    assert estimate(values[:1])["spread"] is None


def test_paired_differences_cancel_differences_between_people(scores):
    """The rows' own intervals overlap, but the interval of their difference is as narrow as the noise of an image."""
    [found] = differences(scores, [TABLE_2[:2]])
    gain = found["face_sim"]
    error = 0.03 * (2 / SEEDS) ** 0.5 / PEOPLE**0.5
    assert (found["from"], found["to"]) == ("id", "clip")
    assert gain["mean"] == pytest.approx(0.05, abs=4 * error)
    assert gain["high"] - gain["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert gain["spread"] < 0.01  # a seed shifts all rows equally
    own = estimate(scores.values["id"]["face_sim"])
    assert own["high"] - own["low"] > 5 * (gain["high"] - gain["low"])


@pytest.fixture(scope="module")
def found(scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 500)
        return all_results(scores)


def all_results(scores):
    limits = {"two photos of one person": {m: np.full(PEOPLE, 0.8) for m in ("face_sim", "inner", "clip_face")}}
    return results(ABOUT, COUNTS, scores, limits)


def test_rows_are_compared_with_the_row_above_and_fused_with_averaged(found):
    def pairs(key):
        return [(one["from"], one["to"]) for one in found[key]]

    assert pairs("table_2") == [("id", "clip"), ("clip", "concat"), ("concat", "mixer")]
    assert pairs("table_3") == [("no-ffrnet", "no-landmarks"), ("no-landmarks", "driving"), ("driving", "mixer")]
    assert pairs("references") == [
        *[("2-averaged", "2-fused"), ("mixer", "2-fused"), ("4-averaged", "4-fused"), ("mixer", "4-fused")]
    ]
    assert found["rows"]["id"]["fid"] == {"mean": 11.0, "seeds": [10.0, 11.0, 12.0], "spread": 1.0}
    assert found["rows"]["id"]["without_face"] == [0, 1, 0]


def test_partial_ablation_fills_only_the_tables_of_its_rows(scores):
    few = {name: scores.values[name] for name in ("id", "concat", "mixer")}
    found = all_results(Scores(few, scores.fid, scores.faceless))
    assert [(one["from"], one["to"]) for one in found["table_2"]] == [("id", "concat"), ("concat", "mixer")]
    text = markdown(found, COUNTS)
    assert "concat with projection over Face ID embeddings" in text
    assert "CLIP image features" not in text
    alone = {name: scores.values[name] for name in ("id",)}
    text = markdown(all_results(Scores(alone, scores.fid, scores.faceless)), COUNTS)
    assert "Table 2" in text
    assert "Table 3" not in text
    assert "Number of references" not in text


def test_tables_contain_the_measured_values(found, scores):
    lines = markdown(found, COUNTS).splitlines()
    for row in TABLE_2:
        line = next(line for line in lines if line.startswith(f"| {row.title} |"))
        mean, spread = (
            100 * f(scores.values[row.name]["face_sim"].mean(1)) for f in (np.mean, lambda v: v.std(ddof=1))
        )
        first = line.split(" | ")[1]
        assert first.startswith(f"{mean:.1f} (")
        assert first.endswith(f"±{spread:.1f}")
        assert " | 11 ±1 | " in line
    gain = next(line for line in lines if line.startswith("| Facial Attribute Mixer over concat with projection |"))
    assert gain.split(" | ")[1].startswith("+5.")
    assert any(line.startswith("| two photos of one person | 80.0 (80.0 to 80.0) |") for line in lines)
    assert "Too little data" not in "\n".join(lines)
    assert "- 'id': 1 of 600 images have no face." in lines
    assert "points of the two is 3.00 mm; for any two people it is 2.00 mm." in "\n".join(lines)


@pytest.fixture(scope="module")
def second_scores():
    """In the second edition: the Mixer leads, `concat` is level with it, and seeds differ more where nothing leads."""
    random = np.random.default_rng(1)
    people = random.normal(0, 0.2, PEOPLE)
    levels = dict.fromkeys((row.name for row in SECOND.rows((1,))), 0.2) | {"mixer": 0.3, "no-id": 0.4, "concat": 0.3}
    values = {}
    for name, level in levels.items():
        seeds = random.normal(0, 0.03 if name == "concat" else 0.002, (6, 1))
        noise = random.normal(0, 0.03, (6, PEOPLE))
        values[name] = dict.fromkeys(METRICS, level + people + seeds + noise)
    return Scores(values, {name: np.arange(6.0) for name in levels}, {name: np.zeros(6, int) for name in levels})


def test_predictions_are_confirmed_refuted_or_not_decided(second_scores, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    found = {(one["metric"], one["higher"], one["lower"]): one for one in verdicts(second_scores, SECOND)}
    assert len(found) == len(SECOND.predictions)
    assert found["face_sim_unseen", "mixer", "concat-16"]["outcome"] == "confirmed"
    assert found["face_sim_unseen", "mixer", "no-id"]["outcome"] == "refuted"
    level = found["face_sim_unseen", "mixer", "concat"]
    assert level["outcome"] == "not decided"
    spread = level["difference"]["spread"]
    assert level["seeds"] == statistics.seeds_for_difference(spread, max(0.02, abs(level["difference"]["mean"])))
    one_seed = {name: {m: v[:1] for m, v in row.items()} for name, row in second_scores.values.items()}
    for one in verdicts(Scores(one_seed, {}, {}), SECOND):
        assert (one["outcome"], one["seeds"]) == ("not decided", None)


def test_second_editions_report_has_its_own_tables_and_intervals_over_seeds(second_scores, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    about = ABOUT | {"seeds": list(range(6))}
    limits = {"two photos of one person": {m: np.full(PEOPLE, 0.8) for m in METRICS}}
    found = results(about, (1,), second_scores, limits, SECOND)
    text = markdown(found, (1,), SECOND)
    lines = text.splitlines()
    for table in SECOND.tables:
        assert f"## {table.title}" in lines
        for row in table.rows:
            assert any(line.startswith(f"| {row.title} |") for line in lines)
    widths = {line.count("|") for line in lines if line.startswith("| ") and "gain" not in line}
    assert widths == {5, 6, 9}  # gains and limits, predictions, tables
    assert "FaceSim, other looks" in text
    assert "Number of references" not in text
    line = next(line for line in lines if line.startswith("| recommended losses over without L_id | FaceSim"))
    assert float(line.split(" | ")[2].split(" ")[0]) == pytest.approx(-10, abs=0.5)
    assert line.split(" | ")[3] == "refuted"
    gains = {one["to"]: one for one in found["table_2"]}
    over_people = estimate(second_scores.values["mixer"]["clip_face"] - second_scores.values["concat"]["clip_face"])
    both = gains["mixer"]["clip_face"]
    assert both["high"] - both["low"] > 2 * (over_people["high"] - over_people["low"])


def test_every_prediction_names_rows_and_columns_of_its_edition():
    rows = {row.name for row in SECOND.rows((1,))}
    for prediction in SECOND.predictions:
        assert {prediction.higher, prediction.lower} <= rows
        assert any({prediction.higher, prediction.lower} <= {row.name for row in table.rows} for table in SECOND.tables)
        assert prediction.metric in SECOND.columns
