"""Importing NeRSemble and EG3D/PanoHead exports: real layouts in miniature, and the geometry of what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras import (
    FOCAL,
    eg3d_camera,
    orbit_camera,
    project,
    split_label,
    validate_labels,
    world_to_camera,
)
from diffportrait3d.heads import render
from training import import_data
from training.check_data import problems
from training.data import DataError, MultiViewDataset, ViewGroups
from training.render import FIRST_CONDITION
from training.sources import eg3d, nersemble
from training.sources.alignment import FIVE_POINTS, Camera, Similarity, eg3d_crop, head_similarity, warp
from training.sources.colour import apply_affine, apply_polynomial
from training.sources.conditions import RenderedConditions, _scene
from training.sources.groups import SkippedGroup, Splits
from training.sources.landmarks import read_points, sequence_points

SERIALS = ["222200036", "222200037", "222200038", "222200039", "222200040"]
YAWS = [-40.0, -15.0, 5.0, 20.0, 45.0]
INTRINSICS = [[8200.0, 0, 1090.0], [0, 8190.0, 1610.0], [0, 0, 1]]  # for 2200 x 3208
SIZES = {1: (275, 401), 2: (276, 402)}  # an eighth; videos need even sides
SIGMA = 3.0  # of a point's blob, pixels of the source
POINTS = torch.tensor(  # known points of the EG3D world, far apart in every picture
    [[-0.17, 0.16, 0.1], [0.17, 0.17, 0.05], [-0.16, -0.17, 0.15], [0.17, -0.16, 0.2]], dtype=torch.float64
)
CONDITIONS = RenderedConditions(people=1)


def rotation(seed: int, degrees: float | None = None) -> torch.Tensor:
    axis = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, y, z = axis / axis.norm() * np.radians(degrees if degrees is not None else 140.0)
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


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


def blobs(places: np.ndarray, size: tuple[int, int], tint=(1.0, 0.87, 0.73)) -> np.ndarray:
    """uint8 [H, W, 3]: soft points on black."""
    x, y = np.arange(size[0]), np.arange(size[1])
    bump = [(np.exp(-((y - py) ** 2) / (2 * SIGMA**2)), np.exp(-((x - px) ** 2) / (2 * SIGMA**2))) for px, py in places]
    value = sum(np.outer(*pair) for pair in bump)
    return (230 * value[..., None] * np.array(tint)).round().astype(np.uint8)


def centre_of_blob(picture: np.ndarray, place: np.ndarray, radius: float) -> np.ndarray:
    """Centre of a blob near `place` (x, y; first pixel's centre at 0.5): the fixed point of the mean under a smooth
    window, which no pixel enters or leaves by a jump."""
    y, x = np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]] + 0.5
    value = picture.astype(float).sum(-1)
    for _ in range(20):
        window = np.clip(1 - ((x - place[0]) ** 2 + (y - place[1]) ** 2) / radius**2, 0, None) ** 2
        weight = (value - value.min()) * window
        place = np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()
    return place


def write_five(path: Path, places: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{x:.9f} {y:.9f}\n" for x, y in places))


def write_video(path: Path, pictures: list[np.ndarray]) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=24, options={"qp": "0", "g": "3", "bf": "1"})
        stream.width, stream.height, stream.pix_fmt = pictures[0].shape[1], pictures[0].shape[0], "rgb24"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def write_nersemble(root: Path, version: int, people=("018", "030", "101"), frames: int = 2) -> Path:
    """The real layout of a version, and five points of every picture below root/../points."""
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
                pictures = [base + np.uint8(10 * k) for k in range(frames)]
                _write_pictures(root / person, version, sequence, serial, pictures)
                for frame in range(frames):
                    name = f"{person}/{sequence}/frame_{frame:05d}/cam_{serial}.txt"
                    write_five(root.parent / "points" / name, pixels_of(FIVE_POINTS, pose, size))
    return root


def _write_pictures(folder: Path, version: int, sequence: str, serial: str, pictures: list[np.ndarray]) -> None:
    if version == 2:
        write_video(folder / "sequences" / sequence / "images" / f"cam_{serial}.mp4", pictures)
        return
    for frame, picture in enumerate(pictures):
        path = folder / "sequences" / sequence / f"frame_{frame:05d}" / "images-2x-73fps" / f"cam_{serial}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
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
    return nersemble.NeRSemble(root, Splits(0, 0, split_file), nersemble.Options(**values), landmarks)


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
            found = centre_of_blob(view.picture, place, radius={256: 12, 64: 5}[resolution])
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


def test_a_crop_is_what_the_renderer_draws_at_the_label():
    """A head drawn by a camera that looks past it, cropped, against the same head drawn at the exported label."""
    scene = _scene(FIRST_CONDITION["train"])
    label = orbit_camera(20.0, 5.0, roll=4.0, radius=2.6, focal=3.2)
    label[:16] = (split_label(label)[0].double() @ _homogeneous(rotation(3, 2.0))).flatten().float()
    source = (render(scene, label, 256, 1).image.permute(1, 2, 0) * 255).round().byte().numpy()
    camera = Camera(world_to_camera(label).double(), split_label(label)[1].double())
    crop = eg3d_crop(camera, Similarity(torch.tensor(1.0), torch.eye(3).double(), torch.zeros(3).double()))
    cropped, inside = warp(source, crop.homography, 96)
    drawn = (render(scene, crop.label, 96, 2).image.permute(1, 2, 0) * 255).numpy()
    error = ((cropped - drawn) / 255) ** 2
    assert inside == 1.0 and -10 * np.log10(error.mean()) > 30


def _homogeneous(turn: torch.Tensor) -> torch.Tensor:
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = turn
    return out


def test_import_writes_a_data_set_that_training_reads(rigs, split_file, tmp_path, capsys):
    out = tmp_path / "set"
    command = [*_command(rigs[1], split_file, out), "--landmarks", str(rigs[1].parent / "points")]
    assert import_data.main(command) == 0
    dataset = MultiViewDataset(out, "train")
    assert len(dataset) == 8 and dataset.ids[0].startswith("nersemble-018-")
    assert dataset.images.shape == dataset.conditions.shape == (8, 3, 32, 32)
    next(ViewGroups(dataset, 2, views=3))
    assert list(problems(out)) == []
    _, subjects = import_data_manifest(out)
    assert {s["split"]: s["person"] for s in subjects} == {k: v[0] for k, v in SPLIT.items()}
    assert len({s["id"] for s in subjects}) == 4
    assert import_data.main(command) == 0  # again: nothing left to do
    assert "4 of 4 groups are there already" in capsys.readouterr().err


def _command(root: Path, split_file: Path, out: Path) -> list[str]:
    groups = ["--train-groups", "2", "--val-groups", "1", "--test-groups", "1", "--views", "4"]
    rest = ["--resolution", "32", "--split-file", str(split_file), "--condition-people", "1"]
    return ["nersemble", "--source", str(root), "--out", str(out), *groups, *rest]


def import_data_manifest(out: Path):
    header, *subjects = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return header, subjects


def test_without_five_points_the_error_says_how_to_get_them(rigs, split_file, tmp_path, capsys):
    out, pictures = tmp_path / "set", tmp_path / "pictures"
    command = _command(rigs[2], split_file, out)
    with pytest.raises(SystemExit):
        import_data.main(command)
    assert "--extract" in capsys.readouterr().err
    assert import_data.main([*command, "--extract", str(pictures)]) == 0
    written = sorted(pictures.rglob("*.png"))
    assert len(written) == 16 and Image.open(written[0]).size == SIZES[2]
    poses = rig_poses()
    for path in written:  # any detector: here one that knows
        write_five(path.with_suffix(".txt"), pixels_of(FIVE_POINTS, poses[path.stem[4:]], SIZES[2]))
    assert import_data.main([*command, "--landmarks", str(pictures)]) == 0
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
    assert len(import_data_manifest(tmp_path / "set")[1]) == 1
    assert "3 of 4 groups skipped" in capsys.readouterr().err


def test_videos_give_the_frame_that_was_asked_for(rigs):
    person = nersemble.find_participants(rigs[2])[0]
    name = "EMO-1-shout+laugh"
    assert person.frames(name) == [0, 1] and person.sequences() == [name, "SEN-01-cramp_small_danger"]
    dark, bright = (person.picture(name, frame, SERIALS[0]).astype(int) for frame in (0, 1))
    assert np.array_equal(bright, dark + 10)


def test_frames_of_a_longer_video(tmp_path):
    pictures = [np.full((32, 48, 3), 20 * k, np.uint8) for k in range(10)]
    write_video(tmp_path / "v.mp4", pictures)
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


def test_similarity_of_a_turned_scaled_and_moved_face():
    points = 0.37 * FIVE_POINTS @ rotation(5).T + torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    np.testing.assert_allclose(head_similarity(points)(points), FIVE_POINTS, atol=1e-9)


def test_five_points_are_where_eg3ds_crops_have_them():
    """EG3D's frontal camera sees the standard face as EG3D crops it: 700 of 1024 px, focal length 2985.29 px."""
    frontal = eg3d_camera(0.0, 0.0)
    x, y, _ = project(FIVE_POINTS.float(), frontal, 700).T
    unit = 2985.29 / 10  # pixels at the distance of the crop's camera
    depth = 10 / (10 - torch.tensor([0.13377953, 0.13179526, 0.55244243, 0.22405732, 0.22235769]))
    expected = unit * depth * torch.tensor([-0.31148657, 0.30979887, 0.0032535, -0.25216928, 0.2484662])
    assert (x - 350 - expected).abs().max() < 0.5
    expected = -unit * depth * torch.tensor([0.29036078, 0.28972036, -0.04617932, -0.38133916, -0.38128236])
    assert (y - 350 - expected).abs().max() < 8  # the pivot lies 0.006 below the crop's middle


def test_points_with_a_mistake_are_named(tmp_path):
    (tmp_path / "four.txt").write_text("1 2\n" * 4)
    with pytest.raises(DataError, match="four.txt: expected five points"):
        read_points(tmp_path / "four.txt")
    (tmp_path / "words.txt").write_text("left eye\n" * 5)
    with pytest.raises(DataError, match="words.txt"):
        read_points(tmp_path / "words.txt")


def test_colour_correction_of_both_versions():
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    matrix = np.array([[0.9, 0.05, 0.0, 0.02], [0.0, 0.8, 0.1, -0.01], [0.1, 0.0, 0.7, 0.0]])
    expected = np.stack([(picture[..., :] / 255 * matrix[:3, c]).sum(-1) + matrix[c, 3] for c in range(3)], -1)
    assert np.abs(apply_affine(picture, matrix) / 255 - expected.clip(0, 1)).max() <= 0.5 / 255 + 1e-9
    seven = np.zeros((3, 7))
    seven[:, :3], seven[0, 3], seven[2, 6] = np.eye(3), 0.2, 0.01  # r + 0.2 r g, g, b + 0.01
    linear = np.where(picture / 255 <= 0.04045, picture / 255 / 12.92, ((picture / 255 + 0.055) / 1.055) ** 2.4)
    wanted = linear + [0, 0, 0.01]
    wanted[..., 0] += 0.2 * linear[..., 0] * linear[..., 1]
    wanted = np.where(wanted <= 0.0031308, wanted * 12.92, 1.055 * wanted.clip(0, 1) ** (1 / 2.4) - 0.055)
    assert np.abs(apply_polynomial(picture, seven) / 255 - wanted).max() <= 0.5 / 255 + 1e-9
    assert np.array_equal(apply_polynomial(picture, np.eye(3)), picture)
    with pytest.raises(DataError, match="T one of"):
        apply_polynomial(picture, np.zeros((3, 6)))


def test_colour_correction_reaches_the_pictures(rigs, split_file, tmp_path):
    root = write_nersemble(tmp_path / "data", 1, people=("018",), frames=1)
    for path in root.rglob("color_correction/*.npy"):
        np.save(path, np.diag([0.5, 0.5, 0.5, 1.0]))
    group = (source := reader(root, split_file, groups={"train": 1})).groups()[0]
    raw = reader(root, split_file, groups={"train": 1}, colour=False).views(group, 32)[0].picture
    assert np.abs(source.views(group, 32)[0].picture - raw / 2.0).max() <= 0.5
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


def test_people_keep_their_split_by_name():
    splits = Splits(0.1, 0.3)
    names = [f"nersemble-{n:03d}" for n in range(1000)]
    found = [splits.of(name) for name in names]
    assert abs(found.count("test") - 300) < 50 and abs(found.count("val") - 100) < 35
    assert found == [Splits(0.1, 0.3).of(name) for name in names]
    with pytest.raises(DataError, match="at most 1"):
        Splits(0.6, 0.6)


def test_mistakes_of_layout_are_named(tmp_path, split_file, rigs):
    with pytest.raises(DataError, match="No participant of NeRSemble"):
        reader(tmp_path, split_file).groups()
    with pytest.raises(DataError, match="is in split 'test'.*--test-groups 0"):
        reader(rigs[1], _write_json(tmp_path / "s.json", {"train": ["nersemble-018"]}), groups={"test": 1}).groups()
    with pytest.raises(DataError, match="in both 'train' and 'test'"):
        Splits(0, 0, _write_json(tmp_path / "t.json", {"train": ["a"], "test": ["a"]}))
    root = write_nersemble(tmp_path / "data", 1, people=("018",), frames=1)
    params = json.loads((root / "018" / "camera_params.json").read_text())
    params["world_2_cam"][SERIALS[1]][0] = [2.0, 0, 0, 0]
    _write_json(root / "018" / "camera_params.json", params)
    with pytest.raises(DataError, match=f"camera {SERIALS[1]} is not a rotation"):
        reader(root, split_file, groups={"train": 1}).groups()


def _write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


# Exports of EG3D and PanoHead


def write_export(root: Path, people: int = 3, views: int = 3, shift=(0.0, 0.0, 0.0), size: int = 40) -> Path:
    """seedNNNN/VV.png and dataset.json; blobs at POINTS, of a head that lies `shift` beside where EG3D's lies."""
    labels, offset = [], torch.tensor(shift)
    for person in range(people):
        for view, yaw in enumerate(np.linspace(-30, 30, views)):
            label = orbit_camera(float(yaw), 3.0 * person, pivot=shift)
            name = f"seed{person:04d}/{view:02d}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            places = project(POINTS.float() + offset, label, size)[:, :2].numpy() - 0.5
            Image.fromarray(blobs(places, (size, size), (1.0, 0.67 + 0.1 * person, 0.53))).save(root / name)
            labels.append([name, label.tolist()])
    _write_json(root / "dataset.json", {"labels": labels})
    return root


def export(root: Path, name: str = "panohead", landmarks: Path | None = None, **changes) -> eg3d.Export:
    return eg3d.Export(name, root, Splits(0.0, 0.4), eg3d.Options(**changes), landmarks)


def test_an_export_keeps_pictures_and_labels(tmp_path):
    root = write_export(tmp_path / "data")
    out = tmp_path / "set"
    command = ["panohead", "--source", str(root), "--out", str(out), "--resolution", "40", "--condition-people", "1"]
    assert import_data.main([*command, "--val-share", "0", "--test-share", "0"]) == 0
    header, subjects = import_data_manifest(out)
    assert header["sources"] == ["panohead"] and [s["id"] for s in subjects] == [
        f"panohead-seed000{k}" for k in range(3)
    ]
    labels = dict(json.loads((root / "dataset.json").read_text())["labels"])
    for subject in subjects:
        for view in subject["views"]:
            assert view["label"] == pytest.approx(labels[view["camera"]])
            assert np.array_equal(Image.open(out / view["image"]), Image.open(root / view["camera"]))
    assert list(problems(out)) == [] and len(MultiViewDataset(out, "train")) == 9
    cameras = json.loads((out / "cameras.json").read_text())["labels"]
    assert [name for name, _ in cameras] == [v["image"] for s in subjects for v in s["views"]]


def test_an_export_of_another_world_is_aligned_by_five_points(tmp_path):
    """PanoHead's head does not lie where EG3D's does; five points move its cameras and crop its pictures again."""
    root = write_export(tmp_path / "data", people=1, size=256, shift=(0.02, -0.05, -0.1))
    for name, label in json.loads((root / "dataset.json").read_text())["labels"][:2]:  # the third has no face
        points = FIVE_POINTS.float() + torch.tensor([0.02, -0.05, -0.1])
        places = project(points, torch.tensor(label), 256)[:, :2].numpy() - 0.5
        write_five((tmp_path / "points" / name).with_suffix(".txt"), places)
    source = export(root, landmarks=tmp_path / "points")
    for view in source.views(source.groups()[0], 256):
        for place in project(POINTS.float(), view.label, 256)[:, :2].numpy():
            assert np.abs(centre_of_blob(view.picture, place, radius=12) - place).max() < 1e-2


def test_renders_given_for_the_conditions(tmp_path, capsys):
    root, out, renders = write_export(tmp_path / "data", people=2), tmp_path / "set", tmp_path / "eg3d"
    renders.mkdir()
    command = ["eg3d", "--source", str(root), "--out", str(out), "--resolution", "40", "--conditions", str(renders)]
    with pytest.raises(SystemExit):
        import_data.main(command)
    assert "Render every camera of 'cameras.json'" in capsys.readouterr().err
    assert not (out / "manifest.jsonl").exists()
    cameras = json.loads((out / "cameras.json").read_text())["labels"]
    for k, (name, _) in enumerate(cameras):
        (renders / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(renders / name)
    _write_json(renders / "dataset.json", {"labels": cameras})
    _write_json(renders / "people.json", {cameras[0][0]: "eg3d-seed0009"})
    assert import_data.main(command) == 0 and list(problems(out)) == []
    _, subjects = import_data_manifest(out)
    assert subjects[0]["views"][0]["condition_subject"] == "eg3d-seed0009"
    assert Image.open(out / subjects[0]["views"][0]["condition"]).size == (40, 40)
    cameras[1][1][3] += 0.1
    _write_json(renders / "dataset.json", {"labels": cameras})
    record = json.loads((out / subjects[0]["views"][0]["image"]).with_name("subject.json").read_text())
    from training.sources.conditions import GivenConditions

    with pytest.raises(DataError, match="rendered at another camera"):
        GivenConditions(renders).picture(record, 1, 40)


def test_two_sources_share_a_data_set_and_other_settings_do_not(tmp_path):
    out = tmp_path / "set"
    for name in ("panohead", "eg3d"):
        root = write_export(tmp_path / name, people=1)
        import_data.import_source(export(root, name), out, 32, CONDITIONS)
    header, subjects = import_data_manifest(out)
    assert header["sources"] == ["eg3d", "panohead"] and {s["provider"] for s in subjects} == {"eg3d", "panohead"}
    with pytest.raises(DataError, match="other settings \\(views\\)"):
        import_data.import_source(export(root, "eg3d", views=2), out, 32, CONDITIONS)
    with pytest.raises(DataError, match="pictures of 32 px"):
        import_data.import_source(export(root, "other"), out, 40, CONDITIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(DataError, match="choose a new folder"):
        import_data.import_source(export(root), tmp_path / "mine", 32, CONDITIONS)


def test_rendered_heads_join_an_import(dataset, tmp_path):
    out = tmp_path / "set"
    command = ["heads", "--source", str(dataset), "--out", str(out), "--resolution", "32", "--condition-people", "1"]
    assert import_data.main(command) == 0
    import_data.import_source(export(write_export(tmp_path / "data", people=1)), out, 32, CONDITIONS)
    header, subjects = import_data_manifest(out)
    assert header["sources"] == ["heads", "panohead"] and list(problems(out)) == []
    assert [s["split"] for s in subjects[:4]] == ["train", "train", "train", "val"]
    there = import_data_manifest(dataset)[1]
    assert subjects[3]["views"][8]["label"] == pytest.approx(there[3]["views"][8]["label"])


class Interrupted(eg3d.Export):
    """Ctrl-C while the second person is read."""

    def views(self, group, resolution):
        if group.id.endswith("1"):
            raise KeyboardInterrupt
        return super().views(group, resolution)


def test_an_interrupted_import_continues(tmp_path):
    root, out = write_export(tmp_path / "data"), tmp_path / "set"
    arguments = ("panohead", root, Splits(0, 0), eg3d.Options())
    with pytest.raises(KeyboardInterrupt):
        import_data.import_source(Interrupted(*arguments), out, 32, CONDITIONS)
    first = sorted(out.rglob("subject.json"))
    assert len(first) == 1 and not (out / "manifest.jsonl").exists()
    kept = {path: path.stat().st_mtime_ns for path in first[0].parent.glob("*.png")}
    import_data.import_source(eg3d.Export(*arguments), out, 32, CONDITIONS)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert list(problems(out)) == [] and not list(out.rglob("*.tmp"))


def test_mistakes_in_an_export_are_named(tmp_path):
    root = write_export(tmp_path / "data")
    labels = json.loads((root / "dataset.json").read_text())["labels"]
    (root / "seed0000" / "01.png").unlink()
    labels[3][1] = labels[3][1][:24]
    labels[6][1][16] = 2185.0
    _write_json(root / "dataset.json", {"labels": labels})
    source = export(root)
    for group, message in zip(source.groups(), ["cannot be read", "24", "in pixels"], strict=True):
        with pytest.raises(SkippedGroup, match=message):
            source.views(group, 32)
    assert [len(g.place["files"]) for g in export(root, views=2).groups()] == [2, 2, 2]
    singles = [[f"00000/img0000000{k}.png", labels[0][1]] for k in range(3)]
    _write_json(root / "dataset.json", {"labels": singles})
    with pytest.raises(DataError, match="one picture a person"):
        export(root).groups()
    with pytest.raises(DataError, match="has a single view"):
        export(root, identity="(.+)").groups()
    _write_json(root / "dataset.json", {"labels": [1, 2]})
    with pytest.raises(DataError, match='has no "labels"'):
        export(root).groups()
    (root / "dataset.json").unlink()
    with pytest.raises(DataError, match="There is no .*dataset.json"):
        export(root).groups()
