"""Rendered heads: the rasteriser against brute force, exact depth, repeatability and consistency between
views."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from diffportrait3d import synthetic_heads as heads
from diffportrait3d.cameras.labels import orbit_camera, split_label
from diffportrait3d.cameras.projection import project
from diffportrait3d.synthetic_heads.mesh import HEAD_ORIGIN, grid_triangles, to_world, vertex_normals
from diffportrait3d.synthetic_heads.rasterise import interpolate, rasterise
from diffportrait3d.synthetic_heads.scene import _draw, bake_light

ICT = os.environ.get("DIFFPORTRAIT3D_ICT")
PROVIDERS = [
    "analytic",
    pytest.param("ict", marks=pytest.mark.skipif(not ICT, reason="DIFFPORTRAIT3D_ICT names no model file")),
]


@pytest.fixture(scope="module")
def scenes() -> dict[str, heads.Scene]:
    return {"analytic": heads.portrait_scene(3)} | (
        {"ict": heads.portrait_scene(3, heads.IctHeads(ICT))} if ICT else {}
    )


def _soup(count: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count * 3, 3, generator=generator) * torch.tensor([1.4, 1.4, 3.0]) + torch.tensor(
        [-0.2, -0.2, 0.5]
    )
    return points * torch.tensor([size, size, 1.0]), torch.arange(count * 3).view(-1, 3)


def _brute_force(points: torch.Tensor, triangles: torch.Tensor, height: int, width: int):
    """Every triangle against every pixel, in float64, one by one."""
    best = np.full((height, width), np.inf)
    winner = np.full((height, width), -1)
    for number, corner in enumerate(points.double().numpy()[triangles.numpy()]):
        inverse = np.linalg.inv(np.stack([corner[:, 0], corner[:, 1], np.ones(3)]))
        for row in range(height):
            for column in range(width):
                weight = inverse @ [column + 0.5, row + 0.5, 1]
                if (weight >= 0).all() and 1 / (weight / corner[:, 2]).sum() < best[row, column]:
                    best[row, column], winner[row, column] = 1 / (weight / corner[:, 2]).sum(), number
    return winner, np.where(np.isfinite(best), best, 0)


def test_rasteriser_equals_brute_force():
    points, triangles = _soup(30, 20)
    found = rasterise(points, triangles, 18, 20)
    winner, depth = _brute_force(points, triangles, 18, 20)
    assert (winner >= 0).mean() > 0.5 and len(np.unique(winner)) > 8
    assert np.array_equal(found.triangle.numpy(), winner)
    np.testing.assert_allclose(found.depth.numpy(), depth, rtol=2e-4)


def test_rasteriser_result_does_not_depend_on_the_chunks():
    points, triangles = _soup(200, 64)
    whole = rasterise(points, triangles, 64, 64)
    for limit in (1, 1000):
        for a, b in zip(whole, rasterise(points, triangles, 64, 64, max_candidates=limit), strict=True):
            assert torch.equal(a, b)


def test_attributes_are_perspective_correct():
    corners = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.1, 5.0], [0.3, 2.0, 3.0]])  # camera space
    points = torch.cat([corners[:, :2] / corners[:, 2:] * 40, corners[:, 2:]], 1)
    found = rasterise(points, torch.tensor([[0, 1, 2]]), 40, 40)
    hit = found.triangle >= 0
    assert hit.sum() > 20
    seen = interpolate(corners, torch.tensor([[0, 1, 2]]), found)  # camera-space position at each pixel
    row, column = torch.nonzero(hit).unbind(1)
    torch.testing.assert_close(seen[:, 0] / seen[:, 2] * 40, column + 0.5, atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[:, 1] / seen[:, 2] * 40, row + 0.5, atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[:, 2], found.depth[hit])
    torch.testing.assert_close(found.barycentric[hit].sum(1), torch.ones(int(hit.sum())))


def test_equal_depths_fall_to_the_first_triangle_and_culling_drops_backs():
    points = torch.tensor([[0.0, 0.0, 1.0], [9.0, 0.0, 1.0], [0.0, 9.0, 1.0]])
    twice = torch.tensor([[0, 1, 2], [0, 2, 1]])
    assert rasterise(points, twice, 8, 8).triangle.max() == 0
    culled = rasterise(points, twice, 8, 8, two_sided=torch.tensor([False, False]))
    assert culled.triangle.max() == 1 and (culled.triangle == 0).sum() == 0
    assert (rasterise(points * torch.tensor([1, 1, -1.0]), twice, 8, 8).triangle == -1).all()  # behind the camera


def test_normals_of_a_closed_grid_point_outwards():
    theta, phi = torch.meshgrid(torch.linspace(0.1, 3.0, 20), torch.arange(30) * (2 * torch.pi / 30), indexing="ij")
    ball = torch.stack([theta.sin() * phi.sin(), theta.cos(), theta.sin() * phi.cos()], -1).reshape(-1, 3)
    assert ((vertex_normals(ball, grid_triangles(20, 30)) * ball).sum(1) > 0.8).all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_depth_is_the_camera_z_of_the_surface(scenes, provider):
    scene, label, size = scenes[provider], orbit_camera(25, -8), 96
    view = heads.View(*(field[0] for field in heads.render_views(scene, label, size, supersample=1)))
    assert view.image.shape == (3, size, size) and view.depth.shape == view.mask.shape == (size, size)
    assert torch.equal(view.mask, view.depth > 0)
    found = rasterise(project(scene.vertices, label, size), scene.triangles, size, size, scene.two_sided)
    assert torch.equal(found.depth, view.depth)
    surface = project(interpolate(scene.vertices, scene.triangles, found), label, size)  # the seen points, projected
    row, column = torch.nonzero(view.mask).unbind(1)
    assert len(row) > 0.3 * size * size
    torch.testing.assert_close(surface[:, 0], column + 0.5, atol=0.01, rtol=0)
    torch.testing.assert_close(surface[:, 1], row + 0.5, atol=0.01, rtol=0)
    torch.testing.assert_close(surface[:, 2], view.depth[view.mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_placement_is_that_of_a_face_crop(scenes, provider):
    scene = scenes[provider]
    mask = heads.render_views(scene, orbit_camera(0, 0), 128).mask[0]
    rows = torch.nonzero(mask.any(1)).squeeze(1)
    assert 6 <= rows[0] <= 32  # some air above the hair
    assert rows[-1] == 127  # the bust leaves the frame below
    side = mask[64].nonzero().squeeze(1)
    assert abs(float(side.float().mean()) - 63.5) < 6
    assert torch.equal(to_world(torch.tensor([HEAD_ORIGIN])), torch.tensor([[0.0, 0.0, 0.2]]))


def test_everything_is_repeatable_and_seeds_differ():
    label = orbit_camera([0.0, 30.0], 5.0)
    first = heads.render_camera_images(label, 48, subject=5)
    torch.manual_seed(123)  # the global generator plays no part
    assert torch.equal(first, heads.render_camera_images(label, 48, subject=5))
    assert first.shape == (2, 3, 48, 48) and first.min() >= 0 and first.max() <= 1
    assert (first - heads.render_camera_images(label, 48, subject=6)).abs().mean() > 0.05
    assert (first[0] - first[1]).abs().mean() > 0.02


@pytest.mark.parametrize("provider", PROVIDERS)
def test_views_agree_where_they_see_the_same_point(scenes, provider):
    """Reproject view a into view b with depth; co-visible pixels have the same colour up to highlights and
    resampling."""
    scene, size = scenes[provider], 128
    labels = orbit_camera([-12.0, 14.0], [0.0, 6.0])
    views = heads.render_views(scene, labels, size)
    row, column = torch.nonzero(views.mask[0]).unbind(1)
    points = _unproject(labels[0], row, column, views.depth[0][row, column], size)
    there = project(points, labels[1], size)
    x, y = there[:, 0].long(), there[:, 1].long()
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    x, y, z = x[inside], y[inside], there[inside, 2]
    shown = (views.depth[1][y, x] - z).abs() < 0.004
    assert shown.float().mean() > 0.4
    here = views.image[0][:, row, column][:, inside][:, shown]
    error = (here - views.image[1][:, y[shown], x[shown]]).abs().mean(0)
    assert error.median() < 0.02 and error.mean() < 0.05
    shuffled = (here - here[:, torch.randperm(here.shape[1], generator=torch.Generator().manual_seed(0))]).abs().mean(0)
    assert error.mean() < shuffled.mean() / 3


def _unproject(label, row, column, depth, size):
    pose, intrinsics = split_label(label)
    image = torch.stack([(column + 0.5) / size, (row + 0.5) / size, torch.ones(len(row))], 1)
    camera = image @ torch.linalg.inv(intrinsics).T * depth[:, None]
    return camera @ pose[:3, :3].T + pose[:3, 3]


def test_background_depends_on_the_direction_alone(scenes):
    scene = scenes["analytic"]
    views = heads.render_views(scene, orbit_camera(0, 0, roll=[180.0, 0.0]), 64)
    turned, plain = views.image
    assert not views.mask[1, 0].any()
    torch.testing.assert_close(turned.flip(1, 2)[:, 0], plain[:, 0], atol=1e-5, rtol=0)


def test_many_people_are_well_formed():
    for seed in range(100, 105):
        scene = heads.portrait_scene(seed)
        assert all(
            torch.isfinite(value).all() for value in (scene.vertices, scene.normals, scene.radiance, scene.specular)
        )
        assert scene.triangles.min() >= 0 and scene.triangles.max() < len(scene.vertices)
        assert 0.05 < float(scene.radiance.mean()) < 1.0


def test_missing_or_wrong_ict_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        heads.IctHeads(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "other.npz", V=np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"other\.npz.*arrays missing: F"):
        heads.IctHeads(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz"):
        heads.IctHeads(tmp_path / "text.npz")


def test_unknown_provider_is_refused():
    with pytest.raises(ValueError, match="flame"):
        heads.portrait_scene(0, "flame")


@pytest.mark.skipif(not ICT, reason="DIFFPORTRAIT3D_ICT names no model file")
def test_ict_expressions_move_the_posed_mesh_only():
    model = heads.IctHeads(ICT)
    weights = torch.zeros(len(model.identity))
    neutral, open_mouth = model.build(weights), model.build(weights, {"jawOpen": 0.8})
    assert torch.equal(neutral.vertices, neutral.rest) and torch.equal(neutral.rest, open_mouth.rest)
    assert (open_mouth.vertices - open_mouth.rest).norm(dim=1).max() > 1.0  # cm
    with pytest.raises(ValueError, match="wink"):
        model.build(weights, {"wink": 1.0})


def test_baking_and_drawing_make_no_tensor_on_the_default_device(scenes):
    """Every new tensor follows the scene's device: with "meta" as the default, a forgotten one fails here as it would
    on a GPU."""
    scene, label = scenes["analytic"], orbit_camera(20.0, 5.0)
    expected = heads.render_views(scene, label, 24)
    with torch.device("meta"):
        light = bake_light(scene.vertices, scene.normals, scene.triangles, scene.light)
        drawn = _draw(scene, label[None], 24, 2)
    assert torch.equal(light, bake_light(scene.vertices, scene.normals, scene.triangles, scene.light))
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_views_drawn_together_are_those_drawn_alone(scenes):
    """As on a GPU: several cameras in one pass of the rasteriser."""
    labels = orbit_camera([-60.0, 0.0, 45.0], [20.0, 0.0, -10.0])
    for scene in scenes.values():
        alone, together = heads.render_views(scene, labels, 48), _draw(scene, labels, 48, 2)
        assert torch.equal(alone.depth, together.depth) and torch.equal(alone.mask, together.mask)
        assert (alone.image - together.image).abs().max() < 1e-6
