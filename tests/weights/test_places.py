"""What is found in the model folders, under any names."""

from __future__ import annotations

import resource

import pytest
import torch
from weight_files import KINDS, write

from facesnap_ext import convert
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.folders import usual_places
from facesnap_ext.weights import places
from facesnap_ext.weights.places import find_models

VIT_H = KINDS["CLIP_VISION"]


def pack(folder, *names):
    folder.mkdir(parents=True)
    for name in names or ("det_10g.onnx", "w600k_r50.onnx"):
        (folder / name).touch()
    return folder


def put(path, *args, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, *args, **values)


def test_files_are_found_by_what_is_in_them(tmp_path):
    clip = write(tmp_path / "zebra.safetensors", KINDS["CLIP_VISION"])
    deca = write(tmp_path / "anything.tar", KINDS["DECA_ORIGINAL"], "torch")
    flame = write(tmp_path / "head.safetensors", {"v_template": (3, 3)}, format="facesnap-flame")
    first = write(tmp_path / "b.safetensors", {"ffrnet.conv_in.weight": (1,)})
    second = write(tmp_path / "a.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    faces = pack(tmp_path / "my pack")
    files = find_models(tmp_path)
    assert (files.clip, files.deca, files.flame, files.face_pack) == (clip, deca, flame, faces)
    assert files.facesnap == {"a.safetensors": second, "b.safetensors": first}
    assert files.unreadable == []


def test_converted_files_come_before_the_originals(tmp_path):
    write(tmp_path / "a.tar", KINDS["DECA_ORIGINAL"], "torch")
    converted = write(tmp_path / "z.safetensors", {"x": (1,)}, format="facesnap-deca")
    assert find_models(tmp_path).deca == converted


@pytest.mark.parametrize("layout", ["antelopev2", "antelopev2/antelopev2"])
def test_a_pack_is_found_flat_and_nested_here_and_in_insightfaces_folder(tmp_path, layout):
    pack(tmp_path / "here" / layout)
    pack(tmp_path / "insightface" / "models" / layout)
    assert find_models(tmp_path / "here").face_pack == tmp_path / "here" / layout
    other = (tmp_path / "insightface",)
    assert find_models(tmp_path / "none", other).face_pack == tmp_path / "insightface" / "models" / layout
    assert find_models(tmp_path / "here", other).face_pack == tmp_path / "here" / layout


def test_a_clip_folder_of_transformers_is_found_once(tmp_path):
    folder = tmp_path / "CLIP-ViT-H"
    put(folder / "model.safetensors", VIT_H)
    put(folder / "pytorch_model.bin", VIT_H, "torch")
    (folder / "config.json").write_text("{}")
    files = find_models(tmp_path)
    assert files.clip == folder
    assert [found.path for found in files.found] == [folder]


def test_what_is_passed_over_is_said_where_something_is_missing(tmp_path):
    write(tmp_path / "control.safetensors", KINDS["SD15_CONTROLNET"])
    (tmp_path / "half.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not a weight file")
    files = find_models(tmp_path)
    with pytest.raises(
        FaceSnapError, match=r"control\.safetensors is an SD1\.5 ControlNet.*half\.safetensors is damaged"
    ):
        files.choose_facesnap()
    assert "notes" not in " ".join(files.unreadable)


def test_a_file_that_changed_is_recognised_anew(tmp_path):
    path = write(tmp_path / "x.safetensors", KINDS["LORA"])
    assert find_models(tmp_path).clip is None
    write(path, KINDS["CLIP_VISION"])
    assert find_models(tmp_path).clip == path


def test_nothing_is_stored_twice(tmp_path):
    """ControlNet's, insightface's and ComfyUI's folders serve where FaceSnap's own has nothing."""
    data, models = tmp_path, tmp_path / "models"
    comfy = tmp_path / "ComfyUI" / "models"
    clip = put(data / "extensions/sd-webui-controlnet/annotator/downloads/clip_vision/clip_h.pth", VIT_H, "torch")
    comfys = put(comfy / "clip_vision" / "vit-h.safetensors", VIT_H)
    deca = put(comfy / "anything" / "deca_model.tar", KINDS["DECA_ORIGINAL"], "torch")
    net = put(models / "ControlNet" / "control_instant_id_sdxl.safetensors", KINDS["SDXL_CONTROLNET"])
    adapter = put(models / "ControlNet" / "ip-adapter_instant_id_sdxl.bin", KINDS["INSTANTID_ADAPTER"], "torch")
    faces = pack(models / "insightface" / "models" / "buffalo_l")

    def find(*named):
        return find_models(models / "facesnap", usual_places(models, data, named=named))

    files = find()
    assert (files.clip, files.face_pack, files.deca) == (clip, faces, None)
    assert [found.path for found in files.found if found.role == "instantid"] == [net, adapter]
    assert {found.place for found in files.found} == {clip.parent, models / "insightface", models / "ControlNet"}
    assert (find(comfy).clip, find(comfy).deca) == (comfys, deca)  # what the user named comes first
    own = put(models / "facesnap" / "mine.safetensors", VIT_H)
    assert find(comfy).clip == own
    assert files.unreadable == []


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
def test_another_programs_folder_gives_only_what_is_beyond_doubt_and_is_not_complained_of(tmp_path, name, content):
    path = tmp_path / "other" / name
    if isinstance(content, dict):
        put(path, content)
    else:
        path.parent.mkdir()
        path.write_bytes(content or b"damaged")
    files = find_models(tmp_path / "own", [tmp_path / "other"])
    assert files.found == []
    assert files.unreadable == []


def test_a_detector_of_poses_is_no_face_pack(tmp_path):
    pack(tmp_path / "other" / "openpose", "yolox_l.onnx", "dw-ll_ucoco_384.onnx")
    assert find_models(tmp_path / "own", [tmp_path / "other"]).face_pack is None


def test_the_way_down_is_bounded_and_ends_are_told(tmp_path, monkeypatch):
    put(tmp_path / "a/b/c/d/near.safetensors", VIT_H)
    put(tmp_path / "a/b/c/d/e/far.safetensors", VIT_H)
    put(tmp_path / "checkpoints/x.safetensors", VIT_H)
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a", target_is_directory=True)
    other = find_models(tmp_path / "own", [tmp_path])
    assert [found.path.name for found in other.found] == ["near.safetensors"]
    for number in range(4):
        put(tmp_path / "own" / f"{number}.safetensors", KINDS["LORA"])
    monkeypatch.setattr(places, "MAX_FILES", 3)
    told = find_models(tmp_path / "own").unreadable
    assert "has more than 3 weight files" in told[-1]
    monkeypatch.setattr(places, "MAX_FOLDERS", 2)
    assert "has more than 2 folders" in find_models(tmp_path / "own", [tmp_path]).unreadable[-1]


def test_of_large_files_only_the_names_are_read_and_only_once(tmp_path, monkeypatch):
    """A torch file of 256 MB adds nothing to memory, and a second look reads nothing at all."""
    path = tmp_path / "own" / "large.bin"
    path.parent.mkdir()
    torch.save({"E_flame.x": torch.zeros(2**26)}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert find_models(path.parent).deca == path
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    (path.parent / "bad.safetensors").write_bytes(b"bad")
    told = find_models(path.parent).unreadable
    monkeypatch.setattr(places, "recognise", lambda path: pytest.fail(f"{path} was read again"))
    assert find_models(path.parent).unreadable == told


def test_old_torch_files_of_other_programs_are_read_only_when_small(tmp_path, monkeypatch):
    put(tmp_path / "other" / "clip.pth", VIT_H, "torch, old")
    assert find_models(tmp_path / "own", [tmp_path / "other"]).clip is not None
    monkeypatch.setattr(places, "MAX_OLD_TORCH_BYTES", 1000)
    assert find_models(tmp_path / "own", [tmp_path / "other"]).clip is None


def test_flame_of_a_shared_folder_is_converted_into_the_own_one(tmp_path, monkeypatch):
    shared = tmp_path / "other" / "generic_model.pkl"
    shared.parent.mkdir()
    shared.write_bytes(b"\x80\x02}.")
    files = find_models(tmp_path / "own", [shared.parent])
    assert files.flame == shared
    monkeypatch.setattr(convert, "convert", lambda source, out: out)
    convert.convert_originals(files, lambda message: None)
    assert files.flame == tmp_path / "own" / "flame.safetensors"


NET, ADAPTER = KINDS["SDXL_CONTROLNET"], KINDS["INSTANTID_ADAPTER"]


@pytest.mark.parametrize(
    ("nets", "paired"),
    [
        (["own/InstantID/ControlNetModel/diffusion_pytorch_model.safetensors"], 0),  # as it is published
        (["own/InstantID/net.safetensors"], 0),  # beside it, under any name
        (["own/InstantID/depth.safetensors", "own/InstantID/control_instant_id_sdxl.safetensors"], 1),
        (["other/canny.safetensors", "other/instantid/net.safetensors"], 1),  # the other half is ControlNet's
        (["own/canny.safetensors", "other/canny.safetensors"], None),
        ([], None),
    ],
)
def test_instantids_halves_are_paired_and_never_with_just_any_controlnet(tmp_path, nets, paired):
    adapter = put(tmp_path / "own/InstantID/ip-adapter.bin", ADAPTER, "torch")
    paths = [put(tmp_path / net, NET) for net in nets]
    files = find_models(tmp_path / "own", [tmp_path / "other"])
    assert files.facesnap == ({} if paired is None else {"InstantID": (paths[paired], adapter)})
    told = " ".join(files.unreadable)
    assert ("wants InstantID's ControlNet" in told) == (paired is None)
    assert ("canny.safetensors is an SDXL ControlNet" in told) == (len(nets) > 1 and nets[0].startswith("own/canny"))


def test_without_a_name_the_own_folders_file_comes_before_what_serves_from_elsewhere(tmp_path):
    pair = (put(tmp_path / "other/instantid.safetensors", NET), put(tmp_path / "other/a.bin", ADAPTER, "torch"))

    def find():
        return find_models(tmp_path / "own", [tmp_path / "other"])

    assert find().choose_facesnap() == pair
    mine = put(tmp_path / "own" / "mine.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    assert find().choose_facesnap() == mine
    assert find().choose_facesnap("InstantID") == pair
    put(tmp_path / "own" / "two.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    with pytest.raises(FaceSnapError, match=r"several FaceSnap files .*InstantID, mine\.safetensors, two\.safetensors"):
        find().choose_facesnap()


def test_each_of_several_pairs_has_a_name_of_its_own(tmp_path):
    pairs = [
        (put(tmp_path / place / "net.safetensors", NET), put(tmp_path / place / "a.bin", ADAPTER, "torch"))
        for place in ("a", "b/x", "c/x", "d/x")
    ]
    found = find_models(tmp_path).facesnap
    assert sorted(found.values()) == sorted(pairs)
    assert {"InstantID", "InstantID (x)"} < set(found)


def test_clip_is_missing_only_where_something_wants_it(tmp_path):
    assert "clip" in find_models(tmp_path).missing()
    put(tmp_path / "InstantID/net.safetensors", NET)
    put(tmp_path / "InstantID/a.bin", ADAPTER, "torch")
    assert set(find_models(tmp_path).missing()) == {"face_pack", "deca", "flame"}
    put(tmp_path / "mine.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    assert "clip" in find_models(tmp_path).missing()
