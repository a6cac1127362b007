"""Masks of portraits: which way round they are. Load Image gives 1 - alpha, so a cut-out's mask is white where it is
transparent; nodes that read a mask mean the person by white."""

from __future__ import annotations

import torch
from torch import Tensor

WHITE = ("auto", "read", "background")
ALIKE = 0.02  # mean difference up to which two masks are one, resized or saved in 8 bits
PLAIN = 0.1  # how far from black or white a part of a mask is on average, to count as such


def white_where_read(masks: Tensor, images: Tensor, white: str) -> tuple[Tensor, list[int]]:
    """The masks with white where tokens are read, and the numbers (from 1) of those found to be inverted.

    Args:
        masks: [1 or R, H, W] in [0, 1]. images: the portraits [R, H, W, C]; of four channels, the last is alpha.
        white: what white means in the masks: "read", "background", or "auto", which looks at every mask.
    """
    masks = masks.reshape(-1, *masks.shape[-2:]).float()
    if white == "read":
        return masks, []
    if white == "background":
        return 1.0 - masks, []
    alphas = images[..., 3] if images.shape[-1] == 4 else [None] * len(images)
    backgrounds = [shows_background(mask, alphas[min(i, len(alphas) - 1)]) for i, mask in enumerate(masks)]
    turned = torch.tensor(backgrounds, device=masks.device)[:, None, None]
    return torch.where(turned, 1.0 - masks, masks), [i for i, found in enumerate(backgrounds, 1) if found]


def shows_background(mask: Tensor, alpha: Tensor | None = None) -> bool:
    """Whether a mask [H, W] of a portrait is white on the background.

    A portrait's alpha [h, w] decides if the mask is it, or the rest of it. Otherwise: a person is in the middle, so
    a mask that is black there and white in both upper corners shows the background.
    """
    height, width = mask.shape
    if alpha is not None and alpha.shape == mask.shape and alpha.amin() < 1.0:
        if (mask - (1.0 - alpha)).abs().mean() < ALIKE:
            return True
        if (mask - alpha).abs().mean() < ALIKE:
            return False
    rows, columns = max(1, height // 8), max(1, width // 8)
    corners = torch.stack([mask[:rows, :columns].mean(), mask[:rows, -columns:].mean()])
    middle = mask[height // 3 : height - height // 3, width // 3 : width - width // 3]
    return bool(corners.amin() > 1.0 - PLAIN) and bool(middle.mean() < PLAIN)
