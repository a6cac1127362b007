"""What is measured about the views of one subject whose exact geometry is known, by the miniature's own judges."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffportrait3d.networks import AutoencoderKL

from ..pose_regressor import PoseRegressor
from ..subjects.dataset import Subject
from .metrics import angle_between, masked_l1, psnr, ssim, viewing_directions, yaw_pitch
from .reprojection import reprojection_error

# name -> (column title, digits)
METRICS = {
    "pose": ("pose error (deg)", 2),
    "yaw": ("yaw (deg)", 2),
    "pitch": ("pitch (deg)", 2),
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 3),
    "foreground_l1": ("foreground L1", 4),
    "background_l1": ("background L1", 4),
    "reprojection": ("reprojection L1", 4),
}
ABLATION_METRICS = METRICS | {
    "mini_lpips": ("mini-LPIPS", 4),
    "far_mini_lpips": ("mini-LPIPS, far views", 4),
    "far_psnr": ("PSNR, far views (dB)", 2),
    "background_variation": ("background variation", 4),
    "change": ("change to full", 4),
    "leak": ("leak of the condition", 3),
}
QUALITY_METRICS = {name: ABLATION_METRICS[name] for name in ("pose", "mini_lpips", "psnr", "ssim", "reprojection")}
MORE_IS_BETTER = {"psnr", "ssim", "far_psnr"}
FAR_DEGREES = 40.0  # between the camera of a view and that of the first reference


def measure(images: Tensor, subject: Subject, regressor: PoseRegressor, pairs: list) -> dict[str, float]:
    """METRICS of one subject's views [V, 3, H, W] in [0, 1], averaged over the views; NaN where undefined."""
    truth, asked = subject.images, viewing_directions(subject.labels)
    seen = regressor.predict(images * 2 - 1)
    (yaw, pitch), (asked_yaw, asked_pitch) = yaw_pitch(seen), yaw_pitch(asked)
    return {
        "pose": angle_between(seen, asked).mean().item(),
        "yaw": (yaw - asked_yaw).abs().mean().item(),
        "pitch": (pitch - asked_pitch).abs().mean().item(),
        "psnr": psnr(images, truth).mean().item(),
        "ssim": ssim(images, truth).mean().item(),
        "foreground_l1": masked_l1(images, truth, subject.mask).nanmean().item(),
        "background_l1": masked_l1(images, truth, ~subject.mask).nanmean().item(),
        "reprojection": reprojection_error(images, pairs),
    }


def far_views(subject: Subject) -> Tensor:
    """Which views [V] (bool) are far from the first reference."""
    first = viewing_directions(subject.reference_label[:1])
    return angle_between(viewing_directions(subject.labels), first.expand(len(subject.labels), 3)) > FAR_DEGREES


@torch.inference_mode()
def mini_lpips(images: Tensor, truth: Tensor, autoencoder: AutoencoderKL) -> Tensor:
    """Perceptual distance [V] in the manner of LPIPS, seen by the miniature's own autoencoder: NOT LPIPS.

    Squared distance of channel-normalised features of every level of its encoder, averaged over pixels and summed
    over levels. Images [V, 3, H, W] in [0, 1], on the autoencoder's device.
    """
    levels = zip(*(autoencoder.encoder.features(pictures * 2 - 1) for pictures in (images, truth)), strict=True)
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in levels)


def background_variation(images: Tensor, truth: Tensor, mask: Tensor) -> float:
    """How much the background's error changes from view to view (figure 5): its mean colour's standard deviation over
    the views, averaged over channels. mask [V, H, W] is the foreground; NaN with fewer than two views."""
    outside = (~mask)[:, None].to(images)  # [V, 1, H, W]
    error = ((images - truth) * outside).sum((2, 3)) / outside.sum((2, 3)).clamp(min=1)  # [V, 3]
    return error.std(0).mean().item() if len(images) > 1 else float("nan")


def leak(images: Tensor, others: Tensor, conditions: Tensor, other_conditions: Tensor) -> float:
    """The part of a change of I_cam's person that arrives in the views: 0 none, 1 all of it.

    Slope of the least-squares fit of (others - images) to (other_conditions - conditions), all [V, 3, H, W].
    """
    asked = other_conditions - conditions
    return ((others - images) * asked).sum().item() / asked.square().sum().clamp(min=1e-9).item()


def measure_arm(views: dict[str, Tensor], name: str, subject: Subject, system, regressor, pairs: list) -> dict:
    """ABLATION_METRICS of the arm `name` among the views of all arms; "full" must be one of them."""
    images, full, far = views[name], views["full"], far_views(subject)
    device = system.device
    perceptual = mini_lpips(images.to(device), subject.images.to(device), system.autoencoder).cpu()
    nothing = float("nan")
    swapped = name == "swapped_condition"
    return measure(images, subject, regressor, pairs) | {
        "mini_lpips": perceptual.mean().item(),
        "far_mini_lpips": perceptual[far].mean().item(),
        "far_psnr": psnr(images, subject.images)[far].mean().item(),
        "background_variation": background_variation(images, subject.images, subject.mask),
        "change": (images - full).abs().mean().item(),
        "leak": leak(full, images, subject.conditions, subject.other_conditions) if swapped else nothing,
    }
