"""The preview shows the views side by side, each as the host would show it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def previews(pack):
    return pack.patches.previews


@pytest.fixture(scope="module")
def previewer(previews, host):
    factors = host.comfy.latent_formats.SD15().latent_rgb_factors
    return previews.latent_preview.Latent2RGBPreviewer(factors)


@pytest.mark.parametrize(
    ("views", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (16, 4, 4), (40, 7, 6), (90, 8, 8)]
)
def test_every_cell_is_one_view(previews, previewer, views, columns, rows):
    x0 = torch.randn(views, 4, 8, 6, generator=torch.Generator().manual_seed(views))
    picture = previews.mosaic(previewer, x0)
    assert picture.size == (columns * 6, rows * 8)
    for place, view in enumerate(previews.spread(views)):
        left, top = place % columns * 6, place // columns * 8
        alone = previewer.decode_latent_to_preview(x0[view : view + 1])
        assert picture.crop((left, top, left + 6, top + 8)).tobytes() == alone.tobytes()


def test_first_and_last_view_are_always_shown(previews):
    for views in (1, 2, 16, 17, 64, 65, 512):
        shown = previews.spread(views)
        assert shown[0] == 0 and shown[-1] == views - 1 and shown == sorted(set(shown)) and len(shown) <= previews.SHOWN


@pytest.fixture(scope="module")
def miniature(host, pack):
    """(MODEL, VAE, portrait) of the miniature that ships, from its node."""
    model, vae, _, portrait = host.nodes.NODE_CLASS_MAPPINGS["DP3D_LoadMiniature"].execute("miniature").args
    return model, vae, portrait


def seen(previews, latent_format, samples):
    """What the host's own previewer shows of latents [1, 4, h, w] as they come out of a sampler: [h, w, 3] of 255."""
    previewer = previews.latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    )
    return torch.from_numpy(np.asarray(previewer.decode_latent_to_preview(latent_format.process_in(samples))).copy())


def test_miniature_is_shown_in_its_own_colours(host, previews, miniature):
    """Its latents are others than SD1.5's, whose map to colours makes neon of them."""
    model, vae, portrait = miniature
    samples = vae.encode(portrait)
    cells = F.adaptive_avg_pool2d(portrait.movedim(-1, 1), samples.shape[-2:])[0].movedim(0, -1) * 255
    own, stock = model.model.latent_format, host.comfy.latent_formats.SD15()
    errors = [(seen(previews, each, samples) - cells).abs().mean().item() for each in (own, stock)]
    assert errors[0] < 8 and errors[1] > 40, errors
    assert own.taesd_decoder_name is None and stock.taesd_decoder_name is not None


def test_copies_of_the_miniature_keep_its_colours(host, miniature):
    """The host's second copy and clones do; models of SD1.5 loaded beside it are shown as before."""
    model = miniature[0]
    factors = model.model.latent_format.latent_rgb_factors
    again = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
    assert again.model.latent_format.latent_rgb_factors == model.clone().model.latent_format.latent_rgb_factors
    assert again.model.latent_format.latent_rgb_factors == factors != host.comfy.latent_formats.SD15.latent_rgb_factors


def test_files_without_colours_are_shown_as_sd15(host, pack, write_networks, tmp_path):
    write_networks(tmp_path)
    model = pack.host.loading.load_model(tmp_path / "unet.safetensors", tmp_path / "autoencoder.safetensors")
    stock = host.comfy.latent_formats.SD15()
    assert model.model.latent_format.latent_rgb_factors == stock.latent_rgb_factors
    assert model.model.latent_format.taesd_decoder_name == stock.taesd_decoder_name
