"""Lists: the cases they expand to, and the errors reported for invalid ones."""

import json
from collections import Counter

import pytest
from PIL import Image

pytest.importorskip("yaml", reason="lists are read with PyYAML")

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.evaluation.protocol import Identity, Pose, Prompt, Protocol, find_images, plan, read_protocol

LIST = {
    "seed": 3,
    "identities": {"ada": "a.png", "bob": {"references": ["b.png"], "photos": ["c.png", "d.png"]}},
    "poses": {"left": "a.png", "up": "b.png"},
    "prompts": {"beach": "a person on a beach", "oil": {"text": "an oil painting", "weight": 0.5}},
}


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def write_list(folder, content, name="list.yaml"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(**fields):
    return {**LIST, **fields}


def test_cases_combine_every_identity_pose_and_prompt(folder):
    protocol = read_protocol(write_list(folder, LIST))
    cases = protocol.cases()
    assert [case.file for case in cases[:4]] == [
        "ada/left-beach.png",
        "ada/left-oil.png",
        "ada/up-beach.png",
        "ada/up-oil.png",
    ]
    assert len(cases) == len({case.file for case in cases}) == len({case.seed for case in cases}) == 8
    ada, bob = protocol.identities
    assert ada.real == ada.references == (folder / "a.png",)
    assert [path.name for path in bob.real] == ["c.png", "d.png"]
    assert [prompt.weight for prompt in protocol.prompts] == [1, 0.5]


@pytest.mark.parametrize("count", [1, 3, 4, 12])
def test_identities_take_turns_with_the_combinations(folder, count):
    photo = folder / "a.png"
    poses, prompts = (
        tuple(kind(f"{i}", content) for i in range(n)) for kind, content, n in ((Pose, photo, 4), (Prompt, "x", 3))
    )
    people = tuple(Identity(f"person {i}", (photo,)) for i in range(12))
    every, some = Protocol(people, poses, prompts), Protocol(people, poses, prompts, per_person=count)
    cases = some.cases()
    assert len(cases) == len({case.file for case in cases}) == 12 * count
    assert {(case.file, case.seed) for case in cases} <= {(case.file, case.seed) for case in every.cases()}
    used = Counter((case.pose.name, case.prompt.name) for case in cases)
    assert set(used.values()) == {count}
    for identity in people:
        own = {case.pose.name for case in cases if case.identity is identity}
        assert len(own) == min(count, len(poses))


def test_yaml_and_json_are_equivalent(folder):
    text = """
seed: 3
identities:
  ada: a.png
  bob: {references: [b.png], photos: [c.png, d.png]}
poses: {left: a.png, up: b.png}
prompts:
  beach: a person on a beach
  oil: {text: an oil painting, weight: 0.5}
"""
    assert read_protocol(write_list(folder, text)) == read_protocol(write_list(folder, LIST, "list.json"))


def test_file_and_seed_of_a_case_do_not_depend_on_other_entries(folder):
    alone = changed(identities={"bob": "b.png"}, poses={"up": "b.png"})
    few = {case.file: case.seed for case in read_protocol(write_list(folder, alone)).cases()}
    many = {case.file: case.seed for case in read_protocol(write_list(folder, LIST)).cases()}
    assert few.items() < many.items()
    other = read_protocol(write_list(folder, changed(seed=4))).cases()
    assert not {case.seed for case in other} & set(many.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("identities: [", "cannot be read"),
        ("- ada", "must have the fields"),
        (changed(people={}), "unknown field 'people'"),
        (changed(seed=-1), "seed"),
        (changed(identities={}), "no identities"),
        (changed(poses=None), "no poses"),
        (changed(identities={"ada": "none.png"}), "none.png, which does not exist"),
        (changed(identities={"ada": []}), "'ada'.*no photo"),
        (changed(identities={"ada": ["a.png", "a.png"]}), "same photo twice"),
        (changed(identities={"ada": {"references": ["a.png"], "photo": "b.png"}}), "unknown field 'photo'"),
        (changed(identities={"../ada": "a.png"}), "cannot be a file name"),
        (changed(identities={"ada": "a.png", "Ada": "b.png"}), "ada/left-beach.png and Ada/left-beach.png"),
        (changed(poses={"a": "a.png", "a-b": "b.png"}, prompts={"b-c": "x", "c": "y"}), "two images"),
        (changed(prompts={"beach": ""}), "no text"),
        (changed(prompts={"beach": {"text": "x", "weight": 0}}), "weight"),
        ("identities: {ada: a.png, ada: b.png}\nposes: {l: a.png}\nprompts: {p: x}", "'ada' twice"),
        ("identities: {1: a.png}\nposes: {l: a.png}\nprompts: {p: x}", "quote"),
    ],
)
def test_invalid_lists_are_reported(folder, content, message):
    with pytest.raises(FaceSnapError, match=message) as error:
        read_protocol(write_list(folder, content))
    assert "list.yaml" in str(error.value)


def test_plan_writes_a_list_that_reads_back(folder, tmp_path):
    people = tmp_path / "people"
    (people / "bob").mkdir(parents=True)
    for name in ("ada.png", "bob/1.png", "bob/2.jpg"):
        Image.new("RGB", (8, 8)).save(people / name)
    (people / "notes.txt").write_text("not a photo")
    poses, prompts = tmp_path / "poses", tmp_path / "prompts.txt"
    poses.mkdir()
    Image.new("RGB", (8, 8)).save(poses / "left.png")
    prompts.write_text("a person on a beach\n\nyes: a person, in snow\n", encoding="utf-8")
    made = plan(people, poses, prompts, tmp_path / "deep" / "list.yaml", seed=5)
    assert read_protocol(tmp_path / "deep" / "list.yaml") == made
    assert [(who.name, len(who.references), len(who.photos)) for who in made.identities] == [
        ("ada", 1, 0),
        ("bob", 1, 1),
    ]
    assert [prompt.text for prompt in made.prompts] == ["a person on a beach", "yes: a person, in snow"]
    with pytest.raises(FaceSnapError, match="already exists"):
        plan(people, poses, prompts, tmp_path / "deep" / "list.yaml")

    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in ((empty, poses, prompts), (people, empty, prompts), (people, poses, tmp_path / "none.txt")):
        with pytest.raises(FaceSnapError, match=r"empty|none\.txt"):
            plan(*arguments, tmp_path / "other.yaml")
    Image.new("RGB", (8, 8)).save(people / "ada.jpg")
    with pytest.raises(FaceSnapError, match="two photos named 'ada'"):
        plan(people, poses, prompts, tmp_path / "other.yaml")
    assert not list(tmp_path.glob("other*"))


def test_find_images_accepts_other_suffixes_and_names_missing_images(folder):
    cases = read_protocol(write_list(folder, LIST)).cases()
    pictures = folder / "pictures"
    for case in cases[:-2]:
        path = pictures / case.file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path.with_suffix(".jpg") if case is cases[0] else path)
    with pytest.raises(FaceSnapError, match=r"lacks 2 of .* 8 images: bob/up-beach\.png, bob/up-oil\.png"):
        find_images(cases, pictures)
    assert find_images(cases[:-2], pictures)[cases[0].file].suffix == ".jpg"
    with pytest.raises(FaceSnapError, match=r"image folder .*none does not exist"):
        find_images(cases, folder / "none")
