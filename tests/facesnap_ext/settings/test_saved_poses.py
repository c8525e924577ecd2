"""Saved poses: what is written, that it is read back, and that files from others are checked."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.poses import TEMPLATES, Pose
from facesnap_ext.settings.pose import pose_from_unit
from facesnap_ext.settings.saved_poses import (
    MAX_BYTES,
    VERSION,
    choose_pose,
    delete_pose,
    find_poses,
    load_pose,
    pose_folder,
    save_pose,
)
from facesnap_ext.settings.unit import RANGES
from tests.support.units import make_unit

POSES = st.builds(Pose, **{name: st.floats(*RANGES[name]) for name in asdict(Pose())})


@given(pose=POSES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_pose_is_read_back(tmp_path: Path, pose: Pose) -> None:
    path = save_pose(tmp_path, "Looking away", pose)
    try:
        assert asdict(load_pose(tmp_path, "Looking away")) == pytest.approx(asdict(pose), abs=1e-4)
        content = json.loads(path.read_text("utf-8"))
        assert set(content) == {"format", "version", "facesnap", "pose"}
        assert all(isinstance(value, float) for value in content["pose"].values()), "numbers, no pixels"
    finally:
        delete_pose(tmp_path, "Looking away")


def test_a_unit_with_a_saved_pose_has_its_parameters_and_its_own_place(tmp_path: Path) -> None:
    pose = replace(TEMPLATES["tilted"], smile_left=0.5, x=0.3)
    save_pose(tmp_path, "Shy", pose)
    unit = make_unit(pose="saved", saved_pose="Shy", yaw=60, frown=1)
    assert pose_from_unit(unit, 1024, 1024, tmp_path) == pose
    narrow = pose_from_unit(unit, 512, 1024, tmp_path)
    assert narrow == replace(pose, size=pose.size / 2), "the size is a fraction of the shorter side"
    assert pose_from_unit(make_unit(pose="saved", saved_pose="Shy", size=0.2), 512, 1024, tmp_path).size == 0.2


def test_poses_are_listed_saved_once_and_deleted(tmp_path: Path) -> None:
    assert find_poses(tmp_path) == {}
    with pytest.raises(FaceSnapError, match=r"There is no saved pose 'Shy' in .*; save one first"):
        choose_pose(tmp_path, "Shy")
    for name in ("Shy", "Bold", "con"):
        save_pose(tmp_path, name, Pose())
    assert list(find_poses(tmp_path)) == ["Bold", "Shy", "_con"]
    with pytest.raises(
        FaceSnapError, match="There is already a pose Shy; choose a different name, or delete that pose"
    ):
        save_pose(tmp_path, "Shy", Pose(yaw=3))
    assert load_pose(tmp_path, "Shy") == Pose()
    delete_pose(tmp_path, "Shy")
    with pytest.raises(FaceSnapError, match=r"There is no saved pose 'Shy' in .*; choose one of Bold, _con"):
        load_pose(tmp_path, "Shy")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a/b", "Shy.json", "\x00"])
def test_a_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    save_pose(tmp_path, "Shy", Pose())
    for use in (load_pose, delete_pose):
        with pytest.raises(FaceSnapError, match="There is no saved pose"):
            use(tmp_path, name)
    assert list(find_poses(tmp_path)) == ["Shy"]


@pytest.mark.parametrize("name", ["../..", "", "\u202e", " . "])
def test_unusable_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FaceSnapError, match="cannot be used as the name of a pose; choose a name with letters"):
        save_pose(tmp_path, name, Pose())


def test_names_from_outside_stay_in_the_folder(tmp_path: Path) -> None:
    assert save_pose(tmp_path, "../../evil", Pose()).parent == pose_folder(tmp_path)


def a_file(**changes: object) -> bytes:
    content = {"format": "facesnap-pose", "version": VERSION, "facesnap": "1", "pose": {"yaw": 3.0}}
    return json.dumps({**content, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\xff\xfe", ""),
        (b"[" * 10_000, ""),
        (b"[1, 2]", "it is not a FaceSnap pose"),
        (b"{}", "it is not a FaceSnap pose"),
        (b" " * (MAX_BYTES + 1), "it is larger than 16 KB"),
        (a_file(format="other"), "it is not a FaceSnap pose"),
        (a_file(version=VERSION + 1), "it was written by a newer FaceSnap"),
        *((a_file(version=version), "it has no valid version") for version in (0, True, "1", None, 1.0, [1])),
        *((a_file(pose=pose), "it has no pose") for pose in (None, [], "yaw", 3)),
        *((a_file(pose={name: 1.0}), "unknown setting") for name in ("references", "weight", "mask", "enabled", "")),
        *((a_file(pose={"yaw": value}), "yaw is") for value in (90, -76, "3", True, [3], {}, 1e400, 10**400)),
        (b'{"format": "facesnap-pose", "version": 1, "pose": {"yaw": NaN}}', "yaw is nan"),
        *((a_file(pose={name: None}), "a value is missing") for name in ("yaw", "x", "size")),
        (a_file(pose={"mouth": -0.1}), "mouth is -0.1"),
        (a_file(pose={"size": 0}), "size is 0"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_one_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    pose_folder(tmp_path).mkdir()
    (pose_folder(tmp_path) / "Bad.json").write_bytes(content)
    with pytest.raises(FaceSnapError) as error:
        load_pose(tmp_path, "Bad")
    message = str(error.value)
    assert message.startswith("The saved pose Bad.json cannot be used (")
    assert message.endswith("); delete it and save the pose again.")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 500


def test_a_folder_with_a_poses_name_is_refused(tmp_path: Path) -> None:
    (pose_folder(tmp_path) / "Bad.json").mkdir(parents=True)
    with pytest.raises(FaceSnapError, match=r"The saved pose Bad\.json cannot be used"):
        load_pose(tmp_path, "Bad")


def test_a_value_that_is_not_given_is_that_of_the_front_template(tmp_path: Path) -> None:
    pose_folder(tmp_path).mkdir()
    (pose_folder(tmp_path) / "Short.json").write_bytes(a_file())
    assert load_pose(tmp_path, "Short") == replace(TEMPLATES["front"], yaw=3)
