"""Previews while the views are made: a mosaic of views; the host previews only the first one."""

from __future__ import annotations

import math

import comfy.utils
import latent_preview
from PIL import Image
from torch import Tensor

SHOWN = 64  # views in one preview, in 8 rows: of more the host's preview size leaves too little of each


def spread(views: int) -> list[int]:
    """At most SHOWN view numbers, evenly spread from the first to the last."""
    if views <= SHOWN:
        return list(range(views))
    return [round(index * (views - 1) / (SHOWN - 1)) for index in range(SHOWN)]


def mosaic(previewer, x0: Tensor) -> Image.Image:
    """Previews of the latents x0 [V, C, h, w] in rows, by the host's previewer for one latent."""
    tiles = [previewer.decode_latent_to_preview(x0[view : view + 1]) for view in spread(x0.shape[0])]
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    width, height = tiles[0].size
    out = Image.new("RGB", (columns * width, rows * height))
    for index, tile in enumerate(tiles):
        out.paste(tile, (index % columns * width, index // columns * height))
    return out


def views_callback(model, steps: int):
    """Sampler callback (step, x0, x, steps): the host's progress bar, with a mosaic if previews are on."""
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    bar = comfy.utils.ProgressBar(steps)

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        preview = ("JPEG", mosaic(previewer, x0), latent_preview.MAX_PREVIEW_RESOLUTION) if previewer else None
        bar.update_absolute(step + 1, total, preview)

    return callback
