"""Reprojection on a plane, where everything is known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffportrait3d.cameras.labels import orbit_camera, split_label
from diffportrait3d.cameras.projection import project
from evaluation.metrics.reprojection import correspondence, reprojection_error, reprojection_pairs, unproject

SIZE = 48
LABELS = orbit_camera([0.0, 15.0, -20.0], [0.0, 10.0, -5.0])


def plane_depth(label: torch.Tensor, plane: float = 0.2) -> torch.Tensor:
    """Camera depth [H, W] of the world plane z = `plane`, solved per pixel."""
    pose, intrinsics = split_label(label)
    axis = (torch.arange(SIZE) + 0.5) / SIZE
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    rays = torch.stack([(u - 0.5) / intrinsics[0, 0], (v - 0.5) / intrinsics[1, 1], torch.ones_like(u)], dim=-1)
    return (plane - pose[2, 3]) / (rays @ pose[:3, :3].T)[..., 2]


def paint(points: torch.Tensor) -> torch.Tensor:
    """A smooth texture of the world point [H, W, 3] -> [3, H, W]."""
    x, y = points[..., 0], points[..., 1]
    return torch.stack([0.5 + 1.2 * x, 0.5 - 0.8 * y, 0.5 + 0.5 * x + 0.5 * y])


@pytest.fixture
def plane():
    depth = torch.stack([plane_depth(label) for label in LABELS])
    images = torch.stack([paint(unproject(d, label)) for d, label in zip(depth, LABELS, strict=True)])
    return images, depth, torch.ones_like(depth, dtype=torch.bool)


def test_unproject_inverts_projection():
    depth = plane_depth(LABELS[1])
    points = unproject(depth, LABELS[1])
    torch.testing.assert_close(points[..., 2], torch.full_like(depth, 0.2), atol=1e-6, rtol=0)
    pixels = project(points.reshape(-1, 3), LABELS[1], SIZE).reshape(SIZE, SIZE, 3)
    centres = torch.arange(SIZE) + 0.5
    torch.testing.assert_close(pixels[..., 0], centres.expand(SIZE, SIZE), atol=2e-4, rtol=0)
    torch.testing.assert_close(pixels[..., 1], centres[:, None].expand(SIZE, SIZE), atol=2e-4, rtol=0)


def test_plane_is_carried_exactly(plane):
    """The true correspondence by homography, and an error at the level of bilinear reading."""
    images, depth, mask = plane
    grid, shared = correspondence(depth, mask, LABELS, source=0, target=1)
    points = unproject(depth[1], LABELS[1])
    expected = project(points.reshape(-1, 3), LABELS[0], SIZE)[:, :2].reshape(SIZE, SIZE, 2) / SIZE * 2 - 1
    torch.testing.assert_close(grid, expected, atol=1e-5, rtol=0)
    inside = (expected.abs() < 1 - 1 / SIZE).all(-1)
    assert torch.equal(shared, inside)
    carried = F.grid_sample(images[:1], grid[None], align_corners=False)[0]
    assert (carried - images[1]).abs()[:, shared].max() < 2e-4
    pairs = reprojection_pairs(depth, mask, LABELS)
    assert len(pairs) == 6
    assert reprojection_error(images, pairs) < 1e-4


def test_error_sees_an_inconsistent_view(plane):
    images, depth, mask = plane
    pairs = reprojection_pairs(depth, mask, LABELS)
    images[2] = (images[2] + 0.3).clone()
    assert reprojection_error(images, pairs) == pytest.approx(0.3 * 4 / 6, abs=1e-4)  # 4 of 6 pairs involve view 2


def test_hidden_and_foreign_pixels_are_left_out(plane):
    """A board in front of the source hides what is behind it; background never counts."""
    _, depth, mask = plane
    board = depth.clone()
    board[0, :, : SIZE // 2] -= 0.3
    _, shared = correspondence(board, mask, LABELS, source=0, target=1)
    grid, open_shared = correspondence(depth, mask, LABELS, source=0, target=1)
    hidden = grid[..., 0] < -2 / SIZE
    assert open_shared[hidden].any() and not shared[hidden].any()
    assert torch.equal(shared[grid[..., 0] > 2 / SIZE], open_shared[grid[..., 0] > 2 / SIZE])
    mask[1, :10] = False
    _, shared = correspondence(depth, mask, LABELS, source=0, target=1)
    assert not shared[:10].any() and shared[10:].any()


def test_no_shared_surface_gives_nan():
    labels = orbit_camera([-80.0, 80.0], [0.0, 0.0])
    depth = torch.full((2, SIZE, SIZE), 2.4)
    mask = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    assert math.isnan(reprojection_error(torch.rand(2, 3, SIZE, SIZE), reprojection_pairs(depth, mask, labels)))
