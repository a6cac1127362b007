"""The analytic head inside the host: as condition images, and against the portrait, to find its camera by eye."""

from __future__ import annotations

from functools import lru_cache

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..diffportrait3d.cameras.labels import FOCAL, focal_from_fov, fov_from_focal, orbit_camera
from ..diffportrait3d.portraits.alignment import RENDERED, framed_labels
from ..diffportrait3d.synthetic_heads import Scene, portrait_scene, render_views
from .images import check_images, resize_images

BLENDED, BESIDE, ALL = "blended", "side by side", "all three"
LAYOUTS = (BLENDED, BESIDE, ALL)
FOV = round(fov_from_focal(FOCAL), 2)  # 13.37 degrees in EG3D


def render_conditions(labels: Tensor, resolution: int, subject: int, framing: str = RENDERED) -> Tensor:
    """IMAGE [V, resolution, resolution, 3] of invented person `subject` from cameras [V, 25]: the images of
    `synthetic_heads.render_camera_images`, with the host's progress bar and its chance to interrupt. framing: how large
    the head is, see `portraits.alignment`."""
    scene, progress, images = _head(subject), comfy.utils.ProgressBar(len(labels)), []
    for label in framed_labels(labels, framing):
        comfy.model_management.throw_exception_if_processing_interrupted()
        images.append(render_views(scene, label[None], resolution).image)  # [1, 3, H, W]
        progress.update(1)
    return torch.cat(images).movedim(1, -1).contiguous()


def exact_fov(fov: float) -> float:
    """The widgets' rounded default means EG3D's field of view to the last digit."""
    return fov_from_focal(FOCAL) if fov == FOV else fov


def reference_camera(yaw: float, pitch: float, roll: float, distance: float, fov: float) -> Tensor:
    """Label [25] from the numbers of Reference View (degrees, world units)."""
    return orbit_camera(yaw, pitch, roll, distance, focal_from_fov(exact_fov(fov)))


def compare_with_head(portrait: Tensor, label: Tensor, layout: str, opacity: float, size: int) -> Tensor:
    """IMAGE [1, size, W, 3] of the portrait and the analytic head at camera `label` [25].

    layout: "blended" lays the head over the portrait (`opacity` 0..1 of the head, none of its background); "side by
    side" puts the portrait left of the head; "all three" puts the blended image between them.

    Raises:
        ValueError: the portrait is not one finite image, or an unknown layout.
    """
    check_images(portrait, "Reference View", "portrait")
    if len(portrait) != 1:
        raise ValueError(f"Reference View takes one portrait, got {len(portrait)} images; choose one of them.")
    if layout not in LAYOUTS:
        raise ValueError(f"Reference View shows {', '.join(LAYOUTS)}, not {layout!r}.")
    photo = resize_images(portrait[..., :3].cpu(), size, size)  # [1, S, S, 3]
    view = render_views(_head(0), label[None], size)
    head = view.image.movedim(1, -1)  # [1, S, S, 3]
    blended = torch.lerp(photo, head, opacity * view.mask[..., None].to(photo))
    return torch.cat({BLENDED: [blended], BESIDE: [photo, head], ALL: [photo, blended, head]}[layout], dim=2)


@lru_cache(maxsize=2)
def _head(subject: int) -> Scene:
    """Invented person `subject`, 0 for comparisons with a portrait: about 3 MB each that are kept, as the same head is
    seen again and again from other cameras."""
    return portrait_scene(subject)
