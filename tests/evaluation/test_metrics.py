"""Metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from diffportrait3d.cameras.labels import orbit_camera, viewing_directions, yaw_pitch
from evaluation.metrics.images import masked_l1, psnr, ssim
from evaluation.metrics.pose import angle_between


def test_psnr_by_hand():
    truth = torch.zeros(2, 3, 4, 4)
    images = truth.clone()
    images[0] += 0.1  # mean square 0.01: 20 dB
    images[1, 0, 0, 0] = 1.0  # mean square 1/48
    assert psnr(images, truth).tolist() == pytest.approx([20.0, 10 * math.log10(48)], abs=1e-4)


def test_masked_l1_counts_only_the_mask():
    truth = torch.zeros(2, 3, 4, 4)
    images = truth.clone()
    images[:, 0, 0, 0] = 0.6  # one channel of one pixel
    images[:, :, 3, 3] = 0.9  # outside the mask
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, :2] = True  # two pixels, six numbers
    error = masked_l1(images, truth, mask)
    assert error[0] == pytest.approx(0.1)
    assert torch.isnan(error[1])


def ssim_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 written out for one channel."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(values))


def test_ssim_by_loops():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 20, 17, generator=generator)
    images = (truth + 0.2 * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
    images[1] = truth[1]
    expected = np.mean([ssim_by_loops(images[0, c].double().numpy(), truth[0, c].double().numpy()) for c in range(3)])
    assert ssim(images, truth).tolist() == pytest.approx([expected, 1.0], abs=1e-4)
    assert expected < 0.95


def test_viewing_directions_are_the_cameras_angles():
    labels = orbit_camera([0.0, 30.0, -75.0], [0.0, 20.0, -10.0])
    directions = viewing_directions(labels)
    torch.testing.assert_close(directions[0], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6, rtol=0)
    assert directions[1, 0] > 0 and directions[1, 1] > 0  # seen from the right of the world and from above
    yaw, pitch = yaw_pitch(directions)
    assert yaw.tolist() == pytest.approx([0, 30, -75], abs=1e-3)
    assert pitch.tolist() == pytest.approx([0, 20, -10], abs=1e-3)


def test_angle_between():
    a = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    b = torch.tensor([[0.0, 0.0, 1.0], [0.0, math.sin(1e-4), math.cos(1e-4)], [-1.0, 0.0, 0.0]])
    assert angle_between(a, b).tolist() == pytest.approx([0, math.degrees(1e-4), 180], rel=1e-3, abs=1e-9)
