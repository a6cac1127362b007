"""Batches of views: checks, sizes, and the order in which a turntable shows them."""

from __future__ import annotations

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor


def as_images(images: Tensor, where: str) -> Tensor:
    """float32 IMAGE [V, H, W, 3], or with alpha [V, H, W, 4], from [V, H, W, 1, 3 or 4]: grey is repeated to three.

    where: node and input, for the error.

    Raises:
        ValueError: another shape, or whole numbers.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{where} has shape {tuple(images.shape)}; an IMAGE is [images, height, width, channels] with 3 channels "
            "(1 if grey, 4 with alpha): convert it to RGB."
        )
    images = _as_pixels(images, where)
    return images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images


def as_masks(masks: Tensor, where: str) -> Tensor:
    """float32 MASK [V, H, W] from [H, W], [V, H, W], [V, 1, H, W] or [V, H, W, 1].

    Raises:
        ValueError: another shape, or whole numbers.
    """
    shape = tuple(masks.shape)
    if masks.ndim == 2:
        masks = masks[None]
    elif masks.ndim == 4:
        masks = masks[:, 0] if masks.shape[1] == 1 else masks[..., 0] if masks.shape[3] == 1 else masks
    if masks.ndim != 3:
        raise ValueError(f"{where} has shape {shape}; a MASK is [masks, height, width]: use Convert Image to Mask.")
    return _as_pixels(masks.float() if masks.dtype == torch.bool else masks, where)


def _as_pixels(values: Tensor, where: str) -> Tensor:
    """float32; raises ValueError for whole numbers, and for images or masks without a pixel."""
    if not values.is_floating_point():
        raise ValueError(f"{where} holds {values.dtype}; images and masks are numbers between 0 and 1: divide by 255.")
    if 0 in values.shape[1:3]:
        raise ValueError(f"{where} has shape {tuple(values.shape)}, without a pixel; check the node it comes from.")
    return values.float()


def check_images(images: Tensor, node: str, name: str = "images") -> None:
    """Raises ValueError for an empty batch, and for NaN or infinity."""
    if images.shape[0] == 0:
        raise ValueError(f"{node}: {name} is an empty batch; connect at least one image.")
    if not torch.isfinite(images).all():
        raise ValueError(f"{node}: {name} contains NaN or infinity; check the node it comes from.")


def check_one_camera_each(images: Tensor, labels: Tensor, node: str) -> None:
    """Raises ValueError unless there are as many cameras [V, 25] as images [V, H, W, C]."""
    if len(labels) != len(images):
        raise ValueError(f"{node} got {len(images)} images and {len(labels)} cameras; give one camera per image.")


def resize_images(images: Tensor, height: int, width: int) -> Tensor:
    """Images [N, H, W, 3] -> [N, height, width, 3]: centre crop to the aspect, then area (smaller) or bicubic."""
    if images.shape[1:3] == (height, width):
        return images
    method = "area" if min(images.shape[1], images.shape[2]) > min(height, width) else "bicubic"
    resized = comfy.utils.common_upscale(images.movedim(-1, 1), width, height, method, "center")
    return resized.movedim(1, -1).clamp(0.0, 1.0)


def turntable_frames(images: Tensor, ping_pong: bool, loops: int) -> Tensor:
    """Views [V, H, W, C] -> video frames [N, H', W', 3] with even sides, as video codecs need them; an odd side is
    lengthened by repeating its last row or column.

    ping_pong: forwards and backwards, without repeating either end; so the video loops without a jump.
    """
    check_images(images, "Turntable")
    frames = torch.cat([images, images[1:-1].flip(0)]) if ping_pong else images
    frames = frames[..., :3].repeat(loops, 1, 1, 1)
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    if odd_rows or odd_columns:
        frames = F.pad(frames.movedim(-1, 1), (0, odd_columns, 0, odd_rows), mode="replicate").movedim(1, -1)
    return frames
