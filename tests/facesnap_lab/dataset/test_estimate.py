"""`facesnap dataset estimate`: a sample is built, and extrapolated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.cli.main import main
from facesnap_lab.dataset import estimate as module
from facesnap_lab.dataset.estimate import Rates, as_text, choose, rows
from facesnap_lab.dataset.layouts import list_people
from tests.support.dataset_photos import SETTINGS, SIDE, portraits, save


def arguments(people, models, *more):
    sizes = {"resolution": SIDE, "crops": SETTINGS.crops, "min-face": SETTINGS.min_face, "sample": 7, "workers": 2}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    return ["dataset", "estimate", str(people), "--models", str(models), *options, *more]


def test_the_estimate_of_a_sample_agrees_with_the_build(people, models, built, capsys):
    before = sorted(people.rglob("*"))
    assert main(arguments(people, models, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(people.rglob("*")) == before
    assert found["sample"] == 9  # three whole people
    own = found["builds"][0]
    assert own["photos"] == 18
    assert own["images"] == 18 * SETTINGS.crops
    written = sum(path.stat().st_size for path in built.glob("*.tar"))
    assert own["shards_GB"] * 1e9 == pytest.approx(written, rel=0.1)
    read = sum(path.stat().st_size for path in people.rglob("*.png"))
    assert own["photos_GB"] * 1e9 == pytest.approx(read, rel=0.1)
    assert found["rates"]["captioning"] == 0
    assert found["rates"]["building"] > found["rates"]["reading"] > 0


def test_hours_are_those_of_all_processes_and_of_one_blip2():
    rates = Rates(reading=0.1, captioning=0.5, building=1.7, images=4.5, shard_bytes=4e6, photo_bytes=1e5)
    own, *larger = rows(rates, 3600, workers=8)
    assert own["core_hours"] == pytest.approx(1.8)
    assert own["caption_hours"] == pytest.approx(0.5)
    assert own["hours"] == pytest.approx(1.8 / 8 + 0.5)
    assert own["images"] == 16_200
    assert own["shards_GB"] == pytest.approx(14.4)
    assert own["photos_GB"] == pytest.approx(0.36)
    assert [row["photos"] for row in larger] == [10**5, 10**6, 10**7, 10**8]
    for row in larger:
        assert row["hours"] == pytest.approx(own["hours"] * row["photos"] / 3600)
    text = as_text({"sample": 100, "workers": 8, "rates": vars(rates), "builds": [own, *larger]})
    assert "reading 100 ms, captioning 500 ms, building 1700 ms per photo." in text
    assert "| 3,600 photos | 16,200 | 1.8 | 0.5 | 0.725 | 0.36 | 14.4 |" in text


def test_a_sample_has_whole_people_and_is_the_same_each_time(people):
    listing = list_people([people], "auto", None)
    chosen = choose(listing.people, 4, np.random.default_rng(0))
    assert [len(person.photos) for person in chosen] == [3, 3]
    assert chosen == choose(listing.people, 4, np.random.default_rng(0))
    assert len(choose(listing.people, 10**6, np.random.default_rng(0))) == 6


def test_photos_that_cannot_be_used_are_reported(models, tmp_path):
    for shot, image in enumerate(portraits(0, 2)):
        save(image.resize((16, 16)), tmp_path / "photos" / "n000000" / f"{shot:04d}_01.png", "a person")
    with pytest.raises(FaceSnapError, match="None of the 2 photos in the sample can be used"):
        module.estimate([tmp_path / "photos"], models, SETTINGS)
