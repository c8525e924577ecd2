"""An evaluation with published weights of rivals, from the command to the report, in the miniature world."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate", reason="accelerate distributes the work over processes")
diffusers = pytest.importorskip("diffusers", reason="images are generated with diffusers")
pytest.importorskip("insightface", reason="faces are detected with insightface")
pytest.importorskip("peft", reason="diffusers loads LoRAs with peft")
pytest.importorskip("torchmetrics", reason="FID is computed with torchmetrics")

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.cli.main import main
from facesnap_lab.evaluation.draw import NOTE, Base
from facesnap_lab.evaluation.protocol import read_protocol
from facesnap_lab.evaluation.rivals import open_rivals
from facesnap_lab.miniature import shipped
from tests.facesnap_lab.rivals import published_files
from tests.support import face_packs

METHODS = {"IP-Adapter FaceID": "ip-adapter", "InstantID": "instantid", "PhotoMaker V2": "photomaker"}
PACKS = {"IP-Adapter FaceID": "buffalo_l", "InstantID": "antelopev2", "PhotoMaker V2": "buffalo_l"}


@pytest.fixture(scope="module")
def pipe():
    return shipped.load_sdxl()


@pytest.fixture(scope="module")
def folder(pipe, world, tmp_path_factory):
    """A list, two face model packs, and a file of each method that fits the miniature's SDXL."""
    from tests.facesnap_ext.weights.test_instantid import image_proj

    folder = tmp_path_factory.mktemp("rivals")
    for seed, (pack, recognition) in enumerate({"antelopev2": "glintr100", "buffalo_l": "w600k_r50"}.items()):
        (folder / "models" / pack).mkdir(parents=True)
        shutil.copy(shipped.MODELS / "identity" / "detector.onnx", folder / "models" / pack)
        face_packs.write_layout(folder / "models" / pack / f"{recognition}.onnx", seed)
    ada = world.identities[0]
    content = {
        "identities": {ada.name: {"references": [str(ada.references[0])], "photos": list(map(str, ada.photos))}},
        "poses": {pose.name: str(pose.photo) for pose in world.poses},
        "prompts": {"plain": "a photo of a person"},
    }
    (folder / "list.json").write_text(json.dumps(content), encoding="utf-8")

    faceid = published_files.ip_adapter(published_files.FACEID, pipe.unet, id_dim=512)
    published_files.write(folder / "ip-adapter", faceid)
    photomaker = published_files.photomaker(2, pipe.unet, id_dim=512)
    published_files.write(folder / "photomaker", photomaker)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.ControlNetModel.from_unet(pipe.unet)
    for parameter in network.controlnet_mid_block.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    network.save_pretrained(folder / "instantid" / "ControlNetModel")
    attention = published_files.attention_shapes(pipe.unet, rank=0)
    pair = {f"image_proj.{key}": tensor for key, tensor in image_proj(pipe.unet.config.cross_attention_dim).items()}
    published_files.write(folder / "instantid" / "ip-adapter.bin", pair | published_files.random_tensors(attention))
    return folder


def command(folder, *arguments):
    options = [
        "--facenet",
        str(shipped.JUDGES / "judge.onnx"),
        "--models",
        str(folder / "models"),
        "--dtype",
        "float32",
    ]
    options += ["--width", "64", "--height", "64", "--steps", "2"]
    return main(["evaluate", str(folder / "list.json"), *options, *arguments])


def methods_of(folder):
    return [f"{method}={folder / method}" for method in METHODS.values()]


def test_command_generates_and_measures_each_methods_images(folder, tmp_path, capsys):
    """The files have names that say nothing. There is no FaceSnap file."""
    options = [option for value in methods_of(folder) for option in ("--method", value)]
    assert command(folder, *options, "--base", str(shipped.SDXL), "--out", str(tmp_path / "out")) == 0
    assert "models has no FaceSnap file, so only the other methods are evaluated." in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["methods"]] == list(METHODS)
    assert all(row["cost"]["seconds"] > 0 for row in found["methods"])

    protocol = read_protocol(folder / "list.json")
    drawn = {}
    for name in METHODS:
        for case in protocol.cases():
            with Image.open(tmp_path / "out" / name / case.file) as image:
                drawn[name, case.pose.name] = np.asarray(image).astype(int)
                recipe = json.loads(image.info[NOTE])
            assert (recipe["seed"], recipe["prompt"], recipe["steps"]) == (case.seed, "a photo of a person", 2)
            assert ("driving" in recipe) == (name == "InstantID")
            if name == "InstantID":
                assert recipe["strength"] == [0.8, 0.8]
            else:
                assert recipe["method"][0] == name
    first = protocol.poses[0].name
    for one, other in (("IP-Adapter FaceID", "InstantID"), ("InstantID", "PhotoMaker V2")):
        assert np.abs(drawn[one, first] - drawn[other, first]).mean() > 1


def test_methods_use_the_recognition_model_that_they_were_trained_with(pipe, folder, tmp_path):
    protocol = read_protocol(folder / "list.json")
    base = Base(pipe, "the miniature's SDXL")
    found = open_rivals(methods_of(folder), base, folder / "models")
    assert list(found) == list(METHODS)
    for name, generator in found.items():
        generator.check(protocol.cases())
        files = generator.files if name == "InstantID" else generator.encoders.files
        assert files.face_pack.name == PACKS[name]

    models = shutil.copytree(folder / "models", tmp_path / "models")
    shutil.rmtree(models / "buffalo_l")
    for name, generator in open_rivals(methods_of(folder), base, models).items():
        if name != "InstantID":
            with pytest.raises(
                FaceSnapError, match=f"{name} is made for w600k_r50.onnx, but .* contains glintr100.onnx"
            ):
                generator.check(protocol.cases())


def test_missing_clip_is_reported_before_the_first_image(pipe, folder, tmp_path):
    path = published_files.write(tmp_path / "a.bin", published_files.ip_adapter(published_files.PLUS, pipe.unet))
    found = open_rivals([f"ip-adapter={path}"], Base(pipe, "SDXL"), folder / "models")
    with pytest.raises(FaceSnapError, match="There is no CLIP-ViT-H image encoder in"):
        found["IP-Adapter Plus"].check(read_protocol(folder / "list.json").cases())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["pulid=a.safetensors"], "because pulid needs EVA-CLIP and a face parser, which FaceSnap does not include; "),
        (["consistentid=a.bin"], "because consistentid needs a face parser, which FaceSnap does not include; "),
        (["faceswap=a.bin"], "faceswap=a.bin is not a known method; write METHOD=PATH with ip-adapter, instantid, "),
        (["ip-adapter"], "--method ip-adapter is not a known method; write METHOD=PATH"),
        (["ip-adapter=none.bin"], "There is no file none.bin"),
        (["instantid=none"], "none must contain one pair of InstantID's files, "),
    ],
)
def test_unusable_methods_are_reported_in_one_sentence(pipe, folder, values, told):
    with pytest.raises(FaceSnapError) as raised:
        open_rivals(values, Base(pipe, "SDXL"), folder / "models")
    assert told in str(raised.value)


def test_two_files_of_one_method_are_refused(pipe, folder):
    value = f"photomaker={folder / 'photomaker'}"
    with pytest.raises(FaceSnapError, match="is a second file of PhotoMaker V2; evaluate it in a separate run"):
        open_rivals([value, value], Base(pipe, "SDXL"), folder / "models")


def test_a_method_needs_a_base(folder, tmp_path, capsys):
    assert command(folder, "--method", "ip-adapter=a.bin", "--out", str(tmp_path / "out")) == 1
    assert "--method ip-adapter=a.bin generates images; specify the SDXL model with --base." in capsys.readouterr().err
