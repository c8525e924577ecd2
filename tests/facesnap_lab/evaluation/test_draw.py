"""Drawing a list: what is there stays, what is not is drawn, and nothing is mixed."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate", reason="processes share the drawing by accelerate")
pytest.importorskip("diffusers", reason="pictures are drawn with diffusers")

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.evaluation.draw import Cost, cost, draw_cases
from facesnap_lab.evaluation.miniature import miniature_pipeline


@dataclass
class Painter:
    """In the place of a pipeline: noise by the case's seed."""

    colour: str = "grey"
    fails_at: str = ""
    drawn: list[str] = field(default_factory=list)

    def draw(self, case):
        if case.file == self.fails_at:
            raise FaceSnapError("No face was found.")
        self.drawn.append(case.file)
        return np.random.default_rng(case.seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)

    def recipe(self, case):
        return {"colour": self.colour, "seed": case.seed}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(path):
    return np.asarray(Image.open(path)).tolist()


def test_every_case_is_drawn_once_and_never_again(world, tmp_path):
    cases = world.cases()
    painter = Painter()
    draw_cases(painter, cases, tmp_path)
    assert painter.drawn == [case.file for case in cases]
    before = contents(tmp_path)
    assert set(before) == set(painter.drawn)  # and nothing else lies there
    assert pixels(tmp_path / cases[3].file) == Painter().draw(cases[3]).tolist()

    again = Painter()
    draw_cases(again, cases, tmp_path)
    assert again.drawn == []
    assert contents(tmp_path) == before


def test_a_run_that_stopped_goes_on_to_the_same_pictures(world, tmp_path):
    cases = world.cases()
    draw_cases(Painter(), cases, tmp_path / "whole")
    with pytest.raises(FaceSnapError, match="No face"):
        draw_cases(Painter(fails_at=cases[5].file), cases, tmp_path / "stopped")
    kept = contents(tmp_path / "stopped")
    assert set(kept) == {case.file for case in cases[:5]}
    rest = Painter()
    draw_cases(rest, cases, tmp_path / "stopped")
    assert rest.drawn == [case.file for case in cases[5:]]
    assert kept.items() <= contents(tmp_path / "stopped").items()
    for case in cases:
        assert pixels(tmp_path / "stopped" / case.file) == pixels(tmp_path / "whole" / case.file)


def test_a_picture_that_is_cut_off_is_drawn_again(world, tmp_path):
    cases = world.cases()
    draw_cases(Painter(), cases, tmp_path)
    broken = tmp_path / cases[2].file
    whole = pixels(broken)
    broken.write_bytes(broken.read_bytes()[:-300])
    again = Painter()
    draw_cases(again, cases, tmp_path)
    assert again.drawn == [cases[2].file]
    assert pixels(broken) == whole


def test_pictures_of_another_recipe_or_origin_are_not_mixed_in(world, tmp_path):
    cases = world.cases()
    draw_cases(Painter(), cases[:3], tmp_path / "grey")
    with pytest.raises(FaceSnapError, match="another colour"):
        draw_cases(Painter("red"), cases, tmp_path / "grey")
    foreign = tmp_path / "foreign" / cases[0].file
    foreign.parent.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(foreign)
    with pytest.raises(FaceSnapError, match="not drawn by this command"):
        draw_cases(Painter(), cases, tmp_path / "foreign")


def test_cost_is_the_median_of_seconds_and_the_peak_of_memory(world, tmp_path, monkeypatch):
    from facesnap_lab.evaluation import draw

    cases = world.cases()[:3]
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 23.0])  # the first picture takes 9 seconds, then 2 and 3
    peaks = iter([5 * 10**9, 7 * 10**9, 6 * 10**9])
    monkeypatch.setattr(draw.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(draw, "_peak_of_process", lambda: next(peaks))
    assert draw_cases(Painter(), cases, tmp_path) == Cost(3.0, 7 * 10**9, "process", "CPU") == cost(cases, tmp_path)


def test_the_miniatures_facesnap_draws_by_reference_pose_prompt_and_seed(world, tmp_path):
    """The same case twice is one picture; the recipe differs wherever the picture does."""
    pytest.importorskip("insightface")
    torch.manual_seed(0)
    pipeline = miniature_pipeline(tmp_path, steps=2)
    first, other_pose, other_person = world.cases()[0], world.cases()[1], world.cases()[2]
    drawn = pipeline.draw(first)
    torch.manual_seed(1)  # nothing but the case decides
    np.testing.assert_array_equal(pipeline.draw(first), drawn)
    assert pipeline.recipe(first) == pipeline.recipe(first)
    for other in (other_pose, other_person):
        assert pipeline.recipe(other) != pipeline.recipe(first)
        assert (pipeline.draw(other) != drawn).mean() > 0.1
