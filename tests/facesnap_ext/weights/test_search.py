"""The search for model files finds them in any of the folders, under any name."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from facesnap_ext import convert
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.model_folders import shared_model_folders
from facesnap_ext.landmarks.flame import SHAPE_COLUMNS, load_flame
from facesnap_ext.weights import recognise as recognise_module
from facesnap_ext.weights import search
from facesnap_ext.weights.recognise import recognise
from facesnap_ext.weights.search import find_models
from facesnap_lab.miniature.head import stand_in_flame
from tests.support.face_packs import write_layout
from tests.support.weight_files import KINDS, write

VIT_H = KINDS["CLIP_VISION"]


def pack(folder, *names):
    folder.mkdir(parents=True)
    for name in names or ("det_10g.onnx", "w600k_r50.onnx"):
        write_layout(folder / name)
    return folder


def put(path, *args, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, *args, **values)


def test_files_are_found_by_their_content(tmp_path):
    clip = write(tmp_path / "zebra.safetensors", KINDS["CLIP_VISION"])
    deca = write(tmp_path / "anything.tar", KINDS["DECA_ORIGINAL"], "torch")
    flame = write(tmp_path / "head.safetensors", {"v_template": (3, 3)}, format="facesnap-flame")
    first = write(tmp_path / "b.safetensors", {"ffrnet.conv_in.weight": (1,)})
    second = write(tmp_path / "a.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    faces = pack(tmp_path / "my pack")
    files = find_models(tmp_path)
    assert (files.clip, files.deca, files.flame, files.face_pack) == (clip, deca, flame, faces)
    assert files.facesnap == {"a.safetensors": second, "b.safetensors": first}
    assert files.passed_over == []


def test_converted_files_are_preferred_to_originals(tmp_path):
    write(tmp_path / "a.tar", KINDS["DECA_ORIGINAL"], "torch")
    converted = write(tmp_path / "z.safetensors", {"x": (1,)}, format="facesnap-deca")
    assert find_models(tmp_path).deca == converted


@pytest.mark.parametrize("layout", ["antelopev2", "antelopev2/antelopev2"])
def test_pack_is_found_flat_and_nested_in_own_and_insightface_folder(tmp_path, layout):
    pack(tmp_path / "here" / layout)
    pack(tmp_path / "insightface" / "models" / layout)
    assert find_models(tmp_path / "here").face_pack == tmp_path / "here" / layout
    other = (tmp_path / "insightface",)
    assert find_models(tmp_path / "none", other).face_pack == tmp_path / "insightface" / "models" / layout
    assert find_models(tmp_path / "here", other).face_pack == tmp_path / "here" / layout


def test_clip_folder_of_transformers_is_found_once(tmp_path):
    folder = tmp_path / "CLIP-ViT-H"
    put(folder / "model.safetensors", VIT_H)
    put(folder / "pytorch_model.bin", VIT_H, "torch")
    (folder / "config.json").write_text("{}")
    files = find_models(tmp_path)
    assert files.clip == folder
    assert [model.path for model in files.found] == [folder]


def test_error_about_a_missing_part_lists_passed_over_files(tmp_path):
    write(tmp_path / "control.safetensors", KINDS["SD15_CONTROLNET"])
    (tmp_path / "half.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not a weight file")
    files = find_models(tmp_path)
    with pytest.raises(
        FaceSnapError, match=r"control\.safetensors is an SD1\.5 ControlNet.*half\.safetensors is damaged"
    ):
        files.choose_facesnap()
    assert "notes" not in " ".join(files.passed_over)


def test_changed_file_is_recognised_again(tmp_path):
    path = write(tmp_path / "x.safetensors", KINDS["LORA"])
    assert find_models(tmp_path).clip is None
    write(path, KINDS["CLIP_VISION"])
    assert find_models(tmp_path).clip == path


def test_models_of_other_programs_are_shared(tmp_path):
    """Folders of ControlNet, insightface and ComfyUI are used for parts that FaceSnap's own folder lacks."""
    data, models = tmp_path, tmp_path / "models"
    comfy = tmp_path / "ComfyUI" / "models"
    clip = put(data / "extensions/sd-webui-controlnet/annotator/downloads/clip_vision/clip_h.pth", VIT_H, "torch")
    comfys = put(comfy / "clip_vision" / "vit-h.safetensors", VIT_H)
    deca = put(comfy / "anything" / "deca_model.tar", KINDS["DECA_ORIGINAL"], "torch")
    net = put(models / "ControlNet" / "control_instant_id_sdxl.safetensors", KINDS["SDXL_CONTROLNET"])
    adapter = put(models / "ControlNet" / "ip-adapter_instant_id_sdxl.bin", KINDS["INSTANTID_ADAPTER"], "torch")
    faces = pack(models / "insightface" / "models" / "buffalo_l")

    def find(*named):
        return find_models(models / "facesnap", shared_model_folders(models, data, named=named))

    files = find()
    assert (files.clip, files.face_pack, files.deca) == (clip, faces, None)
    assert [model.path for model in files.found if model.role == "instantid"] == [net, adapter]
    assert {model.folder for model in files.found} == {clip.parent, models / "insightface", models / "ControlNet"}
    assert (find(comfy).clip, find(comfy).deca) == (comfys, deca)  # the folder named by the user comes first
    own = put(models / "facesnap" / "mine.safetensors", VIT_H)
    assert find(comfy).clip == own
    assert files.passed_over == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vit-l.safetensors", {"vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14)}),
        ("canny.safetensors", KINDS["SDXL_CONTROLNET"]),
        ("lora.safetensors", KINDS["LORA"]),
        ("damaged.safetensors", None),
        ("anything.pkl", b"\x80\x02}."),
    ],
)
def test_only_unmistakable_files_of_other_programs_are_used_and_others_ignored(tmp_path, name, content):
    path = tmp_path / "other" / name
    if isinstance(content, dict):
        put(path, content)
    else:
        path.parent.mkdir()
        path.write_bytes(content or b"damaged")
    files = find_models(tmp_path / "own", [tmp_path / "other"])
    assert files.found == []
    assert files.passed_over == []


def test_pose_detector_is_not_a_face_model_pack(tmp_path):
    pack(tmp_path / "other" / "openpose", "yolox_l.onnx", "dw-ll_ucoco_384.onnx")
    assert find_models(tmp_path / "own", [tmp_path / "other"]).face_pack is None


def test_search_is_bounded_and_reports_its_limits(tmp_path, monkeypatch):
    put(tmp_path / "a/b/c/d/near.safetensors", VIT_H)
    put(tmp_path / "a/b/c/d/e/far.safetensors", VIT_H)
    put(tmp_path / "checkpoints/x.safetensors", VIT_H)
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a", target_is_directory=True)
    other = find_models(tmp_path / "own", [tmp_path])
    assert [model.path.name for model in other.found] == ["near.safetensors"]
    for number in range(4):
        put(tmp_path / "own" / f"{number}.safetensors", KINDS["LORA"])
    monkeypatch.setattr(search, "MAX_FILES", 3)
    assert "has more than 3 weight files" in find_models(tmp_path / "own").passed_over[-1]
    monkeypatch.setattr(search, "MAX_FOLDERS", 2)
    assert "has more than 2 folders" in find_models(tmp_path / "own", [tmp_path]).passed_over[-1]


def test_recognising_large_files_reads_only_names_and_only_once(tmp_path, monkeypatch):
    """A torch file of 256 MB does not increase memory usage, and a second search reads nothing at all."""
    path = tmp_path / "own" / "large.bin"
    path.parent.mkdir()
    torch.save({"E_flame.x": torch.zeros(2**26)}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert find_models(path.parent).deca == path
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    (path.parent / "bad.safetensors").write_bytes(b"bad")
    passed_over = find_models(path.parent).passed_over
    monkeypatch.setattr(recognise_module, "recognise", lambda path: pytest.fail(f"{path} was read again"))
    assert find_models(path.parent).passed_over == passed_over


def test_old_torch_files_of_other_programs_are_read_only_if_small(tmp_path, monkeypatch):
    put(tmp_path / "other" / "clip.pth", VIT_H, "torch, old")
    assert find_models(tmp_path / "own", [tmp_path / "other"]).clip is not None
    monkeypatch.setattr(search, "MAX_OLD_TORCH_BYTES", 1000)
    assert find_models(tmp_path / "own", [tmp_path / "other"]).clip is None


def test_flame_in_another_programs_folder_is_converted_to_the_own_folder(tmp_path, monkeypatch):
    shared = tmp_path / "other" / "generic_model.pkl"
    shared.parent.mkdir()
    shared.write_bytes(b"\x80\x02}.")
    files = find_models(tmp_path / "own", [shared.parent])
    assert files.flame == shared
    monkeypatch.setattr(convert, "convert", lambda source, out: out)
    convert.convert_originals(files, lambda message: None)
    assert files.flame == tmp_path / "own" / "flame.safetensors"


def archive(folder, names):
    """Write the pickles of an unpacked FLAME archive, of which only the generic ones hold a head model."""
    folder.mkdir(parents=True)
    head = {name: tensor.numpy() for name, tensor in stand_in_flame(0, 1, 1).items()}
    arrays = {name: head[name] for name in ("v_template", "posedirs", "J_regressor", "weights")}
    arrays["shapedirs"] = np.zeros((*head["v_template"].shape, SHAPE_COLUMNS + 5), np.float32)
    arrays |= {"kintree_table": np.stack([head["parents"]] * 2), "f": head["faces"]}
    for name in names:
        content = pickle.dumps(arrays) if name.startswith(("generic", "flame20")) else pickle.dumps({"masks": 1})
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["generic_model.pkl", "FLAME2020.pkl"])
@pytest.mark.parametrize("place", ["own", "other"])
def test_generic_head_of_a_flame_archive_is_used(tmp_path, name, place):
    archive(tmp_path / place, ["FLAME_masks.pkl", "female_model.pkl", name.replace("FLAME", "flame"), "zebra.pkl"])
    files = find_models(tmp_path / "own", [tmp_path / "other"])
    assert files.flame.name.lower() == name.lower()
    convert.convert_originals(files, lambda message: None)
    assert load_flame(files.flame).v_template.shape[1] == 3
    assert files.flame.parent == tmp_path / "own"
    assert files.unconverted == {}
    assert sorted(path.suffix for path in (tmp_path / "own").iterdir()).count(".part") == 0


def test_unconvertible_files_are_passed_over_and_affect_only_their_part(tmp_path):
    """A truncated or unrelated pickle in the model folder does not affect jobs without DECA and FLAME."""
    archive(tmp_path / "own", ["notes.pkl"])
    (tmp_path / "own" / "generic_model.pkl").write_bytes(b"\x80\x04\x95cut off")
    faces = pack(tmp_path / "own" / "pack")
    files = find_models(tmp_path / "own")
    convert.convert_originals(files, lambda message: None)
    assert (files.flame, files.face_pack) == (None, faces)
    with pytest.raises(
        FaceSnapError, match=r"no FLAME head model.*Skipped: .*generic_model\.pkl.*notes\.pkl is not a FLAME"
    ):
        files.require("flame")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs file permissions that apply to this user")
def test_read_only_folder_leaves_the_part_missing_with_a_reason(tmp_path):
    archive(tmp_path / "other", ["generic_model.pkl"])
    own = tmp_path / "own"
    own.mkdir(mode=0o500)
    files = find_models(own, [tmp_path / "other"])
    convert.convert_originals(files, lambda message: None)
    assert files.flame is None
    assert "cannot be written" in files.unconverted["flame"][0]


def test_full_disk_leaves_the_part_missing_with_a_reason(tmp_path, monkeypatch):
    archive(tmp_path / "other", ["generic_model.pkl"])

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "convert_flame", full)
    files = find_models(tmp_path / "own", [tmp_path / "other"])
    convert.convert_originals(files, lambda message: None)
    assert files.flame is None
    assert "No space left" in files.unconverted["flame"][0]


def test_inaccessible_folder_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "other" / "closed").mkdir(parents=True)
    put(tmp_path / "other" / "closed" / "x.safetensors", VIT_H)
    clip = put(tmp_path / "other" / "y.safetensors", VIT_H)
    is_file = Path.is_file

    def closed(path):
        if path.parent.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", closed)
    assert find_models(tmp_path / "own", [tmp_path / "other"]).clip == clip


def test_unexpected_error_in_one_file_does_not_affect_others(tmp_path, monkeypatch):
    put(tmp_path / "a.safetensors", VIT_H)
    clip = put(tmp_path / "b.safetensors", VIT_H)

    def fail(path):
        if path.name == "a.safetensors":
            raise KeyError("somewhere inside")
        return recognise(path)

    monkeypatch.setattr(recognise_module, "recognise", fail)
    files = find_models(tmp_path)
    assert files.clip == clip
    assert files.passed_over == ["a.safetensors cannot be read ('somewhere inside'); download it again."]


NET, ADAPTER = KINDS["SDXL_CONTROLNET"], KINDS["INSTANTID_ADAPTER"]


@pytest.mark.parametrize(
    ("nets", "paired"),
    [
        (["own/InstantID/ControlNetModel/diffusion_pytorch_model.safetensors"], 0),  # the published layout
        (["own/InstantID/net.safetensors"], 0),  # next to the adapter, under any name
        (["own/InstantID/depth.safetensors", "own/InstantID/control_instant_id_sdxl.safetensors"], 1),
        (
            ["other/canny.safetensors", "other/instantid/net.safetensors"],
            1,
        ),  # in the folder of the ControlNet extension
        (["own/InstantID/net.safetensors", "other/instantid/net.safetensors"], 0),  # the one closer to the adapter
        (["own/canny.safetensors", "other/canny.safetensors"], None),
        ([], None),
    ],
)
def test_instantids_halves_are_paired_but_not_with_arbitrary_controlnets(tmp_path, nets, paired):
    adapter = put(tmp_path / "own/InstantID/ip-adapter.bin", ADAPTER, "torch")
    paths = [put(tmp_path / net, NET) for net in nets]
    files = find_models(tmp_path / "own", [tmp_path / "other"])
    assert files.facesnap == ({} if paired is None else {"InstantID": (paths[paired], adapter)})
    reasons = " ".join(files.passed_over)
    assert ("it is not clear which ControlNet belongs to it" in reasons) == (paired is None)
    assert ("canny.safetensors is an SDXL ControlNet" in reasons) == (len(nets) > 1 and nets[0].startswith("own/canny"))


@pytest.mark.parametrize(
    "name", ["control_instant_id_sdxl.safetensors", "Instant ID SDXL.safetensors", "instantid/x.bin"]
)
def test_controlnet_in_other_programs_folders_needs_instantids_name(tmp_path, name):
    adapter = put(tmp_path / "other/ip-adapter_instant_id_sdxl.bin", ADAPTER, "torch")
    canny = put(tmp_path / "other/diffusers_xl_canny_full.safetensors", NET)
    folders = [tmp_path / "other", tmp_path / "third"]
    files = find_models(tmp_path / "own", folders)
    assert files.facesnap == {}
    with pytest.raises(FaceSnapError, match=rf"put InstantID in the name of .* \(found: {re.escape(str(canny))}\)"):
        files.choose_facesnap()
    net = put(tmp_path / "third" / name, NET, "torch" if name.endswith("bin") else "safetensors")
    assert find_models(tmp_path / "own", folders).facesnap == {"InstantID": (net, adapter)}


def test_first_of_two_other_folders_is_used(tmp_path):
    pairs = [
        (put(tmp_path / place / "instantid.safetensors", NET), put(tmp_path / place / "a.bin", ADAPTER, "torch"))
        for place in ("one", "two")
    ]
    assert find_models(tmp_path / "own", [tmp_path / "two", tmp_path / "one"]).choose_facesnap() == pairs[1]


ANTELOPEV2 = ("scrfd_10g_bnkps.onnx", "glintr100.onnx")
BUFFALO_L = ("det_10g.onnx", "w600k_r50.onnx")


@pytest.mark.parametrize(
    "right", ["insightface/models/antelopev2", "insightface/models/antelopev2/antelopev2", "annotator/antelopev2"]
)
@pytest.mark.parametrize("wrong", ["own/buffalo_l", "insightface/models/buffalo_l"])
def test_instantid_uses_its_own_pack_wherever_another_one_is(tmp_path, right, wrong):
    def find():
        return find_models(tmp_path / "own", [tmp_path / "insightface", tmp_path / "annotator"])

    wrong = pack(tmp_path / wrong, *BUFFALO_L)
    right = pack(tmp_path / right, *ANTELOPEV2)
    assert find().face_pack in (wrong, right)
    put(tmp_path / "own/InstantID/net.safetensors", NET)
    put(tmp_path / "own/InstantID/a.bin", ADAPTER, "torch")
    assert find().face_pack == right
    put(tmp_path / "own/mine.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    assert (
        find().face_pack == find_models(tmp_path / "own", [tmp_path / "insightface", tmp_path / "annotator"]).face_pack
    )


def test_a_recognition_model_without_a_detector_is_not_a_pack_to_match(tmp_path):
    """The folder with the right name contains only the recognition model, as after an interrupted download."""
    pack(tmp_path / "own/antelopev2", "glintr100.onnx")
    complete = pack(tmp_path / "own/zebra", *ANTELOPEV2)
    files = find_models(tmp_path / "own")
    assert files.face_pack == complete
    files.match_pack("glintr100.onnx")
    assert files.face_pack == complete


def test_auraface_is_not_mistaken_for_antelopev2(tmp_path):
    pack(tmp_path / "own/AuraFace", *ANTELOPEV2)
    pack(tmp_path / "own/antelopev1", "scrfd_10g_bnkps.onnx", "genderage.onnx")  # incomplete
    right = pack(tmp_path / "other/antelopev2", *ANTELOPEV2)
    put(tmp_path / "own/InstantID/net.safetensors", NET)
    put(tmp_path / "own/InstantID/a.bin", ADAPTER, "torch")
    assert find_models(tmp_path / "own", [tmp_path / "other"]).face_pack == right


def test_pack_in_the_own_folder_is_preferred_whatever_its_file_names(tmp_path):
    mine = pack(tmp_path / "own/mine", "det_10g.onnx", "adaface_ir101.onnx")
    pack(tmp_path / "other/buffalo_l", *BUFFALO_L)
    assert find_models(tmp_path / "own", [tmp_path / "other"]).face_pack == mine


def test_comfyui_beside_the_webui_is_searched(tmp_path):
    data = tmp_path / "stable-diffusion-webui"
    for comfyui in ("ComfyUI", "ComfyUI_windows_portable/ComfyUI"):
        clip = put(tmp_path / comfyui / "models/clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", VIT_H)
        assert find_models(data / "models/facesnap", shared_model_folders(data / "models", data)).clip == clip
        clip.unlink()


def test_complete_pack_is_preferred_to_an_incomplete_one(tmp_path):
    pack(tmp_path / "own/antelopev2", "scrfd_10g_bnkps.onnx", "genderage.onnx")
    pack(tmp_path / "own/stray", "something.onnx")
    complete = pack(tmp_path / "other/buffalo_l", *BUFFALO_L)
    assert find_models(tmp_path / "own", [tmp_path / "other"]).face_pack == complete
    complete = pack(tmp_path / "own/zebra", "detector.onnx", "recognition.onnx")
    assert find_models(tmp_path / "own", [tmp_path / "other"]).face_pack == complete


def test_without_a_name_the_file_in_the_own_folder_is_chosen(tmp_path):
    pair = (put(tmp_path / "other/instantid.safetensors", NET), put(tmp_path / "other/a.bin", ADAPTER, "torch"))

    def find():
        return find_models(tmp_path / "own", [tmp_path / "other"])

    assert find().choose_facesnap() == pair
    mine = put(tmp_path / "own" / "mine.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    assert find().choose_facesnap() == mine
    assert find().choose_facesnap("InstantID") == pair
    put(tmp_path / "own" / "two.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    with pytest.raises(FaceSnapError, match=r"several FaceSnap files in .*own \(mine\.safetensors, two\.safetensors\)"):
        find().choose_facesnap()


def test_each_of_several_pairs_has_a_distinct_name(tmp_path):
    pairs = [
        (put(tmp_path / place / "net.safetensors", NET), put(tmp_path / place / "a.bin", ADAPTER, "torch"))
        for place in ("a", "b/x", "c/x", "d/x")
    ]
    found = find_models(tmp_path).facesnap
    assert sorted(found.values()) == sorted(pairs)
    assert {"InstantID", "InstantID (x)"} < set(found)


def test_clip_is_missing_only_if_it_is_required(tmp_path):
    assert "clip" in find_models(tmp_path).missing()
    put(tmp_path / "InstantID/net.safetensors", NET)
    put(tmp_path / "InstantID/a.bin", ADAPTER, "torch")
    assert set(find_models(tmp_path).missing()) == {"face_pack"}
    put(tmp_path / "mine.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    assert "clip" in find_models(tmp_path).missing()
