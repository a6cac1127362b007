"""Which colours an autoencoder's latents stand for: the fit, and the command that writes it into a file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffportrait3d.networks import AutoencoderConfig, AutoencoderKL, UNet, UNetConfig
from diffportrait3d.weights.files import load_network, read_metadata, read_tensors, save_network
from training.autoencoder import well_started
from training.latent_colours import fit_latent_colours, main, shown_colours


@pytest.fixture
def file(tmp_path):
    """An autoencoder that carries colours without any training, in half precision."""
    torch.manual_seed(0)
    path = tmp_path / "autoencoder.safetensors"
    facts = {"image_size": 32, "training": {"steps": 3}}
    save_network(path, well_started(AutoencoderKL(AutoencoderConfig(ch=32))), "autoencoder", torch.float16, **facts)
    return path


@pytest.mark.parametrize("channels", [4, 3])
def test_a_linear_map_is_found_again(channels):
    generator = torch.Generator().manual_seed(channels)
    latents = torch.randn(5, channels, 6, 4, generator=generator)
    factors = torch.randn(channels, 3, generator=generator).mul(100).round() / 400
    bias = torch.tensor([0.1, -0.2, 0.05])
    cells = (latents.movedim(1, -1) @ factors + bias).movedim(-1, 1)  # [5, 3, 6, 4]
    images = F.interpolate(cells, scale_factor=8)
    found = fit_latent_colours(latents, images)
    assert torch.allclose(torch.tensor(found["factors"]), factors, atol=1e-4)
    assert torch.allclose(torch.tensor(found["bias"]), bias, atol=1e-4)
    assert torch.allclose(shown_colours(latents, found), cells.clamp(-1, 1), atol=1e-2)


def test_the_command_adds_colours_and_changes_nothing_else(file, tmp_path, capsys):
    out = tmp_path / "new" / "autoencoder.safetensors"
    assert main([str(file), "--out", str(out), "--people", "2"]) == 0
    assert "of 255" in capsys.readouterr().out
    before, after = read_tensors(file), read_tensors(out)
    assert list(before) == list(after)
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    metadata = read_metadata(out)
    colours = metadata.pop("latent_rgb")
    assert metadata == read_metadata(file)
    autoencoder, _ = load_network(out)
    images = F.interpolate(torch.tensor([[0.6, 0.1, -0.4], [-0.5, -0.5, 0.3]])[..., None, None], size=32)
    seen = shown_colours(autoencoder.encode(images), colours)
    assert (seen.mean((2, 3)) - images.mean((2, 3))).abs().max() < 0.25


def test_it_may_write_in_place_and_again(file):
    for _ in range(2):
        assert main([str(file), "--out", str(file), "--people", "1"]) == 0
    assert set(read_metadata(file)["latent_rgb"]) == {"factors", "bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.safetensors"], "There is no file gone.safetensors"),
        (["{file}", "--people", "0"], "--people must be at least 1, not 0"),
        (["{unet}"], "holds base UNet weights, but autoencoder weights are needed"),
        (["{file}", "--ict", "gone.npz"], "gone.npz"),
    ],
)
def test_errors_are_one_sentence(file, tmp_path, capsys, arguments, message):
    unet = tmp_path / "unet.safetensors"
    save_network(unet, UNet(UNetConfig(model_channels=32, context_dim=32)), "unet")
    given = [argument.format(file=file, unet=unet) for argument in arguments]
    assert main([*given, "--out", str(tmp_path / "out.safetensors")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
