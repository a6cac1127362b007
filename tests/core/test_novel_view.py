"""S: its geometry against hand-written cameras, its learning, its budget."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffportrait3d.cameras.projection import pixel_centres, project_to_unit, world_rays
from diffportrait3d.networks.novel_view import (
    NovelViewConfig,
    NovelViewModel,
    composite_weights,
    ray_box,
    sample_volume,
)

TINY = NovelViewConfig(
    image_size=32,
    render_size=16,
    base_channels=8,
    feature_channels=6,
    volume_size=16,
    volume_channels=4,
    prior_channels=2,
    samples_per_ray=32,
    box_center=(0.0, 0.0, 0.0),
    box_half_size=0.45,
)


def eg3d_label(yaw: float, pitch: float, radius: float = 2.7) -> torch.Tensor:
    """An EG3D label by hand in numpy, degrees: camera on a sphere around the origin, looking at (0, 0, 0.2)."""
    yaw, pitch = np.radians([yaw, pitch])
    position = radius * np.array([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    forward = np.array([0, 0, 0.2]) - position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 1, 0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = position
    return torch.tensor(np.concatenate([pose.ravel(), [4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1]]), dtype=torch.float32)


def labels(*poses) -> torch.Tensor:
    return torch.stack([eg3d_label(*pose) for pose in poses])


def rays(label: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Origins [N, 1, 3] and unit directions [N, size*size, 3] through pixel centres."""
    return label[:, None, 3:12:4], world_rays(pixel_centres(size, size, label), label)


def test_projection_signs():
    point = torch.tensor([[[0.1, 0.05, 0.2]]])  # to the right of and above the pivot in the frontal picture
    (u, v), depth = project_to_unit(point, labels((0, 0)))[0][0, 0], project_to_unit(point, labels((0, 0)))[1][0, 0]
    assert depth == pytest.approx(2.5)
    assert (u, v) == (pytest.approx(0.5 + 4.2647 * 0.1 / 2.5), pytest.approx(0.5 - 4.2647 * 0.05 / 2.5))
    tip = torch.tensor([[[0.0, 0.0, 0.3]]])  # in front of the pivot, like a nose
    assert project_to_unit(tip, labels((30, 0)))[0][0, 0, 0] < 0.49  # seen from the world's +x side it points left
    assert project_to_unit(tip, labels((0, 30)))[0][0, 0, 1] > 0.51  # seen from above it points down


def test_rays_meet_projection():
    label = labels((25, -12), (-60, 20))
    origins, directions = rays(label, 8)
    image, depth = project_to_unit(origins + 2.4 * directions, label)
    centres = (torch.arange(8) + 0.5) / 8
    expected = torch.stack(torch.meshgrid(centres, centres, indexing="ij")[::-1], dim=-1).reshape(1, 64, 2)
    torch.testing.assert_close(image, expected.expand(2, -1, -1), atol=2e-6, rtol=0)
    assert (depth > 2.3).all()


def test_ray_box():
    origins = torch.tensor([[[0.0, 0.0, 3.0]]])
    directions = F.normalize(torch.tensor([[[0.0, 0, -1], [0.0, 0, 1], [1.0, 0, -1]]]), dim=-1)
    enter, leave = ray_box(origins, directions, torch.zeros(3), 0.5)
    assert (enter[0, 0], leave[0, 0]) == (pytest.approx(2.5), pytest.approx(3.5))
    assert (leave - enter)[0, 1] == 0 and (leave - enter)[0, 2] == 0


def test_composite_weights_by_hand():
    logits, step = torch.tensor([[[1.0, 2.0, -3.0]]]), torch.tensor([[0.1]])
    weights, through = composite_weights(logits, step)
    alpha = 1 - np.exp(-np.log1p(np.exp(np.array([0.0, 1.0, -4.0]))) * 10 * 0.1)
    by_hand = [alpha[0], (1 - alpha[0]) * alpha[1], (1 - alpha[0]) * (1 - alpha[1]) * alpha[2]]
    np.testing.assert_allclose(weights[0, 0], by_hand, rtol=1e-5)
    assert through.item() + weights.sum().item() == pytest.approx(1)


def test_volume_is_read_at_voxel_centres():
    """A linear function stored at voxel centres is read back exactly anywhere between them."""
    model = NovelViewModel(TINY)
    slope = torch.tensor([1.0, -2.0, 3.0])
    volume = (model.voxels @ slope).reshape(1, 1, 16, 16, 16)
    points = torch.rand(1, 20, 4, 3, generator=torch.Generator().manual_seed(0)) * 0.8 - 0.4
    torch.testing.assert_close(sample_volume(volume, points, model.center, 0.45)[:, 0], points @ slope)


@pytest.mark.parametrize("pose", [(0, 0), (40, 0), (-70, 0), (0, 25), (30, -20)])
def test_analytic_blob_lands_on_its_pixel(pose):
    """A red blob at a known world position is rendered where the hand-written camera sees it."""
    cfg = dataclasses.replace(TINY, image_size=64, render_size=32, volume_size=32, samples_per_ray=64)
    model = NovelViewModel(cfg)
    blob = torch.tensor([0.12, 0.09, 0.15])
    distance = (model.voxels - blob).norm(dim=-1)
    volume = torch.zeros(1, 2 + cfg.feature_channels, 32, 32, 32)
    volume[:, 0] = (300 * (0.05 - distance)).clamp(-30, 12).reshape(32, 32, 32)  # opaque inside 0.05
    volume[:, 1] = -30  # gate closed: nothing comes from the source image
    volume[:, 2] = 1  # red
    label = labels(pose)
    nothing = torch.zeros(1, cfg.feature_channels, 32, 32)
    features, alpha = model.render(volume, nothing, label, label)
    centres = (torch.arange(32) + 0.5) / 32
    u = (alpha[0, 0].sum(0) * centres).sum() / alpha.sum()
    v = (alpha[0, 0].sum(1) * centres).sum() / alpha.sum()
    expected, _ = project_to_unit(blob.reshape(1, 1, 3), label)
    assert alpha.max() > 0.95
    assert torch.stack([u, v]) == pytest.approx(expected[0, 0], abs=0.25 / 32)  # a quarter of a pixel
    torch.testing.assert_close(features[:, :1], alpha)
    assert features[:, 1:].abs().max() == 0


def test_same_camera_reads_the_source_exactly():
    """With target = source, pixel-aligned features and the background come back unmoved at any depth."""
    torch.manual_seed(0)
    model = NovelViewModel(TINY)
    label = labels((20, 10), (-35, 5))
    pixel_map = torch.rand(2, TINY.feature_channels, 16, 16)
    volume = torch.randn(2, 2 + TINY.feature_channels, 16, 16, 16)
    volume[:, 1] = 30  # gate open
    features, alpha = model.render(volume, pixel_map, label, label)
    torch.testing.assert_close(features, pixel_map * alpha, atol=2e-5, rtol=0)
    torch.nn.init.zeros_(model.background_colour.weight)
    _, directions = rays(label, 16)
    background = model.background(pixel_map[:, :3], torch.rand(2, 8, 16, 16), torch.rand(2, 32), label, directions)
    torch.testing.assert_close(background[:, :3].reshape(2, 3, 16, 16), pixel_map[:, :3], atol=2e-5, rtol=0)


def test_background_turns_with_the_camera():
    """A mark on the background moves by the rotation's angle, whatever the camera's position."""
    model = NovelViewModel(TINY)
    for layer in (model.background_colour, model.background_outside):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    colour = torch.zeros(1, 3, 16, 16)
    colour[:, :, :, 8:] = 1  # an edge in the middle of the source
    _, directions = rays(labels((3, 0)), 16)  # the camera moves to +x, so its axis swings to -x
    background = model.background(colour, torch.zeros(1, 8, 16, 16), torch.zeros(1, 32), labels((0, 0)), directions)
    row = background[0, 0].reshape(16, 16)[8]
    forward = F.normalize(torch.tensor([0, 0, 0.2]) - labels((3, 0))[0, 3:12:4], dim=0)
    edge = 0.5 - 4.2647 * (forward[0] / -forward[2])  # where straight ahead of the source lies in the target
    inside = row[(torch.arange(16) + 0.5) / 16 < edge.item() - 0.05]
    outside = row[((torch.arange(16) + 0.5) / 16 > edge.item() + 0.05)]
    assert edge > 0.65 and len(outside) > 2
    assert inside.abs().max() < 1e-4 and outside[:2].min() > 0.8


def test_output_determinism_and_gradients():
    torch.manual_seed(0)
    model = NovelViewModel(TINY)
    for parameter in model.parameters():  # wake the zero-initialised layers
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    source = torch.rand(2, 3, 32, 32) * 2 - 1
    a, b = labels((0, 0), (10, 0)), labels((40, 10), (-50, -5))
    first, second = model(source, a, b), model(source, a, b)
    assert first.shape == (2, 3, 32, 32) and torch.equal(first, second)
    first.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        alone = model.eval()(source[1:], a[1:], b[1:])
    torch.testing.assert_close(alone[0], first[1].detach().clamp(-1, 1), atol=2e-5, rtol=0)


def test_learns_a_parallax_it_cannot_copy():
    """Overfits two coloured half-spheres seen from both sides far below the error of copying the source."""
    torch.manual_seed(0)
    poses, images = labels((-30, 0), (0, 0), (30, 0)), []
    for label in poses:
        origins, directions = rays(label[None], 32)
        b = (origins * directions).sum(-1)
        disc = b * b - (origins * origins).sum(-1) + 0.15**2  # a ball of radius 0.15 at the origin
        hit = origins + directions * (-b - disc.clamp(min=0).sqrt())[..., None]
        colour = torch.where(hit > 0, 0.8, -0.6)  # octants
        images.append(torch.where(disc[..., None] > 0, colour, torch.tensor(-0.2)).reshape(32, 32, 3).permute(2, 0, 1))
    images = torch.stack(images)
    source, target = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 2, 0, 2, 0, 1])
    copying = F.mse_loss(images[source], images[target])
    model = NovelViewModel(TINY)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.mse_loss(model(images[source], poses[source], poses[target]), images[target])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * copying


def test_cpu_preset_keeps_its_budget():
    from torch.utils.flop_counter import FlopCounterMode

    cfg = NovelViewConfig()
    model = NovelViewModel(cfg).eval()
    assert sum(p.numel() for p in model.parameters()) * 2 < 8e6  # bytes in float16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert model(torch.zeros(1, 3, 128, 128), labels((0, 0)), labels((20, 0))).shape == (1, 3, 128, 128)
    assert counter.get_total_flops() < 1.3e9


def test_config():
    for cfg in (NovelViewConfig(), TINY):
        assert NovelViewConfig.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(ValueError, match="volume_depth"):
        NovelViewConfig.from_dict({"volume_depth": 3})
    with pytest.raises(ValueError, match="power of two"):
        NovelViewConfig(image_size=96)
    model = NovelViewModel(TINY)
    with pytest.raises(ValueError, match="32, 32"):
        model(torch.zeros(1, 3, 64, 64), labels((0, 0)), labels((0, 0)))
    with pytest.raises(ValueError, match="a source and a target label per image"):
        model(torch.zeros(2, 3, 32, 32), labels((0, 0)), labels((0, 0)))
