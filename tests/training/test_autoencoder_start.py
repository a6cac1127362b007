"""The small autoencoder's start values carry colour from end to end before anything is learned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffportrait3d.networks import AutoencoderConfig, AutoencoderKL
from training.autoencoder import well_started


@pytest.mark.parametrize("settings", [{}, {"ch_mult": (1, 2, 4), "patch_size": 2}])
def test_mean_colours_pass_from_end_to_end(settings):
    torch.manual_seed(0)
    autoencoder = well_started(AutoencoderKL(AutoencoderConfig(**settings)))
    images = F.interpolate(torch.rand(4, 3, 8, 8) * 2 - 1, size=64, mode="bilinear")
    images[0] = images[0].mean((1, 2), keepdim=True)  # an even area must keep its colour, too
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(images))
    seen, given = (F.avg_pool2d(x, 8).movedim(1, 0).flatten(1) for x in (decoded, images))
    for colour in range(3):
        assert torch.corrcoef(torch.stack([seen[colour], given[colour]]))[0, 1] > 0.95


def test_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match=r"growing ch_mult, not 1 and \[1, 1\]"):
        well_started(AutoencoderKL(AutoencoderConfig(ch_mult=(1, 1))))
