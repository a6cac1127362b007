"""Errors of images. Images are [V, 3, H, W] in [0, 1]; what is said per view is [V]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kornia.metrics import ssim as ssim_map
from torch import Tensor

from diffportrait3d.networks import AutoencoderKL
from training.objectives.losses import psnr as peak_signal_to_noise

LARGEST_PSNR = 120.0  # dB, of images that are equal


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per view in dB, at most LARGEST_PSNR; mean square over pixels and channels."""
    return peak_signal_to_noise(images, truth, value_range=1.0).clamp(max=LARGEST_PSNR)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity per view (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, K = (.01, .03), valid
    positions only, mean over the three colour channels."""
    return ssim_map(images, truth, window_size=11, max_val=1.0, padding="valid").mean(dim=(1, 2, 3))


def masked_l1(images: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error per view over the pixels of mask [V, H, W] (bool) and the channels; NaN for empty masks."""
    weight = mask[:, None].to(images.dtype)  # [V, 1, H, W]
    error = ((images - truth).abs() * weight).sum(dim=(1, 2, 3))
    return error / (3 * weight.sum(dim=(1, 2, 3)))


def mini_lpips(images: Tensor, truth: Tensor, autoencoder: AutoencoderKL) -> Tensor:
    """Perceptual distance per view in the manner of LPIPS, by the miniature's own autoencoder: NOT LPIPS.

    Squared distance of channel-normalised features of every level of its encoder, averaged over pixels and summed
    over levels. Images on the autoencoder's device.
    """
    return feature_distance(unit_features(images, autoencoder), unit_features(truth, autoencoder))


@torch.inference_mode()
def unit_features(images: Tensor, autoencoder: AutoencoderKL) -> list[Tensor]:
    """What `mini_lpips` compares of images [N, 3, H, W]: [N, C, h, w] per level."""
    return [F.normalize(level, dim=1) for level in autoencoder.encoder.features(images * 2 - 1)]


@torch.inference_mode()
def feature_distance(features: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Of R rows of V views and of the true views: [R * V]."""
    rows = [level.unflatten(0, (-1, len(wanted))) for level, wanted in zip(features, truth, strict=True)]
    return sum((a - b).square().sum(2).mean((2, 3)) for a, b in zip(rows, truth, strict=True)).flatten()


def background_variation(images: Tensor, truth: Tensor, mask: Tensor) -> float:
    """How much the background's error changes from view to view (figure 5): its mean colour's standard deviation over
    the views, averaged over channels. mask [V, H, W] is the foreground; NaN with fewer than two views."""
    outside = (~mask)[:, None].to(images)  # [V, 1, H, W]
    error = ((images - truth) * outside).sum((2, 3)) / outside.sum((2, 3)).clamp(min=1)  # [V, 3]
    return error.std(0).mean().item() if len(images) > 1 else float("nan")


def leak(images: Tensor, others: Tensor, conditions: Tensor, other_conditions: Tensor) -> float:
    """The part of a change of the camera image's person that appears in the views: 0 none, 1 all of it.

    Slope of the least-squares fit of (others - images) to (other_conditions - conditions), all [V, 3, H, W].
    """
    asked = other_conditions - conditions
    return ((others - images) * asked).sum().item() / asked.square().sum().clamp(min=1e-9).item()
