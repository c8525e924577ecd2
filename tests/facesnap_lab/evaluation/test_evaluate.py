"""The evaluation on the miniature, from the list to the four report files."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("accelerate", reason="accelerate distributes the work over processes")
pytest.importorskip("diffusers", reason="images are generated with diffusers")
pytest.importorskip("matplotlib", reason="the plot is drawn with matplotlib")
pytest.importorskip("torchmetrics", reason="FID is computed with torchmetrics")

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import from_path
from facesnap_lab.cli.main import main
from facesnap_lab.evaluation import measure as measuring
from facesnap_lab.evaluation.draw import NOTE
from facesnap_lab.evaluation.evaluate import FACESNAP, evaluate, named_folders
from facesnap_lab.evaluation.judges import Judges
from facesnap_lab.evaluation.measure import METRICS, embed_real_photos, measure
from facesnap_lab.evaluation.miniature import miniature_judges, miniature_pipeline
from facesnap_lab.evaluation.protocol import Protocol, read_protocol
from facesnap_lab.evaluation.report import table
from facesnap_lab.miniature.measure import Judge
from facesnap_lab.storage import Url


def copies(protocol, folder, photo_of):
    """Create a method's folder that contains a copied photo for each case."""
    for case in protocol.cases():
        path = folder / case.file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo_of(case), path)
    return folder


@pytest.fixture
def references_only(world):
    """One pose, and people without photos other than their references."""
    people = tuple(replace(identity, photos=()) for identity in world.identities)
    return Protocol(people, world.poses[:1], world.prompts, world.seed)


def measured(protocol, judges, folder, name="copies"):
    return measure(name, folder, protocol, judges, embed_real_photos(protocol, judges))


def test_copies_of_the_real_photos_score_perfectly_except_for_the_prompt(references_only, judges, tmp_path):
    folder = copies(references_only, tmp_path, lambda case: case.identity.references[0])
    scores = measured(references_only, judges, folder)
    assert scores.values["face_sim"] == pytest.approx(1)
    assert scores.values["clip_face"] == pytest.approx(1)
    assert scores.fid == pytest.approx(0, abs=1e-2)
    assert scores.without_face == ()
    assert np.all(scores.values["clip_t"] < 0.99)


def test_references_score_like_the_judge_against_the_other_photos(world, judges, tmp_path):
    folder = copies(world, tmp_path, lambda case: case.identity.references[0])
    scores = measured(world, judges, folder)
    judge = Judge()
    expected = []
    for identity in world.identities:
        own, *others = (judge.embedding(from_path(path).pixels) for path in (*identity.references, *identity.photos))
        expected.append(np.mean([own @ other for other in others]))
    assert scores.by_person["face_sim"] == pytest.approx(expected, abs=1e-5)
    assert scores.intervals["face_sim"].mean == pytest.approx(np.mean(expected), abs=1e-5)


def test_merged_results_of_other_processes_are_the_same_bits(world, judges, tmp_path, monkeypatch):
    """The tasks are run in another order, and travel as they do to other machines."""
    monkeypatch.setattr(measuring, "BATCH", 2)
    folder = copies(world, tmp_path, lambda case: case.identity.photos[0])
    Image.new("RGB", (64, 64), "grey").save(folder / world.cases()[3].file)
    expected = measured(world, judges, folder)

    def run_elsewhere(work, tasks, advance):
        results = {}
        for number in np.random.default_rng(0).permutation(len(tasks)):
            sent, argument = pickle.loads(pickle.dumps((work, tasks[number].argument)))
            results[number] = pickle.loads(pickle.dumps(sent(argument)))
            advance(tasks[number].size)
        return [results[number] for number in range(len(tasks))]

    progress = []
    real = embed_real_photos(world, judges, lambda: progress.append(1), run_elsewhere, miniature_judges)
    scores = measure("copies", folder, world, judges, real, progress.append, run_elsewhere, miniature_judges)
    assert progress == [1] * len(world.identities) + [2] * (len(world.cases()) // 2)
    assert (scores.fid, scores.without_face) == (expected.fid, expected.without_face)
    assert scores.intervals == expected.intervals
    for metric in METRICS:
        assert scores.values[metric].tobytes() == expected.values[metric].tobytes()


def test_photos_of_other_people_score_lower_and_images_without_a_face_0(world, judges, tmp_path):
    following = dict(zip(world.identities, (*world.identities[1:], world.identities[0])))
    own = copies(world, tmp_path / "own", lambda case: case.identity.references[0])
    others = copies(world, tmp_path / "others", lambda case: following[case.identity].references[0])
    first, second = (measured(world, judges, folder) for folder in (own, others))
    assert first.intervals["face_sim"].mean > second.intervals["face_sim"].mean + 0.3

    grey = world.cases()[3].file
    Image.new("RGB", (64, 64), "grey").save(own / grey)
    third = measured(world, judges, own)
    assert third.without_face == (grey,)
    assert third.values["face_sim"][3] == third.values["clip_face"][3] == 0
    assert np.delete(third.values["face_sim"], 3) == pytest.approx(np.delete(first.values["face_sim"], 3))


def test_prompts_are_weighted(world, judges, tmp_path):
    light, heavy = replace(world.prompts[0], name="light"), replace(world.prompts[0], name="heavy", weight=3.0)
    protocol = replace(world, prompts=(light, heavy), poses=world.poses[:1])
    folder = copies(
        protocol,
        tmp_path,
        lambda case: case.identity.references[0] if case.prompt is heavy else case.identity.photos[0],
    )
    scores = measured(protocol, judges, folder)
    for i, mean in enumerate(scores.by_person["face_sim"]):
        of_photo, of_reference = scores.values["face_sim"][2 * i : 2 * i + 2]
        assert mean == pytest.approx((of_photo + 3 * of_reference) / 4)


def test_facesnap_is_compared_with_another_method(world, judges, tmp_path):
    """A second run generates nothing and returns the same results."""
    small = Protocol(world.identities[:2], world.poses, world.prompts)
    perfect = copies(small, tmp_path / "perfect", lambda case: case.identity.photos[0])
    Image.new("RGB", (8, 8)).save(perfect / small.identities[0].name / "more.png")
    out = tmp_path / "out"
    pipeline = miniature_pipeline(tmp_path / "models", steps=2)
    found = evaluate(small, judges, {"Perfect": perfect}, out, {FACESNAP: pipeline})

    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    facesnap, peer = found["methods"]
    assert (facesnap["name"], peer["name"]) == ("FaceSnap", "Perfect")
    assert peer["face_sim"]["mean"] > facesnap["face_sim"]["mean"] + 0.3
    difference = found["differences"]["Perfect"]["face_sim"]
    assert difference["mean"] == pytest.approx(facesnap["face_sim"]["mean"] - peer["face_sim"]["mean"])
    assert difference["high"] < 0
    assert facesnap["cost"]["memory_kind"] == "process"
    assert facesnap["cost"]["seconds"] > 0
    assert facesnap["cost"]["memory"] > 10**8
    assert peer["cost"] is None
    assert peer["extra_images"] == 1

    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| | CLIP-T↑ | CLIP-face↑ | FaceSim↑ | FID↓ | Time↓ | VRAM↓ |"
    row = next(line for line in lines if line.startswith("| Perfect |"))
    assert f"{100 * peer['face_sim']['mean']:.1f} (" in row
    assert row.endswith("| – | – |")
    assert any("1 images are not in the list" in line for line in lines)
    with Image.open(out / "sheet.png") as sheet, Image.open(out / "plot.png") as plot:
        assert sheet.width > 4 * 256  # reference, driving photo, two methods
        assert np.ptp(np.asarray(plot)) == 255

    drawn = {path: path.stat().st_mtime_ns for path in (out / "FaceSnap").rglob("*.png")}
    assert len(drawn) == 4
    again = evaluate(small, judges, {"Perfect": perfect}, out, {FACESNAP: pipeline})
    assert {path: path.stat().st_mtime_ns for path in (out / "FaceSnap").rglob("*.png")} == drawn
    assert again == found


def test_unmeasured_metrics_are_shown_as_dashes(references_only, judges, tmp_path):
    folder = copies(references_only, tmp_path / "copies", lambda case: case.identity.references[0])
    found = evaluate(references_only, Judges(clip=judges.clip), {"Copies": folder}, tmp_path / "out")
    row = table(found).splitlines()[2]
    assert row.startswith(f"| Copies | {100 * found['methods'][0]['clip_t']['mean']:.1f} (")
    assert row.endswith("| – | – | – | – | – |")
    assert "FaceSim: not measured" in table(found)


def test_missing_networks_images_and_faces_are_reported(world, judges, tmp_path):
    folder = copies(world, tmp_path / "copies", lambda case: case.identity.references[0])
    for arguments, message in (
        ((Judges(), {"Copies": folder}), "no network"),
        ((judges, {}), "no images"),
        ((judges, {"Copies": tmp_path / "none"}), "image folder .*none does not exist"),
    ):
        with pytest.raises(FaceSnapError, match=message):
            evaluate(world, *arguments, tmp_path / "out")
    cut = world.cases()[5].file
    (folder / cut).write_bytes((folder / cut).read_bytes()[:-400])
    with pytest.raises(FaceSnapError, match=f"{cut} is damaged"):
        evaluate(world, judges, {"Copies": folder}, tmp_path / "out")
    (folder / cut).unlink()
    with pytest.raises(FaceSnapError, match=f"lacks 1 .*{cut}"):
        evaluate(world, judges, {"Copies": folder}, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    grey = tmp_path / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(grey)
    faceless = replace(world, identities=(replace(world.identities[0], photos=(grey,)), *world.identities[1:]))
    with pytest.raises(FaceSnapError, match=rf"grey.png of '{world.identities[0].name}'"):
        embed_real_photos(faceless, judges)


def test_named_folders(tmp_path):
    found = named_folders(["InstantID=runs/1", str(tmp_path / "PuLID")])
    assert [(name, str(folder)) for name, folder in found.items()] == [
        ("InstantID", "runs/1"),
        ("PuLID", str(tmp_path / "PuLID")),
    ]
    for values in (["a=x", "a=y"], ["=x"], ["a="], ["x/a", "y/a"]):
        with pytest.raises(FaceSnapError, match="does not have a unique name"):
            named_folders(values)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no list to evaluate"),
        (["none.yaml"], "list none.yaml does not exist"),
        (["--miniature", "--base", "sdxl"], "provides its own base"),
        (["--miniature", "--people", "0"], "--people is 0"),
        (["--upload", "copies"], "--upload is copies, but must be a URL"),
        (["--upload", "s3://key:secret@bucket"], "The URL s3://…@bucket contains credentials"),
    ],
)
def test_errors_of_the_command_are_one_line(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments, "--out", "out"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("facesnap: ")
    assert told in last
    assert not (tmp_path / "out").exists()


def test_command_with_a_list_and_all_model_files(world, judges, tmp_path, capsys):
    """A list, SDXL, a model folder, CLIP and a face recognition network, in the same form as users have them."""
    from facesnap_lab.miniature import shipped
    from facesnap_lab.miniature.words import write_tokenizer

    shipped.write_models(tmp_path / "models")
    clip = shutil.copytree(shipped.MODELS / "clip", tmp_path / "clip")
    write_tokenizer(clip)
    ada, bob = world.identities[:2]
    content = {
        "identities": {
            who.name: {"references": [str(who.references[0])], "photos": list(map(str, who.photos))}
            for who in (ada, bob)
        },
        "poses": {"front": str(world.poses[0].photo)},
        "prompts": {"plain": world.prompts[0].text},
    }
    (tmp_path / "list.json").write_text(json.dumps(content), encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["evaluate", str(tmp_path / "list.json"), "--clip", str(clip), "--out", str(out)]
    arguments += ["--facenet", str(shipped.JUDGES / "judge.onnx"), "--base", str(shipped.SDXL), "--steps", "2"]
    assert main(arguments) == 1
    assert "--models" in capsys.readouterr().err

    arguments += ["--models", str(tmp_path / "models"), "--width", "64", "--height", "64", "--dtype", "float32"]
    arguments += ["--upload", "memory://evaluation"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == (out / "table.md").read_text(encoding="utf-8").strip()
    copied = Url("memory://evaluation")
    assert set(copied.list_files()) == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert (copied / "results.json").read_bytes() == (out / "results.json").read_bytes()
    facesnap = json.loads((out / "results.json").read_text(encoding="utf-8"))["methods"][0]
    protocol = read_protocol(tmp_path / "list.json")
    expected = measured(protocol, judges, out / "FaceSnap")
    for metric in METRICS:
        assert list(facesnap["by_person"][metric].values()) == pytest.approx(expected.by_person[metric], abs=1e-4)
    assert facesnap["fid"] is None
    with Image.open(out / "FaceSnap" / protocol.cases()[0].file) as picture:
        assert picture.size == (64, 64)
        recipe = json.loads(picture.info[NOTE])
    assert (recipe["steps"], recipe["scale"], recipe["seed"]) == (2, 2, protocol.cases()[0].seed)
    assert recipe["sampler"] == "DPMSolverSinglestepScheduler"  # diffusers' implementation of the paper's DPM++ SDE
