"""Previews while the views are made: a mosaic of the views of all windows; the host shows the first view alone."""

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
    return [round(place * (views - 1) / (SHOWN - 1)) for place in range(SHOWN)]


def mosaic(previewer, x0: Tensor) -> Image.Image:
    """Previews of the latents x0 [V, C, h, w] in rows, by the host's previewer for one latent."""
    pictures = [previewer.decode_latent_to_preview(x0[view : view + 1]) for view in spread(x0.shape[0])]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    out = Image.new("RGB", (columns * width, rows * height))
    for place, picture in enumerate(pictures):
        out.paste(picture, (place % columns * width, place // columns * height))
    return out


def views_callback(model, steps: int):
    """Sampler callback (step, x0, x, steps): the host's progress bar, with a mosaic if previews are on."""
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    bar = comfy.utils.ProgressBar(steps)

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        picture = ("JPEG", mosaic(previewer, x0), latent_preview.MAX_PREVIEW_RESOLUTION) if previewer else None
        bar.update_absolute(step + 1, total, picture)

    return callback
