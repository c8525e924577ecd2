"""The script that the WebUI loads: importing it is cheap, and no failure is silent."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import fork, webui, windows
from facesnap_ext.hosts import job as host_job
from facesnap_ext.hosts.errors import Refusal
from facesnap_ext.hosts.job import PreparedBatch
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.networks import compiled
from facesnap_ext.photos import from_pil
from facesnap_ext.settings.infotext import from_infotext, to_infotext
from facesnap_ext.settings.script_args import UI_ORDER, from_script_args
from facesnap_ext.settings.unit import Unit
from tests.support import mock_webui
from tests.support.mock_processing import Processing, Runner, process_images
from tests.support.units import make_unit

SCRIPT = mock_webui.SCRIPT
HEAVY = ("insightface", "onnxruntime", "transformers", "diffusers", "cv2", "skimage", "scipy")


def job(**values):
    p = SimpleNamespace(width=512, height=512, extra_generation_params={}, comments=[], **values)
    p.comment = p.comments.append
    return p


def run(host, p, *args):
    """Make the host's calls for one image, and swallow exceptions as the host does."""
    with suppress(Exception):
        host.script.before_process(p, *args)
    with suppress(Exception):
        host.script.process(p, *args)
    with suppress(Exception):
        host.script.process_before_every_sampling(p, *args, x=None, noise=None, c=None, uc=None)
    with suppress(Exception):
        host.script.post_sample(p, None, *args)
    with suppress(Exception):
        host.script.postprocess(p, None, *args)


def attached(host):
    return [call[1] for call in host.calls if isinstance(call, tuple)]


def test_importing_the_script_loads_no_heavy_package(tmp_path):
    """The process has already imported torch, PIL and gradio, as in every host."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parents[1])!r})
import torch, PIL.Image, PIL.ImageOps, safetensors.torch
from tests.support import mock_webui
from pathlib import Path
mock_webui.install(Path({str(tmp_path)!r}))
before = set(sys.modules)
exec(Path({str(SCRIPT)!r}).read_text(), {{"__name__": "facesnap"}})
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(*sorted(loaded & set({HEAVY!r})))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_the_pages_components_are_those_that_settings_read(host):
    for people in (1, 2, 4):
        host.opts.facesnap_people = people
        components = host.script.ui(is_img2img=False)
        ids = [component.values.get("elem_id") for component in components]
        expected = [
            name if number == 1 else f"{name}_{number}"
            for number in range(1, people + 1)
            for name in ("enable", *UI_ORDER[1:])
        ]
        assert ids == expected
    assert host.script.show(is_img2img=True) == "always"
    host.script.ui(is_img2img=True)  # the API builds the page again


def test_saving_the_hosts_defaults_skips_hidden_text_and_further_people(host):
    """The host names components by their labels, so that one person's settings would become those of all."""
    hidden = ("settings", "mask")
    for component in host.script.ui(is_img2img=False):
        name = component.values["elem_id"]
        assert getattr(component, "do_not_save_to_config", False) == (name in hidden or name.endswith("_2")), name


def test_every_setting_is_pasted_back(host):
    """After pasting, the page shows the settings in the image's infotext, except for photos."""
    components = host.script.ui(is_img2img=False)
    unit = make_unit(
        weight=0.5,
        pose="sliders",
        yaw=20,
        x=0.25,
        y=0.4,
        size=0.3,
        block_weights=(0.5,) * 10,
        identity="Ada",
        region="face",
    )
    text = {name: str(value) for name, value in to_infotext({2: unit}).items()}
    pasted = {id(component): paste(text) for component, paste in host.script.infotext_fields}
    values = [pasted.get(id(component)) for component in components]
    values[0] = True  # the accordion's checkbox enables person 1, who is not in this image
    units = from_script_args(values)
    assert units[2] == unit
    assert units[1] == Unit(True)


def test_command_line_options_move_the_model_folder_and_add_others(host, tmp_path, monkeypatch):
    """The host reads the options from preload.py. After installation, they are missing until the host is restarted."""
    assert host.module.model_files().folder == Path(sys.modules["modules.paths"].models_path) / "facesnap"
    spec = importlib.util.spec_from_file_location("facesnap_preload", SCRIPT.parents[1] / "preload.py")
    preload = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preload)
    parser = argparse.ArgumentParser()
    preload.preload(parser)
    comfy = tmp_path / "comfy"
    for folder in (comfy, tmp_path / "moved", tmp_path / "controlnet"):
        folder.mkdir()
    moved = ["--facesnap-models-dir", str(tmp_path / "moved"), "--facesnap-also-look-in", str(comfy)]
    for name, value in vars(parser.parse_args(moved)).items():
        monkeypatch.setattr(host.module.shared.cmd_opts, name, value, raising=False)
    monkeypatch.setattr(host.module.shared.cmd_opts, "controlnet_dir", str(tmp_path / "controlnet"), raising=False)
    files = host.module.model_files()
    assert files.folder == tmp_path / "moved"
    assert {comfy, tmp_path / "controlnet"} <= set(files.elsewhere)
    assert vars(parser.parse_args([])) == {"facesnap_models_dir": None, "facesnap_also_look_in": []}


def test_exactly_one_denoiser_callback_is_registered(host):
    assert host.denoiser_callbacks == [host.module.host.on_cfg_denoiser]


def test_a_job_is_conditioned_and_released(host, astronaut):
    p = job()
    values = {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors", "weight": 0.7}
    run(host, p, values)
    ((conditioning,),) = attached(host)
    assert conditioning.strength.weight == 0.7
    assert conditioning.landmarks.width == 512
    assert host.calls[0] == "detach"  # this removes what an earlier job may have left behind
    assert host.calls[-2:] == ["detach", "detach"]
    assert p.extra_generation_params["FaceSnap weight"] == 0.7
    assert host.state.textinfo.startswith("FaceSnap")


NEVER = {"start": 0.5, "end": 0.5}


@pytest.mark.parametrize("args", [[False], [], [{"enabled": False}], [{"weight": 0}], [NEVER | {"weight": 0}]])
def test_an_inactive_unit_is_neither_prepared_nor_attached(host, args, monkeypatch):
    monkeypatch.setattr(host_job, "prepare", lambda *args: pytest.fail("prepared"))
    p = job()
    run(host, p, *args)
    assert attached(host) == [()], "no people"
    assert p.extra_generation_params == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "without a reference photo"),
        ({"references": ["bm90IGEgcGljdHVyZQ=="]}, "Reference photo 1"),
        (
            {"references": [Image.new("RGB", (64, 64), "grey")], "model": "random.safetensors"},
            r"No face was found in Reference photo 1",
        ),
        ({"odd": 1}, "no setting named 'odd'"),
        (NEVER, r"start \(0.5\) is not before its end \(0.5\)"),
    ],
)
def test_errors_during_preparation_stop_the_job(host, values, message):
    run(host, job(), values)
    (refusal,) = attached(host)
    assert isinstance(refusal, Refusal)
    with pytest.raises(FaceSnapError, match=message):
        raise refusal.error()


def test_each_active_unit_is_a_person_in_the_image(host, astronaut):
    values = {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors"}
    p = job()
    run(host, p, {**values, "weight": 0.7}, {"weight": 0}, {**values, "weight": 0.4, "region": "face"})
    ((first, second),) = attached(host)
    assert (first.strength.weight, second.strength.weight) == (0.7, 0.4)
    assert first.ffrnet is second.ffrnet
    assert first.region is None
    assert second.region is not None


def test_an_error_names_the_person_by_number(host, astronaut):
    good = {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors"}
    for bad, message in (({}, r"^Person 3: .*without a reference photo"), ({"odd": 1}, r"^Person 3: .*named 'odd'")):
        host.calls.clear()
        run(host, job(), good, {"enabled": False}, bad)
        (refusal,) = attached(host)
        with pytest.raises(FaceSnapError, match=message):
            raise refusal.error()


def test_a_pass_without_people_attaches_no_one(host, astronaut):
    p = job()
    run(host, p, {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors", "hires": "second"})
    assert attached(host) == [()]


@pytest.mark.parametrize("where", ["prepare", "for_pass"])
def test_internal_errors_stop_the_job(host, monkeypatch, where):
    """The host swallows a script's exceptions, but must not generate an image of a different person."""
    monkeypatch.setattr(host_job, "prepare", lambda *args: (PreparedBatch(()),))
    monkeypatch.setattr(windows if where == "for_pass" else host_job, where, lambda *args: 1 / 0)
    run(host, job(), {"references": []})
    (refusal,) = attached(host)
    assert isinstance(refusal, Refusal)
    assert "ZeroDivisionError" in refusal.message


@pytest.fixture
def hides_exceptions(host, monkeypatch):
    """The mock WebUI's page does not show exceptions of sampling, as reForge's."""
    monkeypatch.setattr(fork, "current", lambda: fork.Fork("reForge", shows_sampling_errors=False))
    monkeypatch.setattr(host.module.host, "check", lambda p, people: host.checked.append(people))
    host.checked = []
    host.in_force = lambda: next((call[1] for call in reversed(host.calls) if isinstance(call, tuple)), None)
    return host


def page_job(host, *settings, **values) -> Processing:
    return Processing(host, scripts=Runner(host.script), script_args=settings, **values)


def test_where_the_page_hides_exceptions_a_refused_job_ends_with_its_sentence(hides_exceptions):
    p = page_job(hides_exceptions, {}, n_iter=2)
    processed = process_images(p)
    assert processed.images == []
    assert len(p.comments) == 1
    assert "without a reference photo" in p.comments[0]
    assert attached(hides_exceptions) == [], "sampling never began"

    with pytest.raises(FaceSnapError, match="without a reference photo"):
        process_images(page_job(hides_exceptions, {}, is_api=True))


def test_where_the_page_hides_exceptions_the_checkpoint_is_checked_before_sampling(hides_exceptions, astronaut):
    settings = {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors"}
    p = page_job(hides_exceptions, settings)
    assert len(process_images(p).images) == 1
    ((person,),) = hides_exceptions.checked
    assert attached(hides_exceptions) == [(person,)]

    def refuse(p, people):
        raise FaceSnapError("FaceSnap needs an SDXL checkpoint and v1.safetensors is not one; choose another.")

    hides_exceptions.module.host.check = refuse
    hides_exceptions.calls.clear()
    p = page_job(hides_exceptions, settings)
    assert process_images(p).images == []
    assert p.comments == ["FaceSnap needs an SDXL checkpoint and v1.safetensors is not one; choose another."]
    assert attached(hides_exceptions) == []


def test_where_the_page_hides_exceptions_a_scripts_job_shows_its_sentence_as_an_image(hides_exceptions):
    """Loopback and other scripts read the first image of each job."""
    p = page_job(hides_exceptions, 1, {})
    hides_exceptions.script.args_from = 1
    p.scripts.selectable_scripts = [SimpleNamespace(title=lambda: "Loopback")]
    (card,) = process_images(p).images
    assert card.size == (p.width, p.height)


def test_an_internal_error_while_attaching_stops_the_job(host, astronaut, monkeypatch):
    """The host swallows the error and would generate an image of a different person."""

    def fail(p, people):
        raise AttributeError("no such thing")

    monkeypatch.setattr(host.module.host, "attach", fail)
    run(host, Processing(), {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors"})
    (refusal,) = attached(host)
    assert "FaceSnap failed: AttributeError('no such thing')" in refusal.message


@pytest.mark.parametrize("lacking", ["modules.infotext_utils", "modules.ui_components", "gradio"])
def test_an_outdated_webui_is_reported_before_anything_is_imported_that_it_lacks(host, monkeypatch, lacking):
    monkeypatch.delattr(sys.modules["modules.scripts"].Script, "process_before_every_sampling")
    monkeypatch.setitem(sys.modules, lacking, None)
    with pytest.raises(ImportError, match=r"needs AUTOMATIC1111 1\.10 or later, or Forge or .* update the WebUI"):
        exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"), {"__name__": "facesnap"})


def test_an_error_does_not_affect_the_next_job(host):
    p = job()
    run(host, p, {})
    host.calls.clear()
    run(host, p, False)
    assert attached(host) == [()]


def test_the_init_image_drives_and_notes_reach_the_page(host, astronaut):
    p = job(init_images=[Image.new("RGB", (300, 200), "grey")], resize_mode=0, paste_to=None)
    run(host, p, {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors"})
    assert "init image has no face" in p.comments[0]
    p = job(init_images=[Image.fromarray(astronaut.pixels)], resize_mode=0, paste_to=(128, 0, 256, 256))
    run(host, p, {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors"})
    assert attached(host)[-1][0].landmarks.width == 256
    assert p.comments == []


def test_compiling_is_a_setting_and_its_failure_is_reported(host, astronaut, monkeypatch):
    values = {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors"}
    for compiling in (False, True):
        host.opts.facesnap_compile = compiling
        run(host, p := job(), values)
        assert attached(host)[-1][0].compile == compiling
        assert p.comments == []
    monkeypatch.setattr(compiled, "failure", "There is no Triton.")
    run(host, p := job(), values)
    assert p.comments == ["FaceSnap: There is no Triton."]
    host.opts.facesnap_compile = False
    run(host, p := job(), values)
    assert p.comments == []


def test_a_small_face_is_redrawn_and_then_measured(host, astronaut, monkeypatch):
    """The detector finds a small face at the landmarks. Pasting the infotext restores the setting."""
    host.opts.facesnap_likeness = True
    measured = []

    def see(image, people, places):
        measured.append(image)
        return [0.5 for person in people]

    def draw(p, i, conditionings):
        return Image.new("RGB", (p.width, p.height), "red" if hasattr(p, "init_images") else "blue")

    host.draw = draw
    values = {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors", "redraw_strength": 0.4}
    p = Processing(world=host, script_args=[values], scripts=Runner(host.script))
    engine = webui.shared_engine(host.module.model_files)
    unit = Unit(True, references=(from_pil(values["references"][0], ""),), model=values["model"])
    left, top, right, bottom = engine.prepare(unit, 512, 512).conditioning.landmarks.box
    x, y = (left + right) / 2, (top + bottom) / 2
    (whole,) = engine.encoders().faces(astronaut)
    small = replace(whole, box=np.float32([x - 20, y - 20, x + 20, y + 20]))
    faces = Encoders.faces
    monkeypatch.setattr(Encoders, "faces", lambda self, photo: [small] if photo.name == "Image" else faces(self, photo))
    monkeypatch.setattr(engine, "likenesses", see)
    result = process_images(p)
    pixels = np.asarray(result.images[0])
    assert tuple(pixels[round(y), round(x)]) == (255, 0, 0)
    assert tuple(pixels[-1, -1]) == (0, 0, 255)
    assert np.array_equal(measured[0].pixels, pixels)
    (text,) = result.infotexts
    assert (text["FaceSnap redraw strength"], text["FaceSnap likeness"]) == (0.4, "0.50")
    assert from_infotext({name: str(value) for name, value in text.items()}, 1)["redraw_strength"] == 0.4
    assert host.calls[-1] == "detach"


def test_finished_images_are_not_examined_by_default(host, astronaut, monkeypatch):
    monkeypatch.setattr("facesnap_ext.hosts.redraw.redraw", lambda *args: pytest.fail("looked"))
    values = {"references": [Image.fromarray(astronaut.pixels)], "model": "random.safetensors"}
    result = process_images(Processing(world=host, script_args=[values], scripts=Runner(host.script)))
    assert "FaceSnap redraw strength" not in result.infotexts[0]


@pytest.mark.parametrize("where", ["status", "person_controls"])
@pytest.mark.parametrize(
    ("error", "message"), [(FaceSnapError("The folder cannot be read."), "cannot be read"), (KeyError("x"), "KeyError")]
)
def test_a_failing_accordion_is_reported_and_stops_only_jobs_with_facesnap(
    host, monkeypatch, caplog, where, error, message
):
    shown = []

    def fail(*args, **values):
        raise error

    monkeypatch.setattr(host.module.accordion, where, fail)
    monkeypatch.setattr(host.module.gr, "HTML", lambda text="", **values: shown.append(text))
    assert len(host.script.ui(is_img2img=False)) == 1  # so that API requests can pass arguments
    assert host.script.infotext_fields == []
    assert "could not be drawn" in shown[-1]
    assert message in shown[-1]
    assert message in caplog.text

    for args in ([False], [{"enabled": False}], []):
        result = process_images(Processing(world=host, script_args=args, scripts=Runner(host.script)))
        assert len(result.images) == 1
    for args in ([True], [{"references": []}]):
        with pytest.raises(FaceSnapError, match=f"could not be drawn: .*{message}"):
            process_images(Processing(world=host, script_args=args, scripts=Runner(host.script)))

    monkeypatch.undo()
    assert len(host.script.ui(is_img2img=True)) > 1
    assert host.script.failure is None
