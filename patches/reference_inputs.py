"""Portraits for reference attention, encoded at the size of the views, with masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import comfy.utils
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..host.compatibility import check_vae
from ..host.images import check_images, resize_images
from ..host.masks import white_where_read


class References:
    """References of one person, and the part of each that may be read.

    Args:
        count: number R of references.
        size: their height and width, to which masks are brought before they are cropped as the references are.
        encode: (height, width) -> latents [R, 4, height, width], not scaled, cropped to that aspect.
        mask: [1 or R, H, W] in [0, 1], 1 where tokens are read; None reads everything.

    Raises:
        ValueError: no reference, or a mask of another count, with NaN, or empty for one of the references.
    """

    def __init__(
        self, count: int, size: tuple[int, int], encode: Callable[[int, int], Tensor], mask: Tensor | None = None
    ):
        if count < 1:
            raise ValueError("Reference attention needs at least one reference image, got an empty batch.")
        self.count, self.size = count, size
        self.encode = lru_cache(maxsize=1)(encode)  # the latents of the last size are kept
        self.mask = None if mask is None else _checked_mask(mask, count)

    def mask_at(self, height: int, width: int) -> Tensor | None:
        """The mask cropped as the references are, [R, 1, height, width]."""
        if self.mask is None:
            return None
        mask = self.mask if self.mask.shape[-2:] == self.size else interpolate(self.mask, self.size, mode="bilinear")
        return comfy.utils.common_upscale(mask, width, height, "area", "center")


def _checked_mask(mask: Tensor, count: int) -> Tensor:
    """[1 or R, H, W] -> [R, 1, H, W]"""
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    if len(mask) not in (1, count):
        raise ValueError(f"{len(mask)} reference masks for {count} references; give one for all or one for each.")
    if not torch.isfinite(mask).all():
        raise ValueError("The reference mask contains NaN or infinity; check the node it comes from.")
    for number, one in enumerate(mask, 1):
        if one.max() <= 0.0:
            raise ValueError(
                f"Reference mask {number} of {len(mask)} is empty: no part of the portrait may be read; paint what "
                "to read, or leave the mask out."
            )
    return mask.clamp(0.0, 1.0)[:, None].expand(count, -1, -1, -1)


def image_references(
    vae, images: Tensor, mask: Tensor | None = None, white: str = "read"
) -> tuple[References, list[int]]:
    """References given as images [R, H, W, 3 or 4] in [0, 1], and the numbers (from 1) of inverted masks.

    Args:
        white: what white means in the mask, see `masks.white_where_read`, which may find that masks show the
            background: these are inverted.

    Raises:
        ValueError: see `References`; images with NaN, or a VAE of another family than SD1.5's.
    """
    inverted: list[int] = []
    if mask is not None and len(images):
        mask, inverted = white_where_read(mask, images, white)

    def encode(height: int, width: int) -> Tensor:
        scale = vae.spacial_compression_encode()
        return vae.encode(resize_images(images[..., :3], height * scale, width * scale))

    references = References(len(images), tuple(images.shape[1:3]), encode, mask)
    check_images(images[..., :3], "Reference attention", "image")
    check_vae(vae, "Reference attention")
    return references, inverted
