"""Network files: round trip, shards, atomicity, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from diffportrait3d.networks import AutoencoderConfig, AutoencoderKL, UNet, UNetConfig
from diffportrait3d.weights.files import CheckpointError, load_network, network_files, read_metadata, save_network

TINY = AutoencoderConfig(ch=32, ch_mult=(1, 1), patch_size=2)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(TINY)


def test_round_trip_keeps_tensors_config_and_metadata(tmp_path, autoencoder):
    save_network(tmp_path / "vae.safetensors", autoencoder, "autoencoder", training={"steps": 3})
    loaded, metadata = load_network(tmp_path / "vae.safetensors", expect="autoencoder")
    assert loaded.config == TINY and metadata["training"] == {"steps": 3}
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in autoencoder.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_shards_hold_the_same_network(tmp_path, autoencoder):
    limit = 200_000
    files = save_network(tmp_path / "vae.safetensors", autoencoder, "autoencoder", torch.float16, limit)
    assert len(files) > 2 and all(f.stat().st_size < limit + 20_000 for f in files)
    loaded, _ = load_network(files[1])  # any part names the network
    state = loaded.state_dict()
    assert all(torch.equal(t.half().float(), state[n]) for n, t in autoencoder.state_dict().items())


def test_saving_again_leaves_no_stale_shards(tmp_path, autoencoder):
    path = tmp_path / "vae.safetensors"
    save_network(path, autoencoder, "autoencoder", max_shard_bytes=200_000)
    assert network_files(save_network(path, autoencoder, "autoencoder")[0]) == [path]
    assert [p.name for p in tmp_path.iterdir()] == ["vae.safetensors"]


def test_a_missing_part_is_named(tmp_path, autoencoder):
    files = save_network(tmp_path / "vae.safetensors", autoencoder, "autoencoder", max_shard_bytes=200_000)
    files[0].unlink()
    with pytest.raises(CheckpointError, match=f"{len(files) - 1} of the {len(files)} parts"):
        load_network(tmp_path / "vae.safetensors")


def test_failed_write_keeps_the_old_file(tmp_path, autoencoder, monkeypatch):
    path = tmp_path / "vae.safetensors"
    save_network(path, autoencoder, "autoencoder")
    before = path.read_bytes()

    def interrupted(*tensor):  # the header is written by then
        raise KeyboardInterrupt

    monkeypatch.setattr("diffportrait3d.weights.safetensors_writer._bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_network(path, autoencoder, "autoencoder")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.safetensors"):
        load_network(tmp_path / "nothing.safetensors")


def test_truncated_file(tmp_path, autoencoder):
    path = tmp_path / "vae.safetensors"
    save_network(path, autoencoder, "autoencoder")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_network(path)


def test_foreign_safetensors(tmp_path):
    save_file({"lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="not written by DiffPortrait3D"):
        read_metadata(tmp_path / "lora.safetensors")


def test_another_kind(tmp_path, autoencoder):
    save_network(tmp_path / "vae.safetensors", autoencoder, "autoencoder")
    with pytest.raises(CheckpointError, match="holds autoencoder weights, but base UNet weights are needed"):
        load_network(tmp_path / "vae.safetensors", expect="unet")


def test_config_rejects_unknown_names_and_widths():
    with pytest.raises(ValueError, match="no setting named depth"):
        UNetConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="multiple of 32"):
        UNet(UNetConfig(model_channels=48))
