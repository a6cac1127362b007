"""nerfstudio's transforms.json and COLMAP's text files as cameras: what we export comes back, and what others write is
read by their conventions."""

from __future__ import annotations

import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.export import export_views
from diffportrait3d.cameras.files import read_labels, read_rows
from diffportrait3d.cameras.labels import join_label, orbit_camera, split_label, trajectory
from diffportrait3d.cameras.projection import project

HEIGHT, WIDTH = 384, 512
SWAP = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 0.0]]  # ns-process-data: z up


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    """12 cameras of four lenses: own fx and fy, a principal point off the middle, rolls, cameras behind the head."""
    path = trajectory("orbit", 9, (-80, 80), (-30, 30), roll=25.0)
    wide = orbit_camera([170.0, -60.0, 5.0], [40.0, -10.0, 80.0], [-70.0, 0.0, 179.0], radius=1.7, focal=1.2)
    wide[:, 16 + 2], wide[:, 16 + 5], wide[:, 16 + 4] = 0.4, 0.55, 1.9
    wide[1, 16] = 0.7
    wide[2, 16 + 4] = 3.3
    return torch.cat([path, wide])


@pytest.fixture
def exported(tmp_path, labels):
    export_views(tmp_path / "set", torch.rand(len(labels), HEIGHT, WIDTH, 3), labels)
    return tmp_path / "set"


def test_our_export_comes_back(exported, labels):
    """To the bit from transforms.json; COLMAP's quaternions round in the seventh digit."""
    assert torch.equal(read_labels(exported / "transforms.json"), labels)
    assert torch.equal(read_labels(exported), labels)
    for path in (exported / "sparse/0", exported / "sparse/0/images.txt"):
        torch.testing.assert_close(read_labels(path), labels, atol=1e-6, rtol=0)
        assert torch.equal(read_labels(path)[:, 16:], labels[:, 16:])
    assert read_rows(exported).names[:2] == ["images/view_000.png", "images/view_001.png"]
    assert read_rows(exported / "sparse/0").names[:2] == ["view_000.png", "view_001.png"]
    (exported / "transforms.json").unlink()
    torch.testing.assert_close(read_labels(exported), labels, atol=1e-6, rtol=0)


def changed(folder, change) -> None:
    content = json.loads((folder / "transforms.json").read_text(encoding="utf-8-sig"))
    change(content)
    (folder / "transforms.json").write_text(json.dumps(content))


def test_order_is_that_of_the_names(exported, labels):
    """As Load Camera Conditions orders the pictures, whatever the order of the file."""
    changed(exported, lambda content: content["frames"].reverse())
    assert torch.equal(read_labels(exported), labels)
    assert read_rows(exported).names[0] == "images/view_011.png"
    path = exported / "sparse/0/images.txt"
    header, *lines = path.read_text().splitlines()
    pairs = list(zip(lines[::2], lines[1::2], strict=True))[::-1]
    path.write_text("\n".join([header, *(line for pair in pairs for line in pair)]))  # and no empty line at its end
    torch.testing.assert_close(read_labels(exported / "sparse/0"), labels, atol=1e-6, rtol=0)


def test_what_was_applied_to_the_poses_is_undone(exported, labels):
    """ns-process-data turns the world and says so: the cameras come back in the world they were made in."""
    turn = np.array([*SWAP, [0, 0, 0, 1.0]])

    def apply(content):
        for frame in content["frames"]:
            pose = turn @ np.array(frame["transform_matrix"])
            pose[:3, 3] *= 0.25
            frame["transform_matrix"] = pose[:3].tolist()  # some writers leave the last row out
        content.update(applied_transform=SWAP, applied_scale=0.25)

    changed(exported, apply)
    torch.testing.assert_close(read_labels(exported), labels, atol=2e-6, rtol=0)
    changed(exported, lambda content: content.update(applied_transform=turn.tolist()))
    torch.testing.assert_close(read_labels(exported), labels, atol=2e-6, rtol=0)


def test_a_frames_own_values_come_first(exported, labels):
    def share(content):
        content.update({key: content["frames"][0].pop(key) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")})

    changed(exported, share)
    assert torch.equal(read_labels(exported), labels)


def test_what_may_be_left_out(tmp_path):
    """Of the files of instant-ngp and of the Blender scenes: angles of view, no middle, no size, no suffix, a BOM."""
    labels = trajectory("arc", 2, focal=1.5)
    export_views(tmp_path / "set", torch.rand(2, 300, 400, 3), labels)
    angle = 2 * math.atan(0.5 / 1.5)
    square_pixels = labels.clone()
    square_pixels[:, 16 + 4] = 1.5 * 400 / 300

    def strip(content):
        for key in ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_model"):
            content.pop(key)
        content["camera_angle_x"] = angle
        for frame in content["frames"]:
            frame["file_path"] = "./" + frame["file_path"].removesuffix(".png")

    changed(tmp_path / "set", strip)
    torch.testing.assert_close(read_labels(tmp_path / "set"), square_pixels, atol=1e-6, rtol=0)
    changed(tmp_path / "set", lambda content: content.update(camera_angle_y=angle))
    path = tmp_path / "set/transforms.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    torch.testing.assert_close(read_labels(path), labels, atol=1e-6, rtol=0)
    shutil.rmtree(tmp_path / "set/images")
    with pytest.raises(ValueError, match=r"frame 0 .*no w and h, and no image .*view_000 to measure"):
        read_labels(path)
    Image.new("RGB", (80, 60)).save(tmp_path / "set/other.png")
    changed(tmp_path / "set", lambda content: [frame.update(file_path="other.png") for frame in content["frames"]])
    torch.testing.assert_close(read_labels(path), labels, atol=1e-6, rtol=0)


def test_points_land_where_colmap_and_nerfstudio_put_them(exported, labels):
    """The labels against the formulas of the two formats, with numbers that are none of ours."""
    (exported / "sparse/0/cameras.txt").write_text("# by hand\n7 SIMPLE_RADIAL 640 480 500 330 250 0.0\n")
    (exported / "sparse/0/images.txt").write_text(
        "3 0.2 -0.4 0.8 0.1 0.3 -0.2 2.5 7 b 1.png\n12.5 33.1 -1 99 102.25 12\n\n1 2 0 0 0 0.5 0 3 7 a.png\n\n"
    )
    first, second = read_labels(exported / "sparse/0").double()
    assert read_rows(exported / "sparse/0").names == ["b 1.png", "a.png"]
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    w, x, y, z = np.array([0.2, -0.4, 0.8, 0.1]) / np.linalg.norm([0.2, -0.4, 0.8, 0.1])
    turn = np.array(
        [  # COLMAP's documentation
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    for label, rotation, move in ((second, turn, [0.3, -0.2, 2.5]), (first, np.eye(3), [0.5, 0, 3])):
        u, v, depth = (points.numpy() @ rotation.T + move).T
        wanted = np.stack([500 * u / depth + 330, 500 * v / depth + 250, depth], 1)
        np.testing.assert_allclose(project(points, label, (480, 640)).numpy(), wanted, atol=1e-3)


def distort(content):
    content.update(camera_model="OPENCV", k1=0.0, k2=0.0, p1=0.0)
    content["frames"][4]["k1"] = -0.03


@pytest.mark.parametrize("form", ["transforms.json", "sparse/0"])
def test_distortion_is_left_out_with_a_warning(exported, labels, caplog, form):
    changed(exported, distort)
    path = exported / "sparse/0/cameras.txt"
    rows = path.read_text().splitlines()
    rows[1] = rows[1].replace("PINHOLE", "OPENCV") + " -0.03 0 0 0"
    path.write_text("\n".join(rows))
    with caplog.at_level(logging.WARNING):
        found = read_labels(exported / form)
    torch.testing.assert_close(found, labels, atol=1e-6, rtol=0)
    assert "distortion is left out" in caplog.text and "-0.03" in caplog.text
    assert "view_00" in read_rows(exported / form).distortion


def frames(**values):
    return lambda content: content["frames"][5].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(frames=[]), "'frames' must be a list of at least one"),
        (frames(file_path=None), "frame 5 has no file_path"),
        (frames(transform_matrix=None), r"frame 5 .*view_005.*transform_matrix is null"),
        (frames(transform_matrix=[[1, 2], [3]]), "transform_matrix is .* not a matrix"),
        (frames(transform_matrix=[[1.0] * 4] * 2), r"transform_matrix has shape \[2, 4\]"),
        (frames(transform_matrix=[["a"] * 4] * 4), "a value of transform_matrix is 'a', not a number"),
        (frames(transform_matrix=[[2.0 * (i == j) for j in range(4)] for i in range(4)]), "view_005.* not orthonormal"),
        (frames(fl_x="long"), "fl_x is 'long', not a number"),
        (frames(w=0), "w 0.0 and h 384.0 are no size"),
        (frames(fl_x=None, fl_y=None), "neither fl_x nor camera_angle_x"),
        (frames(fl_x=None, camera_angle_x=7), "camera_angle_x is 7.0, not between 0 and pi"),
        (frames(camera_model="OPENCV_FISHEYE"), "'OPENCV_FISHEYE' is no pinhole camera; undistort"),
        (lambda content: content.update(is_fisheye=True), "a fisheye lens is no pinhole camera"),
        (lambda content: content.update(applied_transform=[[0.0] * 4] * 3), "applied_transform cannot be undone"),
        (lambda content: content.update(applied_scale=0), "applied_scale is 0.0"),
    ],
)
def test_what_is_wrong_with_transforms_is_named(exported, change, message):
    changed(exported, change)
    with pytest.raises(ValueError, match=rf"transforms\.json: .*{message}"):
        read_labels(exported / "transforms.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cameras.txt", "1 PINHOLE 5", "cameras.txt, line 1: a camera has an id"),
        ("cameras.txt", "# nothing\n1 PINHOLE 512 384 500", "cameras.txt, line 2: PINHOLE has no size and parameters"),
        ("cameras.txt", "1 OPENCV_FISHEYE 5 5 1 1 1 1 0 0 0 0", "OPENCV_FISHEYE camera is no pinhole camera"),
        ("cameras.txt", "9 PINHOLE 5 5 1 1 1 1", r"image 'view_000.png' has camera 1, which is not in cameras.txt"),
        ("images.txt", "", "no images"),
        ("images.txt", "1 1 0 0 0 0 0 2.7 1", "line 1: an image has 10 values"),
        ("images.txt", "1 0 0 0 0 0 0 2.7 1 a.png\n", "line 1: the quaternion .* is no rotation"),
        ("images.txt", "1 1 0 0 x 0 0 2.7 1 a.png\n", "line 1: could not convert string to float: 'x'"),
        ("images.txt", "1 1 0 0 0 0 0 2.7 1 a.png\n2 1 0 0 0 0 0 2.7 1 b.png\n", "line 2: expected the points"),
    ],
)
def test_what_is_wrong_with_colmap_is_named(exported, name, text, message):
    (exported / "sparse/0" / name).write_text(text)
    with pytest.raises(ValueError, match=f"sparse/0: .*{message}"):
        read_labels(exported / "sparse/0")


def test_binary_models_are_named_with_the_way_out(exported):
    (exported / "transforms.json").unlink()
    for name in ("cameras", "images", "points3D"):
        (exported / f"sparse/0/{name}.txt").unlink()
        (exported / f"sparse/0/{name}.bin").write_bytes(b"\0" * 8)
    for path in (exported, exported / "sparse/0"):
        with pytest.raises(ValueError, match="binary files; make text of them: colmap model_converter"):
            read_labels(path)


def test_a_round_trip_keeps_skew_out(tmp_path, labels):
    """What no pinhole is, is refused before anything is written."""
    pose, intrinsics = split_label(labels)
    intrinsics = intrinsics.clone()
    intrinsics[3, 0, 1] = 0.1
    with pytest.raises(ValueError, match="skew"):
        export_views(tmp_path / "set", torch.rand(len(labels), 8, 8, 3), join_label(pose, intrinsics))
