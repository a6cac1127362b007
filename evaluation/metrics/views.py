"""What is measured about the views of one subject whose exact geometry is known, by the miniature's own networks."""

from __future__ import annotations

from torch import Tensor

from diffportrait3d.cameras.labels import viewing_directions, yaw_pitch

from ..subjects.dataset import Subject
from .images import background_variation, leak, masked_l1, psnr, ssim
from .metric import Metric
from .pose import angle_between
from .reprojection import reprojection_error

METRICS = {
    "pose": Metric("pose error (deg)", 2),
    "yaw": Metric("yaw (deg)", 2),
    "pitch": Metric("pitch (deg)", 2),
    "psnr": Metric("PSNR (dB)", 2, more_is_better=True),
    "ssim": Metric("SSIM", 3, more_is_better=True),
    "foreground_l1": Metric("foreground L1", 4),
    "background_l1": Metric("background L1", 4),
    "reprojection": Metric("reprojection L1", 4),
}
ABLATION_METRICS = METRICS | {
    "mini_lpips": Metric("mini-LPIPS", 4),
    "far_mini_lpips": Metric("mini-LPIPS, far views", 4),
    "far_psnr": Metric("PSNR, far views (dB)", 2, more_is_better=True),
    "background_variation": Metric("background variation", 4),
    "change": Metric("change to full", 4),
    "leak": Metric("leak of the condition", 3),
}
QUALITY_METRICS = {name: ABLATION_METRICS[name] for name in ("pose", "mini_lpips", "psnr", "ssim", "reprojection")}
FAR_DEGREES = 40.0  # between the camera of a view and that of the first reference


def measure(images: Tensor, subject: Subject, seen: Tensor, pairs: list) -> dict[str, float]:
    """METRICS of one subject's views [V, 3, H, W] in [0, 1], averaged over the views; NaN where undefined.

    seen: directions that the pose regressor reads in them [V, 3].
    pairs: of `reprojection.reprojection_pairs`.
    """
    truth, asked = subject.images, viewing_directions(subject.labels)
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


def measure_variant(name: str, views: dict[str, Tensor], subject: Subject, distances: Tensor) -> dict[str, float]:
    """What ABLATION_METRICS have besides METRICS and mini_lpips, for one of the `views` of all variants.

    distances: mini-LPIPS of its views [V].
    """
    images, full, far = views[name], views["full"], far_views(subject)
    swapped = name == "swapped_condition"
    return {
        "far_mini_lpips": distances[far].mean().item(),
        "far_psnr": psnr(images, subject.images)[far].mean().item(),
        "background_variation": background_variation(images, subject.images, subject.mask),
        "change": (images - full).abs().mean().item(),
        "leak": leak(full, images, subject.conditions, subject.other_conditions) if swapped else float("nan"),
    }


def far_views(subject: Subject) -> Tensor:
    """Which views [V] (bool) are far from the first reference."""
    first = viewing_directions(subject.reference_label[:1])
    return angle_between(viewing_directions(subject.labels), first.expand(len(subject.labels), 3)) > FAR_DEGREES
