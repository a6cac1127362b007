"""Importing NeRSemble: the real layouts of both versions in miniature, and the geometry of what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.labels import FOCAL, orbit_camera, split_label, validate_labels
from diffportrait3d.cameras.projection import project
from diffportrait3d.portraits.face import FIVE_POINTS
from training import import_data
from training.check_data import problems
from training.dataset.images import DataError, MultiViewDataset, ViewGroups, read_manifest
from training.sources import nersemble
from training.sources.landmarks import sequence_points
from training.sources.reader import SkippedGroup, Splits

from .conftest import CONDITIONS, POINTS, blobs, centre_of_blob, rotation, write_five, write_json

SERIALS = ["222200036", "222200037", "222200038", "222200039", "222200040"]
YAWS = [-40.0, -15.0, 5.0, 20.0, 45.0]
INTRINSICS = [[8200.0, 0, 1090.0], [0, 8190.0, 1610.0], [0, 0, 1]]  # for 2200 x 3208
SIZES = {1: (275, 401), 2: (276, 402)}  # an eighth; videos need even sides

# The rig's world is EG3D's in metres, turned and moved: rig = RIG_TURN @ eg3d / 2.7 + RIG_SHIFT.
RIG_TURN = rotation(7)
RIG_SHIFT = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def to_rig(points: torch.Tensor) -> torch.Tensor:
    return points / 2.7 @ RIG_TURN.T + RIG_SHIFT


def rig_poses() -> dict[str, torch.Tensor]:
    """World-to-camera in the rig's world: at different distances, and not looking exactly at the head."""
    poses = {}
    for number, (serial, yaw) in enumerate(zip(SERIALS, YAWS, strict=True)):
        label = orbit_camera(yaw, 4.0 * number - 8.0, roll=3.0 * number - 5.0, radius=2.5 + 0.1 * number).double()
        pose, _ = split_label(label)
        turn, centre = RIG_TURN @ pose[:3, :3] @ rotation(number, 1.5), to_rig(pose[None, :3, 3])[0]
        poses[serial] = torch.eye(4, dtype=torch.float64)
        poses[serial][:3, :3], poses[serial][:3, 3] = turn.T, -turn.T @ centre
    return poses


def pixels_of(points: torch.Tensor, pose: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Where the rig's camera sees EG3D-world points [N, 3]: pixels [N, 2], 0 at the first pixel's centre."""
    seen = to_rig(points) @ pose[:3, :3].T + pose[:3, 3]
    flat = seen @ torch.tensor(INTRINSICS, dtype=torch.float64).T
    full = (flat[:, :2] / flat[:, 2:]).numpy()  # OpenCV pixels of the calibrated size
    return (full + 0.5) * np.array(size) / nersemble.CALIBRATED_SIZE - 0.5


def write_video(path: Path, images: list[np.ndarray]) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=24, options={"qp": "0", "g": "3", "bf": "1"})
        stream.width, stream.height, stream.pix_fmt = images[0].shape[1], images[0].shape[0], "rgb24"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def write_nersemble(root: Path, version: int, people=("018", "030", "101"), frames: int = 2) -> Path:
    """The real layout of a version, and five points of every image below root/../points."""
    poses, size = rig_poses(), SIZES[version]
    for number, person in enumerate(people):
        calibration = root / person / ("calibration" if version == 2 else "")
        calibration.mkdir(parents=True)
        params = {"world_2_cam": {s: p.tolist() for s, p in poses.items()}, "intrinsics": INTRINSICS}
        (calibration / "camera_params.json").write_text(json.dumps(params))
        if version == 2:
            identity = np.eye(3, 4).tolist()
            (calibration / "color_calibration.json").write_text(json.dumps({s: identity for s in SERIALS}))
            (root / person / "sequences" / "BACKGROUND").mkdir(parents=True)
        for sequence in ("EMO-1-shout+laugh", "SEN-01-cramp_small_danger"):
            tint = np.array([1.0, 0.87 - 0.1 * number, 0.73])
            for serial, pose in poses.items():
                base = blobs(pixels_of(POINTS, pose, size), size, tint)
                images = [base + np.uint8(10 * k) for k in range(frames)]
                _write_images(root / person, version, sequence, serial, images)
                for frame in range(frames):
                    name = f"{person}/{sequence}/frame_{frame:05d}/cam_{serial}.txt"
                    write_five(root.parent / "points" / name, pixels_of(FIVE_POINTS, pose, size))
    return root


def _write_images(folder: Path, version: int, sequence: str, serial: str, images: list[np.ndarray]) -> None:
    if version == 2:
        write_video(folder / "sequences" / sequence / "images" / f"cam_{serial}.mp4", images)
        return
    for frame, image in enumerate(images):
        path = folder / "sequences" / sequence / f"frame_{frame:05d}" / "images-2x-73fps" / f"cam_{serial}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    matrix = folder / "annotations" / sequence / "color_correction" / f"{serial}.npy"
    matrix.parent.mkdir(parents=True, exist_ok=True)
    np.save(matrix, np.eye(3, 4))


@pytest.fixture(scope="module")
def rigs(tmp_path_factory) -> dict[int, Path]:
    return {v: write_nersemble(tmp_path_factory.mktemp(f"v{v}") / "data", v) for v in (1, 2)}


SPLIT = {"train": ["nersemble-018"], "val": ["nersemble-030"], "test": ["nersemble-101"]}


@pytest.fixture(scope="module")
def split_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("split") / "split.json"
    path.write_text(json.dumps(SPLIT))
    return path


def reader(root: Path, split_file: Path, **changes) -> nersemble.NeRSemble:
    values = {"groups": {"train": 2, "val": 1, "test": 1}, "views": 4, **changes}
    landmarks = values.pop("landmarks", root.parent / "points")
    return nersemble.NeRSemble("nersemble", root, Splits(0, 0, split_file), nersemble.Options(**values), landmarks)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("resolution", [256, 64])
def test_a_known_point_is_where_the_label_says(rigs, split_file, version, resolution):
    source = reader(rigs[version], split_file)
    views = source.views(source.groups()[0], resolution)
    assert len(views) == 4
    for view in views:
        validate_labels(view.label)
        assert view.label[[16, 20]].tolist() == pytest.approx([FOCAL, FOCAL])
        expected = project(POINTS.float(), view.label, resolution)[:, :2].numpy()
        for place in expected:
            found = centre_of_blob(view.image, place, radius={256: 12, 64: 5}[resolution])
            assert np.abs(found - place).max() < 1e-2


def test_the_label_is_the_cameras_own_place(rigs, split_file):
    """Centre exact, axis through the pivot, roll kept: the crop turns the camera, it does not move it."""
    source = reader(rigs[1], split_file)
    poses = rig_poses()
    for view in source.views(source.groups()[0], 32):
        pose, _ = split_label(view.label.double())
        turn, shift = poses[view.name][:3, :3], poses[view.name][:3, 3]
        np.testing.assert_allclose(to_rig(pose[None, :3, 3])[0], -turn.T @ shift, atol=1e-6)
        x, y, _ = project(torch.tensor([[0.0, 0.0, 0.2]]), view.label, 1)[0].tolist()
        assert (x, y) == pytest.approx((0.5, 0.5), abs=1e-6)
        between = RIG_TURN.T @ turn.T @ torch.eye(3, dtype=torch.float64)  # the camera's axes in EG3D's world
        assert torch.rad2deg((between * pose[:3, :3]).sum(0).clamp(-1, 1).acos()).max() < 3.0


def test_import_writes_a_data_set_that_training_reads(rigs, split_file, tmp_path, capsys):
    out = tmp_path / "set"
    command = [*_command(rigs[1], split_file, out), "--landmarks", str(rigs[1].parent / "points")]
    assert import_data.main(command) == 0
    dataset = MultiViewDataset(out, "train")
    assert len(dataset) == 8 and dataset.ids[0].startswith("nersemble-018-")
    assert dataset.images.shape == dataset.conditions.shape == (8, 3, 32, 32)
    next(ViewGroups(dataset, 2, views=3))
    assert list(problems(out)) == []
    _, subjects = read_manifest(out)
    assert {s["split"]: s["person"] for s in subjects} == {k: v[0] for k, v in SPLIT.items()}
    assert len({s["id"] for s in subjects}) == 4
    assert import_data.main(command) == 0  # again: nothing left to do
    assert "4 of 4 groups are there already" in capsys.readouterr().err


def _command(root: Path, split_file: Path, out: Path) -> list[str]:
    groups = ["--train-groups", "2", "--val-groups", "1", "--test-groups", "1", "--views", "4"]
    rest = ["--resolution", "32", "--split-file", str(split_file), "--condition-people", "1"]
    return ["nersemble", "--source", str(root), "--out", str(out), *groups, *rest]


def test_without_five_points_the_error_says_how_to_get_them(rigs, split_file, tmp_path, capsys):
    out, images = tmp_path / "set", tmp_path / "images"
    command = _command(rigs[2], split_file, out)
    with pytest.raises(SystemExit):
        import_data.main(command)
    assert "--extract" in capsys.readouterr().err
    assert import_data.main([*command, "--extract", str(images)]) == 0
    written = sorted(images.rglob("*.png"))
    assert len(written) == 16 and Image.open(written[0]).size == SIZES[2]
    poses = rig_poses()
    for path in written:  # any detector: here one that knows
        write_five(path.with_suffix(".txt"), pixels_of(FIVE_POINTS, poses[path.stem[4:]], SIZES[2]))
    assert import_data.main([*command, "--landmarks", str(images)]) == 0
    assert list(problems(out)) == []


def test_time_steps_without_points_are_skipped_and_named(rigs, split_file, tmp_path, capsys):
    source = reader(rigs[1], split_file, landmarks=tmp_path)
    with pytest.raises(DataError, match="Nothing could be imported.*no five points for frame"):
        import_data.import_source(source, tmp_path / "set", 32, CONDITIONS)
    groups = source.groups()
    place = groups[0].place
    name = f"{place['participant']}/{place['sequence']}/frame_{place['frame']:05d}"
    write = {serial: pixels_of(FIVE_POINTS, pose, SIZES[1]) for serial, pose in list(rig_poses().items())[:2]}
    for serial, places in write.items():
        write_five(tmp_path / name / f"cam_{serial}.txt", places)
    import_data.import_source(source, tmp_path / "set", 32, CONDITIONS)
    assert len(read_manifest(tmp_path / "set")[1]) == 1
    assert "3 of 4 groups skipped" in capsys.readouterr().err


def test_videos_give_the_frame_that_was_asked_for(rigs):
    person = nersemble.NeRSemble("nersemble", rigs[2], Splits(0, 0), nersemble.Options({})).participants()[0]
    name = "EMO-1-shout+laugh"
    assert person.frames(name) == [0, 1] and person.sequences() == [name, "SEN-01-cramp_small_danger"]
    dark, bright = (person.image(name, frame, SERIALS[0]).as_bytes().astype(int) for frame in (0, 1))
    assert np.array_equal(bright, dark + 10)


def test_frames_of_a_longer_video(tmp_path):
    images = [np.full((32, 48, 3), 20 * k, np.uint8) for k in range(10)]
    write_video(tmp_path / "v.mp4", images)
    assert nersemble.frame_count(tmp_path / "v.mp4") == 10
    for index in (0, 4, 9):
        assert np.abs(nersemble.read_frame(tmp_path / "v.mp4", index).astype(int) - 20 * index).max() <= 1
    with pytest.raises(SkippedGroup, match="no frame 10"):
        nersemble.read_frame(tmp_path / "v.mp4", 10)


def test_a_sequences_file_gives_points_by_camera_or_in_space(rigs, split_file, tmp_path):
    source = reader(rigs[1], split_file)
    group = source.groups()[0]
    wanted = source.views(group, 32)
    place = group.place
    by_camera = {s: pixels_of(FIVE_POINTS, p, SIZES[1]).tolist() for s, p in rig_poses().items()}
    for content in (
        {"frames": {str(place["frame"]): by_camera}},
        {"world": {f"{place['frame']:05d}": to_rig(FIVE_POINTS).tolist()}},
    ):
        path = tmp_path / f"{next(iter(content))}" / place["participant"] / f"{place['sequence']}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
        given = reader(rigs[1], split_file, landmarks=path.parent.parent).views(group, 32)
        for a, b in zip(wanted, given, strict=True):
            np.testing.assert_allclose(a.label, b.label, atol=1e-5)
    with pytest.raises(SkippedGroup, match="has no frame 99"):
        sequence_points(path, 99)


def test_a_wrong_detection_is_dropped_and_a_wrong_order_refused(rigs, split_file, tmp_path):
    poses, source = rig_poses(), reader(rigs[1], split_file, landmarks=tmp_path)
    place = source.groups()[0].place
    folder = tmp_path / place["participant"] / place["sequence"] / f"frame_{place['frame']:05d}"
    for number, (serial, pose) in enumerate(poses.items()):
        write_five(folder / f"cam_{serial}.txt", pixels_of(FIVE_POINTS, pose, SIZES[1]) + (60 if number == 2 else 0))
    exact = reader(rigs[1], split_file).views(source.groups()[0], 32)
    for a, b in zip(exact, source.views(source.groups()[0], 32), strict=True):
        np.testing.assert_allclose(a.label, b.label, atol=1e-5)
    for serial, pose in poses.items():
        write_five(folder / f"cam_{serial}.txt", pixels_of(FIVE_POINTS, pose, SIZES[1])[[1, 0, 2, 4, 3]])
    with pytest.raises(SkippedGroup, match="order must be eye left"):
        source.views(source.groups()[0], 32)


def test_colour_correction_reaches_the_images(rigs, split_file, tmp_path):
    root = write_nersemble(tmp_path / "data", 1, people=("018",), frames=1)
    for path in root.rglob("color_correction/*.npy"):
        np.save(path, np.diag([0.5, 0.5, 0.5, 1.0]))
    group = (source := reader(root, split_file, groups={"train": 1})).groups()[0]
    raw = reader(root, split_file, groups={"train": 1}, colour=False).views(group, 32)[0].image
    assert np.abs(source.views(group, 32)[0].image - raw / 2.0).max() <= 0.5
    next(root.rglob(f"{group.place['sequence']}/color_correction/{group.place['cameras'][0]}.npy")).unlink()
    with pytest.raises(SkippedGroup, match="--no-colour-correction"):
        source.views(group, 32)


def test_the_plan_takes_turns_and_repeats(rigs, split_file):
    source = reader(rigs[1], split_file, groups={"train": 4})
    groups = source.groups()
    assert groups == source.groups() and len({g.id for g in groups}) == 4
    assert {g.place["sequence"] for g in groups[:2]} == {"EMO-1-shout+laugh", "SEN-01-cramp_small_danger"}
    assert groups != reader(rigs[1], split_file, groups={"train": 4}, seed=1).groups()
    assert all(len(set(g.place["cameras"])) == 4 for g in groups)
    assert len(reader(rigs[1], split_file, groups={"train": 99}).groups()) == 4  # all there is
    assert reader(rigs[1], split_file, sequences=("GLASSES",)).groups() == []


def test_mistakes_of_layout_are_named(tmp_path, split_file, rigs):
    with pytest.raises(DataError, match="No participant of NeRSemble"):
        reader(tmp_path, split_file).groups()
    with pytest.raises(DataError, match="is in split 'test'.*--test-groups 0"):
        reader(rigs[1], write_json(tmp_path / "s.json", {"train": ["nersemble-018"]}), groups={"test": 1}).groups()
    with pytest.raises(DataError, match="in both 'train' and 'test'"):
        Splits(0, 0, write_json(tmp_path / "t.json", {"train": ["a"], "test": ["a"]}))
    root = write_nersemble(tmp_path / "data", 1, people=("018",), frames=1)
    params = json.loads((root / "018" / "camera_params.json").read_text())
    params["world_2_cam"][SERIALS[1]][0] = [2.0, 0, 0, 0]
    write_json(root / "018" / "camera_params.json", params)
    with pytest.raises(DataError, match=f"camera {SERIALS[1]} is not a rotation"):
        reader(root, split_file, groups={"train": 1}).groups()
