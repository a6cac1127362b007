"""The preview shows the views side by side, each as the host would show it alone."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def previews(pack):
    return pack.patches.previews


@pytest.fixture(scope="module")
def previewer(previews, host):
    factors = host.comfy.latent_formats.SD15().latent_rgb_factors
    return previews.latent_preview.Latent2RGBPreviewer(factors)


@pytest.mark.parametrize(("views", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (16, 4, 4), (40, 4, 4)])
def test_every_cell_is_one_view(previews, previewer, views, columns, rows):
    x0 = torch.randn(views, 4, 8, 6, generator=torch.Generator().manual_seed(views))
    picture = previews.mosaic(previewer, x0)
    assert picture.size == (columns * 6, rows * 8)
    for place, view in enumerate(previews.spread(views)):
        left, top = place % columns * 6, place // columns * 8
        alone = previewer.decode_latent_to_preview(x0[view : view + 1])
        assert picture.crop((left, top, left + 6, top + 8)).tobytes() == alone.tobytes()


def test_first_and_last_view_are_always_shown(previews):
    for views in (1, 2, 16, 17, 64, 512):
        shown = previews.spread(views)
        assert shown[0] == 0 and shown[-1] == views - 1 and shown == sorted(set(shown)) and len(shown) <= previews.SHOWN
