"""Portraits for reference attention: as images or as latents, at the size of the views, with masks."""

from __future__ import annotations

import comfy.utils
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..host.images import check_images, resize_images
from ..host.loading import check_vae
from ..host.masks import white_where_read


class References:
    """References of one person, and the part of each that may be read.

    Args:
        mask: [1 or R, H, W] in [0, 1], 1 where tokens are read; None reads everything.

    Raises:
        ValueError: no reference, or a mask of another count, with NaN, or empty for one of the references.
    """

    def __init__(self, count: int, mask: Tensor | None):
        if count < 1:
            raise ValueError("Reference attention needs at least one reference image, got an empty batch.")
        self.count = count
        self.mask = None if mask is None else _checked_mask(mask, count)

    def __len__(self) -> int:
        return self.count

    def encode(self, height: int, width: int) -> Tensor:
        """Latents [R, 4, height, width], not scaled."""
        raise NotImplementedError

    def mask_at(self, height: int, width: int) -> Tensor | None:
        """The mask cropped as the references are, [R, 1, height, width]."""
        if self.mask is None:
            return None
        shape = self._reference_shape()
        mask = self.mask if self.mask.shape[-2:] == shape else interpolate(self.mask, shape, mode="bilinear")
        return comfy.utils.common_upscale(mask, width, height, "area", "center")

    def _reference_shape(self) -> tuple[int, int]:
        raise NotImplementedError


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


class ReferenceLatents(References):
    """References given as latents in the host's convention (not scaled) [R, 4, h, w]."""

    def __init__(self, samples: Tensor, mask: Tensor | None = None):
        super().__init__(samples.shape[0], mask)
        self.samples = samples

    def encode(self, height: int, width: int) -> Tensor:
        """Latents [R, 4, height, width]; those of another size are resampled."""
        if self.samples.shape[-2:] == (height, width):
            return self.samples
        return comfy.utils.common_upscale(self.samples, width, height, "bicubic", "center")

    def _reference_shape(self) -> tuple[int, int]:
        return tuple(self.samples.shape[-2:])


class ReferenceImages(References):
    """References given as images [R, H, W, 3] in [0, 1], encoded at the size of the views once that is known.

    Args:
        white: what white means in the mask, see `masks.white_where_read`. `turned` then says which masks, from 1, were
            found to show the background and were turned round.

    Raises:
        ValueError: see `References`; images with NaN, or a VAE of another family than SD1.5's.
    """

    def __init__(self, vae, images: Tensor, mask: Tensor | None = None, white: str = "read"):
        self.turned: list[int] = []
        if mask is not None and len(images):
            mask, self.turned = white_where_read(mask, images, white)
        super().__init__(images.shape[0], mask)
        check_images(images, "Reference attention", "image")
        check_vae(vae, "Reference attention")
        self.vae, self.images = vae, images[..., :3]
        self._encoded: dict[tuple[int, int], Tensor] = {}

    def encode(self, height: int, width: int) -> Tensor:
        """Latents [R, 4, height, width] of the images, cropped to the views' aspect and resized."""
        if (height, width) not in self._encoded:
            scale = self.vae.spacial_compression_encode()
            pixels = resize_images(self.images, height * scale, width * scale)
            self._encoded = {(height, width): self.vae.encode(pixels)}
        return self._encoded[height, width]

    def _reference_shape(self) -> tuple[int, int]:
        return tuple(self.images.shape[1:3])
