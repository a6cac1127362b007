"""What all readers use: five points, the crop they give, colour correction, splits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from diffportrait3d.cameras.labels import orbit_camera, split_label
from diffportrait3d.cameras.projection import project, world_to_camera
from diffportrait3d.portraits.alignment import SAME_WORLD, Camera, eg3d_crop, head_similarity
from diffportrait3d.portraits.face import FIVE_POINTS
from diffportrait3d.portraits.warping import warp
from diffportrait3d.synthetic_heads import render_views
from training import import_data
from training.check_data import problems
from training.dataset.images import FIRST_CONDITION, DataError, read_manifest
from training.sources.colour import apply_affine, apply_polynomial
from training.sources.conditions import _scene
from training.sources.landmarks import read_points
from training.sources.reader import Reader, Splits, ViewGroup, checked_labels

from .conftest import rotation
from .test_exports import write_export


def test_a_crop_is_what_the_renderer_draws_at_the_label():
    """A head drawn by a camera that looks past it, cropped, against the same head drawn at the exported label."""
    scene = _scene(FIRST_CONDITION["train"])
    label = orbit_camera(20.0, 5.0, roll=4.0, radius=2.6, focal=3.2)
    label[:16] = (split_label(label)[0].double() @ _homogeneous(rotation(3, 2.0))).flatten().float()
    source = (render_views(scene, label, 256, 1).image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    camera = Camera(world_to_camera(label).double(), split_label(label)[1].double())
    crop = eg3d_crop(camera, SAME_WORLD)
    cropped, inside = warp(source, crop.homography, 96)
    drawn = (render_views(scene, crop.label, 96, 2).image[0].permute(1, 2, 0) * 255).numpy()
    error = ((cropped - drawn) / 255) ** 2
    assert inside == 1.0 and -10 * np.log10(error.mean()) > 30


def _homogeneous(turn: torch.Tensor) -> torch.Tensor:
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = turn
    return out


def test_similarity_of_a_turned_scaled_and_moved_face():
    points = 0.37 * FIVE_POINTS @ rotation(5).T + torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    np.testing.assert_allclose(head_similarity(points)(points), FIVE_POINTS, atol=1e-9)


def test_five_points_are_where_eg3ds_crops_have_them():
    """EG3D's frontal camera sees the standard face as EG3D crops it: 700 of 1024 px, focal length 2985.29 px."""
    frontal = orbit_camera(0.0, 0.0, around="eg3d")
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
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    matrix = np.array([[0.9, 0.05, 0.0, 0.02], [0.0, 0.8, 0.1, -0.01], [0.1, 0.0, 0.7, 0.0]])
    expected = np.stack([(image[..., :] / 255 * matrix[:3, c]).sum(-1) + matrix[c, 3] for c in range(3)], -1)
    assert np.abs(apply_affine(image, matrix) / 255 - expected.clip(0, 1)).max() <= 0.5 / 255 + 1e-9
    seven = np.zeros((3, 7))
    seven[:, :3], seven[0, 3], seven[2, 6] = np.eye(3), 0.2, 0.01  # r + 0.2 r g, g, b + 0.01
    linear = np.where(image / 255 <= 0.04045, image / 255 / 12.92, ((image / 255 + 0.055) / 1.055) ** 2.4)
    wanted = linear + [0, 0, 0.01]
    wanted[..., 0] += 0.2 * linear[..., 0] * linear[..., 1]
    wanted = np.where(wanted <= 0.0031308, wanted * 12.92, 1.055 * wanted.clip(0, 1) ** (1 / 2.4) - 0.055)
    assert np.abs(apply_polynomial(image, seven) / 255 - wanted).max() <= 0.5 / 255 + 1e-9
    assert np.array_equal(apply_polynomial(image, np.eye(3)), image)
    with pytest.raises(DataError, match="T one of"):
        apply_polynomial(image, np.zeros((3, 6)))


def test_people_keep_their_split_by_name():
    splits = Splits(0.1, 0.3)
    names = [f"nersemble-{n:03d}" for n in range(1000)]
    found = [splits.of(name) for name in names]
    assert abs(found.count("test") - 300) < 50 and abs(found.count("val") - 100) < 35
    assert found == [Splits(0.1, 0.3).of(name) for name in names]
    with pytest.raises(DataError, match="at most 1"):
        Splits(0.6, 0.6)


class FoldersOfPeople(Reader):
    """All that a reader has to have: folder PERSON/NN.png, cameras from one file."""

    help = "a folder for every person"

    def groups(self):
        people = sorted(path.name for path in self.root.iterdir() if path.is_dir())
        files = {name: sorted(f"{name}/{path.name}" for path in (self.root / name).iterdir()) for name in people}
        return [ViewGroup(name, name, ("train", "val")[i % 2], {"files": files[name]}) for i, name in enumerate(people)]

    def views(self, group, resolution):
        names, labels = group.place["files"], dict(json.loads((self.root / "dataset.json").read_text())["labels"])
        return self.square_views(names, checked_labels([labels[n] for n in names], names, "dataset.json"), resolution)


def test_a_new_reader_is_a_class_and_a_line_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(import_data.READERS, "folders", FoldersOfPeople)
    root, out = write_export(tmp_path / "data", people=2), tmp_path / "set"
    command = ["folders", "--source", str(root), "--out", str(out), "--resolution", "40", "--condition-people", "1"]
    assert import_data.main(command) == 0 and list(problems(out)) == []
    header, subjects = read_manifest(out)
    assert header["sources"] == ["folders"] and [s["id"] for s in subjects] == ["seed0000", "seed0001"]
