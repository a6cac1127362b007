"""Image and camera errors. Images are [V, 3, H, W] in [0, 1]; every function returns one number per view [V]."""

from __future__ import annotations

import torch
from kornia.metrics import ssim as ssim_map
from torch import Tensor

from diffportrait3d.cameras.labels import split_label


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, peak 1, mean square over pixels and channels."""
    return -10 * torch.log10((images - truth).square().mean(dim=(1, 2, 3)).clamp(min=1e-12))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, K = (.01, .03), valid
    positions only, mean over the three colour channels."""
    return ssim_map(images, truth, window_size=11, max_val=1.0, padding="valid").mean(dim=(1, 2, 3))


def masked_l1(images: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over the pixels of mask [V, H, W] (bool) and the channels; NaN where a mask is empty."""
    weight = mask[:, None].to(images.dtype)  # [V, 1, H, W]
    error = ((images - truth).abs() * weight).sum(dim=(1, 2, 3))
    return error / (3 * weight.sum(dim=(1, 2, 3)))


def viewing_directions(labels: Tensor) -> Tensor:
    """Unit vectors [..., 3] from the scene towards the cameras of labels [..., 25], in world axes."""
    return -split_label(labels)[0][..., :3, 2]


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """Degrees between unit vectors [..., 3]; exact for small angles too."""
    cross = torch.linalg.cross(first.double(), second.double()).norm(dim=-1)
    return torch.rad2deg(torch.atan2(cross, (first.double() * second.double()).sum(-1))).to(first.dtype)


def yaw_pitch(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Unit viewing directions [..., 3] -> yaw (positive towards world +x) and pitch (positive up), degrees."""
    yaw = torch.atan2(directions[..., 0], directions[..., 2])
    return torch.rad2deg(yaw), torch.rad2deg(torch.asin(directions[..., 1].clamp(-1, 1)))
