"""The miniature's autoencoder as the host's VAE: any size, whole and in tiles."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.weights.files import load_network

SCALE = 0.18215


@pytest.fixture(scope="module")
def file(repository):
    return repository / "weights/miniature/autoencoder.safetensors"


@pytest.fixture(scope="module")
def vae(pack, file):
    return pack.host.loading.load_vae(file)


@pytest.fixture(scope="module")
def portrait(host, pack, repository):
    """IMAGE [1, H, W, 3]: the person that ships with the weights."""
    return pack.host.user_files.load_image(repository / "weights/miniature/portrait.png")


def resized(pack, image, height: int, width: int):
    return pack.host.images.resize_images(image, height, width)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 256), (192, 320)])
def test_as_the_core_at_any_size(pack, vae, file, portrait, height, width):
    core, _ = load_network(file)
    image = resized(pack, portrait, height, width)
    with torch.inference_mode():
        latents = core.encode(image.movedim(-1, 1) * 2 - 1)
        decoded = (core.decode(latents).clamp(-1, 1) + 1) / 2
    assert latents.shape == (1, 4, height // 8, width // 8)
    assert torch.allclose(SCALE * vae.encode(image), latents, atol=1e-4)
    assert torch.allclose(vae.decode(latents / SCALE), decoded.movedim(1, -1), atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(200, 200), (133, 250)])
def test_sides_that_are_no_multiple_of_a_cell_are_cropped(pack, vae, portrait, height, width):
    """As the host does it with every VAE."""
    image = resized(pack, portrait, height, width)
    decoded = vae.decode(vae.encode(image))
    assert decoded.shape == (1, height // 8 * 8, width // 8 * 8, 3)
    top, left = height % 8 // 2, width % 8 // 2
    cropped = image[:, top : top + decoded.shape[1], left : left + decoded.shape[2]]
    assert (decoded - cropped).abs().mean() < 0.03


def test_tiles_show_what_the_whole_shows(host, pack, vae, portrait):
    """The host's nodes with tiles smaller than the image, so that there are borders to see."""
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    image = resized(pack, portrait, 192, 192)
    with torch.inference_mode():  # as the host runs nodes; it adds up tiles in place
        [latent] = nodes["VAEEncodeTiled"]().encode(vae, image, 128, 32)
        [decoded] = nodes["VAEDecodeTiled"]().decode(vae, latent, 128, 32)
    assert latent["samples"].shape == (1, 4, 24, 24)
    assert (latent["samples"] - vae.encode(image)).abs().mean() < 0.1 * latent["samples"].abs().mean()
    assert decoded.shape == image.shape
    assert (decoded - image).abs().mean() < 0.03
