"""Scripts that the user selected and that create several jobs, or one job whose number of images matters."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.selected_script import selected_script
from tests.support.mock_processing import Processing, Runner, process_images

TITLES = ("Prompt matrix", "X/Y/Z plot", "SD upscale", "Loopback", "Prompts from file or textbox", "Outpainting mk2")
BATCH = {"reference_mode": "batch", "model": "random.safetensors"}


def job(host, title, *args, **values):
    runner = Runner(host.script)
    runner.selectable_scripts = [SimpleNamespace(title=lambda title=title: title) for title in TITLES]
    host.script.args_from = 1
    return Processing(
        world=host, script_args=[TITLES.index(title) + 1 if title else 0, *args], scripts=runner, **values
    )


@pytest.fixture
def photos(astronaut, grace_hopper):
    return [Image.fromarray(photo.pixels) for photo in (astronaut, grace_hopper)]


@pytest.mark.parametrize("title", [None, *TITLES])
def test_the_selected_script_is_known_by_its_title(host, title):
    assert selected_script(job(host, title)) == (title or "")
    assert selected_script(SimpleNamespace()) == ""
    assert selected_script(Processing(world=host, script_args=[True], scripts=Runner(host.script))) == ""


@pytest.mark.parametrize("title", ["Prompt matrix", "SD upscale", "Loopback", "Outpainting mk2"])
def test_scripts_that_count_images_are_refused_before_any_is_made(host, photos, title):
    drawn = []
    host.draw = lambda *args: drawn.append(args)
    with pytest.raises(FaceSnapError, match=f"The script {title} depends on the number of images in a job"):
        process_images(job(host, title, {**BATCH, "references": photos}))
    assert drawn == []
    host.draw = lambda p, *args: Image.new("RGB", (8, 8))
    assert len(process_images(job(host, title, {**BATCH, "references": photos[:1]})).images) == 1


def test_scripts_that_take_any_number_of_images_run(host, photos):
    for title in (None, "Prompts from file or textbox", "X/Y/Z plot"):
        assert len(process_images(job(host, title, {**BATCH, "references": photos})).images) == 2


@pytest.mark.parametrize("why", ["setting", "API"])
def test_a_plot_that_shows_one_image_per_cell_says_so(host, photos, why):
    host.opts.return_grid = why != "setting"
    cell = process_images(job(host, "X/Y/Z plot", {**BATCH, "references": photos}, do_not_save_grid=why == "API"))
    [card] = cell.images
    assert card.size == (512, 512)
    assert np.asarray(card).std() > 5


@pytest.mark.parametrize(
    "person", [{"references": ["nothing"]}, {"identity": "nobody"}, {"references": [], "start": 0.9, "end": 0.1}, {}]
)
def test_a_failing_cell_of_a_plot_shows_why(host, person, monkeypatch):
    from facesnap_ext.hosts import selected_script as module

    told = []
    card = module._card
    monkeypatch.setattr(module, "_card", lambda text, *size: told.append(text) or card(text, *size))
    host.draw = lambda *args: pytest.fail("computed")
    result = process_images(job(host, "X/Y/Z plot", person, width=320, height=256))
    assert [image.size for image in result.images] == [(320, 256)]
    with pytest.raises(FaceSnapError) as error:
        process_images(job(host, None, person))
    assert told == [f"FaceSnap: {error.value}"]
