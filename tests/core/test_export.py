"""Exported data sets: read back by their documented conventions, points must land where our renderer puts them."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.export import Points, export_views
from diffportrait3d.cameras.labels import join_label, orbit_camera, split_label, trajectory
from diffportrait3d.cameras.projection import project
from diffportrait3d.synthetic_heads import portrait_scene, render_views
from diffportrait3d.synthetic_heads.points import head_points

HEIGHT, WIDTH = 384, 512
TOLERANCE = 1e-3  # pixels


@pytest.fixture(scope="module")
def points() -> torch.Tensor:
    """World points [40, 3] around the head."""
    return torch.rand(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 - 0.3


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    path = trajectory("orbit", 3, (-80, 80), (-30, 30), roll=25.0)
    wide = orbit_camera([170.0, -60.0], [40.0, -10.0], -70.0, radius=1.7, focal=1.2)
    wide[:, 16 + 2], wide[:, 16 + 5] = 0.4, 0.55  # principal point off the centre
    return torch.cat([path, wide])


@pytest.fixture
def export(tmp_path, labels):
    def write(**extras):
        images = torch.rand(len(labels), HEIGHT, WIDTH, extras.pop("channels", 3))
        export_views(tmp_path / "set", images, extras.pop("labels", labels), **extras)
        return tmp_path / "set", images

    return write


def where_the_renderer_sees(points, label) -> np.ndarray:
    """Pixels [N, 2] in float64."""
    return project(points, label.double(), (HEIGHT, WIDTH))[:, :2].numpy()


def rows(path) -> list[list[str]]:
    lines = path.read_text().splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


def turned(quaternion: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Vectors [N, 3] rotated by (w, x, y, z), by the quaternion product's vector form."""
    w, axis = quaternion[0], quaternion[1:]
    across = np.cross(axis, vectors)
    return vectors + 2 * (w * across + np.cross(axis, across))


def test_colmap_puts_points_where_the_renderer_does(export, points, labels):
    folder, _ = export()
    cameras = {row[0]: row[1:] for row in rows(folder / "sparse/0/cameras.txt")}
    images = rows(folder / "sparse/0/images.txt")
    assert len(cameras) == 2 and all(not line for line in images[1::2])  # two lenses; an empty line for 2D points
    assert [row[9] for row in images[::2]] == [f"view_{view:03d}.png" for view in range(5)]
    for row, label in zip(images[::2], labels, strict=True):
        numbers = np.array(row[1:8], dtype=np.float64)
        model, width, height, *lens = cameras[row[8]]
        fx, fy, cx, cy = map(float, lens)
        assert (model, width, height) == ("PINHOLE", str(WIDTH), str(HEIGHT))
        x, y, z = (turned(numbers[:4], points.numpy()) + numbers[4:]).T
        found = np.stack([fx * x / z + cx, fy * y / z + cy], 1)
        assert np.abs(found - where_the_renderer_sees(points, label)).max() < TOLERANCE


def test_nerfstudio_puts_points_where_the_renderer_does(export, points, labels):
    folder, _ = export()
    content = json.loads((folder / "transforms.json").read_text())
    assert len(content["frames"]) == 5 and "w" not in content
    for view, (frame, label) in enumerate(zip(content["frames"], labels, strict=True)):
        assert frame["file_path"] == f"images/view_{view:03d}.png" and "mask_path" not in frame
        assert (frame["w"], frame["h"]) == (WIDTH, HEIGHT)
        into_camera = np.linalg.inv(np.array(frame["transform_matrix"]))
        x, y, z, _ = into_camera @ np.concatenate([points.numpy(), np.ones((40, 1))], 1).T
        assert (z < 0).all()  # OpenGL looks along -z
        found = np.stack([frame["cx"] + frame["fl_x"] * x / -z, frame["cy"] - frame["fl_y"] * y / -z], 1)
        assert np.abs(found - where_the_renderer_sees(points, label)).max() < TOLERANCE


def test_views_with_one_lens_share_it(export, labels):
    folder, _ = export(labels=trajectory("arc", 5))
    content = json.loads((folder / "transforms.json").read_text())
    assert content["fl_x"] == pytest.approx(4.2647 * WIDTH) and content["cy"] == HEIGHT / 2
    assert set(content["frames"][0]) == {"file_path", "transform_matrix"}
    assert len(rows(folder / "sparse/0/cameras.txt")) == 1


def test_pictures_alpha_and_masks(export):
    masks = torch.zeros(5, HEIGHT, WIDTH)
    masks[:, 100:200, 50:90] = 1
    folder, images = export(channels=4, masks=masks)
    for view in range(5):
        saved = np.asarray(Image.open(folder / f"images/view_{view:03d}.png"))
        assert saved.shape == (HEIGHT, WIDTH, 4)
        assert np.abs(saved / 255 - images[view].numpy()).max() < 0.503 / 255
        mask = np.asarray(Image.open(folder / f"masks/view_{view:03d}.png.png"))
        assert mask.shape == (HEIGHT, WIDTH) and np.array_equal(mask, masks[view].byte().numpy() * 255)
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    assert all((folder / frame["mask_path"]).is_file() and (folder / frame["file_path"]).is_file() for frame in frames)


def test_points_in_both_forms(export):
    cloud = Points(torch.tensor([[0.1, -0.2, 0.3], [1e-7, 0.0, 2.0]]), torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.2]]))
    folder, _ = export(points=cloud)
    table = np.array(rows(folder / "sparse/0/points3D.txt"), dtype=np.float64)
    assert table[:, 0].tolist() == [1, 2] and table[0, 4:].tolist() == [0, 128, 255, -1]
    np.testing.assert_allclose(table[:, 1:4], cloud.positions.numpy(), rtol=1e-7)
    header, body = (folder / "points.ply").read_text().split("end_header\n")
    assert header.startswith("ply\nformat ascii 1.0\nelement vertex 2\n")
    np.testing.assert_allclose(np.array([line.split() for line in body.splitlines()], dtype=float), table[:, 1:7])


def test_starting_points_lie_on_the_head_and_have_its_colours():
    scene, labels = portrait_scene(0), trajectory("arc", 3, (-60, 60))
    views = render_views(scene, labels, 96)
    cloud = head_points(views.image.movedim(1, -1), labels, 3000)
    assert 1000 < len(cloud.positions) <= 3000
    assert torch.cdist(cloud.positions, scene.vertices).amin(1).max() < 1e-3
    seen = project(cloud.positions, labels[1], 96)[:, :2].long()
    on_head = views.mask[1][seen[:, 1].clamp(0, 95), seen[:, 0].clamp(0, 95)]
    assert on_head.float().mean() > 0.9
    front = cloud.positions[:, 2] > 0.35  # the face, seen by all three
    shown = views.image[1][:, seen[front, 1], seen[front, 0]].T
    assert (cloud.colours[front] - shown).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": orbit_camera([0.0], 0.0)}, "5 images and 1 cameras"),
        ({"masks": torch.zeros(1, HEIGHT, WIDTH)}, r"masks of shape \(1, 384, 512\)"),
        ({"labels": torch.zeros(5, 25)}, "view 0 has a rotation"),
    ],
)
def test_what_cannot_be_exported(export, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        export(**change)
    assert not list(tmp_path.iterdir())


def test_skew_and_a_folder_that_is_there(export, tmp_path, labels):
    pose, intrinsics = split_label(labels)
    intrinsics = intrinsics.clone()
    intrinsics[3, 0, 1] = 0.1
    with pytest.raises(ValueError, match="camera 3 has intrinsics with skew"):
        export(labels=join_label(pose, intrinsics))
    export()
    with pytest.raises(FileExistsError, match="set exists already"):
        export()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_binary_files_say_what_the_text_says(export, labels):
    """COLMAP's documentation of the binary format, read by itself: counts and entries, to the last byte."""
    cloud = Points(torch.tensor([[0.1, -0.2, 0.3], [1e-7, 0.0, 2.0]]), torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.2]]))
    folder, _ = export(points=cloud)
    names = ("cameras", "images", "points3D")
    files = {name: io.BytesIO((folder / f"sparse/0/{name}.bin").read_bytes()) for name in names}

    def read(name: str, form: str) -> tuple:
        return struct.unpack("<" + form, files[name].read(struct.calcsize("<" + form)))

    for row in rows(folder / "sparse/0/cameras.txt")[: read("cameras", "Q")[0]]:
        number, model, *values = read("cameras", "IiQQ4d")
        assert [str(number), "PINHOLE", *map(repr, values)] == row and model == 1
    for row in rows(folder / "sparse/0/images.txt")[: 2 * read("images", "Q")[0] : 2]:
        number, *pose, lens = read("images", "I7dI")
        name = b"".join(iter(lambda: files["images"].read(1), b"\0")).decode()
        assert [str(number), *map(repr, pose), str(lens), name] == row and read("images", "Q") == (0,)
    for row in rows(folder / "sparse/0/points3D.txt")[: read("points3D", "Q")[0]]:
        number, *values, error, track = read("points3D", "Q3d3BdQ")
        assert [str(number), *map(repr, values), "-1"] == row and (error, track) == (-1, 0)
    assert all(not file.read() for file in files.values())


def test_gsplats_normalising_finds_points(tmp_path):
    """Its default takes the principal axes of the start points: enough of them, from cameras of one side only."""
    labels = trajectory("arc", 4, (-10, 10))
    views = torch.rand(4, 64, 64, 3)
    export_views(tmp_path / "set", views, labels, points=head_points(views, labels, 5000))
    positions = np.array(rows(tmp_path / "set/sparse/0/points3D.txt"), dtype=np.float64)[:, 1:4]
    centred = positions - np.median(positions, axis=0)
    lengths, axes = np.linalg.eigh(np.cov(centred, rowvar=False))
    assert len(positions) > 500 and (lengths > 1e-4).all() and np.isfinite(axes).all()
