"""Photographs: landmarks in every form, the crop and the camera they give, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffportrait3d.cameras.labels import PIVOT, camera_angles, orbit_camera
from diffportrait3d.cameras.projection import project
from diffportrait3d.portraits.alignment import FRAMINGS, AlignmentError, face_points, photograph_crop
from diffportrait3d.portraits.detector import FaceDetector
from diffportrait3d.portraits.face import MEAN_LANDMARKS, five_of
from diffportrait3d.portraits.landmarks import MEDIAPIPE, LandmarkError, Landmarks, read_landmarks
from diffportrait3d.portraits.warping import corners, paste, sample, transformed
from diffportrait3d.synthetic_heads import portrait_landmarks

SIZE = (480, 640)
MESH = Path(__file__).parents[1] / "data/astronaut_mediapipe.json"  # MediaPipe 0.10.21's of scikit-image's astronaut


def five_in_photograph(framing: str, label: torch.Tensor) -> Landmarks:
    """A mean face's five points in a photograph of `SIZE`, which has the crop of 300 pixels at (100, 50)."""
    points = project(face_points(Landmarks(torch.empty(0), None), framing).float(), label, 300)[:, :2]
    return Landmarks(points.double() + torch.tensor([100.0, 50.0]), None)


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize(("yaw", "pitch", "roll"), [(0, 0, 0), (20, 8, 12), (-35, -10, -25), (50, 0, 40)])
def test_camera_and_crop_of_a_mean_face(framing, yaw, pitch, roll):
    face = five_in_photograph(framing, orbit_camera(yaw, pitch, roll))
    whole = photograph_crop(face, SIZE, framing, upright=False)
    assert [float(a) for a in camera_angles(whole.label)] == pytest.approx([yaw, pitch, roll], abs=1.0)
    assert float((whole.label[:16].view(4, 4)[:3, 3] - torch.tensor(PIVOT)).norm()) == pytest.approx(2.7, abs=1e-5)
    square = torch.tensor([[100, 50], [400, 50], [400, 350], [100, 350]], dtype=torch.float64)
    pixels = torch.tensor([640, 480])
    assert (corners(whole.homography) * pixels - square).abs().max() < 2
    upright = photograph_crop(face, SIZE, framing)
    assert float(camera_angles(upright.label).roll) == pytest.approx(0, abs=1e-3)
    for crop in (whole, upright):  # the label's camera sees the face where the crop has it
        seen = project(face_points(face, framing).float(), crop.label, 1)[:, :2].double()
        assert (transformed(seen, crop.homography) * pixels - face.points).abs().max() < 1


def test_cameras_of_people():
    """All 68 landmarks of people with expressions; the table of docs/portraits.md has a hundred."""
    errors = []
    for seed in range(8):
        label = orbit_camera(-40 + 10 * seed, 4 * (seed % 5) - 8)
        seen = project(portrait_landmarks(seed), label, 256)[:, :2].double()
        crop = photograph_crop(Landmarks(seen, tuple(range(68))), (256, 256), FRAMINGS[1], upright=False)
        errors.append([float(a - b) for a, b in zip(camera_angles(crop.label), camera_angles(label), strict=True)])
    assert np.abs(errors).mean(0).max() < 3


def test_points_in_another_order_are_no_face():
    face = five_in_photograph(FRAMINGS[0], orbit_camera(0, 0))
    for order in ([1, 0, 2, 3, 4], [0, 1, 3, 2, 4], [3, 4, 2, 0, 1], [0, 0, 0, 0, 0]):
        with pytest.raises(AlignmentError, match="do not form a face .*eye left"):
            photograph_crop(Landmarks(face.points[order], None), SIZE)


def test_forms_of_landmarks():
    points = np.random.default_rng(0).uniform(10, 400, (68, 2))
    five = points[:5]
    text = "\n".join(f"{x} {y}" for x, y in five)
    parts = five / SIZE[::-1]
    for form in (text, json.dumps(five.tolist()), five, five.tolist(), torch.tensor(five), five[None], parts):
        [face] = read_landmarks(form, SIZE)
        assert face.numbers is None and torch.allclose(face.points, torch.tensor(five))
    [face] = read_landmarks(points.tolist(), SIZE)
    assert face.numbers == tuple(range(68)) and torch.equal(face.points, torch.tensor(points))
    small = (points - 200) / 4 + 200
    first, second = read_landmarks(np.stack([small, points]), SIZE)
    assert first.extent > second.extent, "the largest first"


def test_keypoints_of_openpose():
    points = np.random.default_rng(1).uniform(10, 400, (70, 2))
    sure = np.ones(70)
    sure[[3, 20]] = 0, 0.05
    flat = np.concatenate([points, sure[:, None]], 1).flatten().tolist()
    frame = {"canvas_width": 640, "canvas_height": 480, "people": [{"face_keypoints_2d": None}, {}]}
    assert read_landmarks([frame], SIZE) == []
    frame["people"].append({"face_keypoints_2d": flat})
    seen = [number for number in range(68) if number not in (3, 20)]
    parts = np.concatenate([points / (640, 480), sure[:, None]], 1).flatten().tolist()
    for keypoints, size, scale in ((flat, SIZE, 1), (flat, (960, 1280), 2), (parts, SIZE, 1)):
        frame["people"][-1]["face_keypoints_2d"] = keypoints
        for form in ([frame], frame):
            [face] = read_landmarks(form, size)
            assert list(face.numbers) == seen and torch.allclose(face.points, torch.tensor(points[seen]) * scale)


def test_mesh_of_mediapipe():
    """A real mesh: its points are those of the 68 that they stand for, so that the mean face fits."""
    mesh = np.array(json.loads(MESH.read_text()), dtype=np.float32)
    found = {"frames": [[{"landmarks_xy": mesh / 2}, {"landmarks_xy": mesh}], []], "image_size": (512, 512)}
    largest, smaller = read_landmarks(found, (512, 512))
    assert largest.numbers == tuple(MEDIAPIPE) and torch.allclose(largest.points, smaller.points * 2)
    yaw, pitch, roll = map(float, camera_angles(photograph_crop(largest, (512, 512), upright=False).label))
    assert abs(yaw) < 5 and abs(pitch) < 12 and abs(roll) < 6, "she looks into the camera"
    assert read_landmarks({"frames": [[]], "image_size": (512, 512)}, (512, 512)) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1 2 3", "3 numbers are no points: write x and y of five points"),
        ([[1, 2]] * 4, "4 points are not known"),
        ([[1, float("nan")]] * 5, "finite"),
        ({"faces": []}, "dict is no form of landmarks"),
        (7, "int is no form"),
        ({"frames": [[{"bbox": 1}]]}, "no mesh of MediaPipe .KeyError"),
        ({"frames": [[{"landmarks_xy": np.ones((68, 2))}]]}, "no mesh of MediaPipe .IndexError"),
    ],
)
def test_other_forms_are_named(value, message):
    with pytest.raises(LandmarkError, match=message):
        read_landmarks(value, SIZE)


def test_mean_landmarks_are_a_head_s():
    """Symmetric, eyes above the mouth, in front of the pivot's depth; five of them are the five points."""
    mirrored = MEAN_LANDMARKS[[*range(16, -1, -1), *range(26, 16, -1)]] * torch.tensor([-1, 1, 1])
    assert torch.allclose(mirrored, MEAN_LANDMARKS[:27], atol=1e-9)
    left, right, nose, *mouth = five_of(MEAN_LANDMARKS)
    assert left[0] < 0 < right[0] and nose[2] > left[2] and all(corner[1] < nose[1] for corner in mouth)


def test_a_view_goes_back_where_it_came_from():
    """Smooth images: nothing is lost by shrinking and enlarging. Outside the crop not a bit changes."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 480), torch.linspace(0, 4, 640), indexing="ij")
    photograph = torch.stack([x.sin(), y.cos(), (x * y).sin(), torch.ones_like(x)]) / 2 + 0.5
    face = five_in_photograph(FRAMINGS[0], orbit_camera(0, 0, 15))
    homography = photograph_crop(face, SIZE).homography
    for side in (128, 600):
        view, covered = sample(photograph[:3], homography, (side, side))
        assert view.shape == (3, side, side) and 0.9 < covered.mean() <= 1
        back, laid = paste(photograph, view, torch.ones(side, side), homography)
        assert (back - photograph).abs().max() < 0.01 and laid.max() == 1
        negative, _ = paste(photograph, 1 - view, torch.ones(side, side), homography)
        assert torch.equal(negative[:, laid == 0], photograph[:, laid == 0]) and torch.equal(negative[3], photograph[3])
        assert (negative[:3, laid == 1] - 1 + photograph[:3, laid == 1]).abs().max() < 0.01
    away = torch.eye(3, dtype=torch.float64)
    away[0, 2] = 5.0
    assert torch.equal(paste(photograph, view, torch.ones(side, side), away)[0], photograph)


@pytest.mark.parametrize("size", [(1, 1), (1, 800), (800, 4), (8, 8)])
def test_dlib_is_not_asked_about_images_too_small_for_a_face(size):
    image = np.zeros((*size, 3), np.uint8)
    assert FaceDetector().faces(image, image) == []
