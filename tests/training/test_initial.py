"""Stages start from other people's files: SD1.5 checkpoints, ControlNets, AnimateDiff; the empty prompt."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from diffportrait3d.networks import (
    AutoencoderConfig,
    AutoencoderKL,
    CrossViewAttention,
    ReferenceEncoder,
    UNet,
    UNetConfig,
    ViewControlNet,
)
from diffportrait3d.weights.checkpoints import open_checkpoint
from diffportrait3d.weights.files import CheckpointError, save_network
from diffportrait3d.weights.text_encoder import encode_empty_prompt
from training.engine.inputs import InputNetworks, empty_prompt, load_input

WIDTH = UNetConfig(model_channels=32, context_dim=64)
VAE = AutoencoderConfig(ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=2, patch_size=1, norm_groups=32)
TEXT = "cond_stage_model.transformer.text_model."
TOKENS, LENGTH = 40, 7


def text_encoder() -> dict[str, torch.Tensor]:
    """A CLIP text transformer of two layers, 64 wide, under SD1.5's names."""
    width, out = 64, {}
    out["embeddings.token_embedding.weight"] = torch.randn(TOKENS, width)
    out["embeddings.position_embedding.weight"] = torch.randn(LENGTH, width)
    for layer in range(2):
        stem = f"encoder.layers.{layer}."
        linear = [(f"self_attn.{n}_proj", width, width) for n in ("q", "k", "v", "out")]
        for name, rows, columns in [*linear, ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width)]:
            out[f"{stem}{name}.weight"], out[f"{stem}{name}.bias"] = 0.1 * torch.randn(rows, columns), torch.randn(rows)
        for norm in ("layer_norm1", "layer_norm2"):
            out[f"{stem}{norm}.weight"], out[f"{stem}{norm}.bias"] = torch.rand(width), torch.randn(width)
    out["final_layer_norm.weight"], out["final_layer_norm.bias"] = torch.rand(width), torch.randn(width)
    return {TEXT + name: value for name, value in out.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Networks and the files that hold them in other people's layouts."""
    folder = tmp_path_factory.mktemp("others")
    torch.manual_seed(0)
    modules = {"unet": UNet(WIDTH), "autoencoder": AutoencoderKL(VAE), "view_controlnet": ViewControlNet(WIDTH)}
    state = {f"model.diffusion_model.{k}": v.half() for k, v in modules["unet"].state_dict().items()}
    for key, value in modules["autoencoder"].state_dict().items():
        linear = ".attn_1.q." in key and value.ndim == 4  # newer files keep these as linear layers
        state[f"first_stage_model.{key}"] = value[:, :, 0, 0] if linear else value
    state |= {"model_ema.decay": torch.zeros(1), **text_encoder()}
    control = {f"control_model.{k}": v for k, v in modules["view_controlnet"].state_dict().items()}
    names = ("sd.safetensors", "sd.ckpt", "cn.safetensors", "cn_bare.safetensors")
    files = {name: str(folder / name) for name in names}
    save_file(state, files["sd.safetensors"])
    torch.save({"state_dict": state, "global_step": 7}, files["sd.ckpt"])
    save_file(control, files["cn.safetensors"])
    save_file(modules["view_controlnet"].state_dict(), files["cn_bare.safetensors"])
    return modules, files


def same(module, original, half=False) -> bool:
    states = module.state_dict(), original.state_dict()
    return all(torch.equal(states[0][k], v.half().float() if half else v) for k, v in states[1].items())


@pytest.mark.parametrize("file", ["sd.safetensors", "sd.ckpt"])
def test_an_sd15_checkpoint_is_unet_and_autoencoder(made, file):
    modules, files = made
    unet, metadata = load_input(files[file], "unet")
    assert same(unet, modules["unet"], half=True) and metadata["initialised_from"] == file
    assert not any(p.requires_grad for p in unet.parameters())
    autoencoder, _ = load_input(files[file], "autoencoder")
    assert same(autoencoder, modules["autoencoder"]) and autoencoder.config.norm_groups == 32


@pytest.mark.parametrize("file", ["cn.safetensors", "cn_bare.safetensors"])
def test_a_controlnet_starts_the_view_controlnet(made, file):
    modules, files = made
    assert same(load_input(files[file], "view_controlnet")[0], modules["view_controlnet"])


def test_what_a_file_is_instead_and_what_it_lacks_is_named(made, tmp_path):
    _, files = made
    with pytest.raises(CheckpointError, match=r"inputs.unet: .*cn.safetensors is a ControlNet.*out\.2\.weight"):
        load_input(files["cn.safetensors"], "unet")
    with pytest.raises(CheckpointError, match="inputs.reference_encoder: .* not a reference encoder"):
        load_input(files["sd.safetensors"], "reference_encoder")
    state = UNet(WIDTH).state_dict()
    del state["middle_block.0.in_layers.0.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"1 keys of .*part.safetensors are missing, middle_block.0.in_layers.0"):
        load_input(str(tmp_path / "part.safetensors"), "unet")
    with pytest.raises(ValueError, match="inputs.unet=FILE"):
        load_input(None, "unet")
    with pytest.raises(CheckpointError, match="no file"):
        load_input(str(tmp_path / "nothing.safetensors"), "unet")


def test_the_converted_release_is_read_as_our_own(tmp_path):
    torch.manual_seed(1)
    encoder = ReferenceEncoder(WIDTH)
    save_network(tmp_path / "r.safetensors", encoder, "reference_encoder", reference_timestep="current")
    module, metadata = load_input(str(tmp_path / "r.safetensors"), "reference_encoder")
    assert same(module, encoder) and metadata["reference_timestep"] == "current"


def animatediff(middle: bool) -> dict[str, torch.Tensor]:
    """The layout of mm_sd_v15 (v1) or v2: two modules a level on the way down, three on the way up."""
    own = CrossViewAttention(WIDTH)
    stems = [("input_blocks_motion_module", "down", lv, i, 3 * lv + i) for lv in range(4) for i in range(2)]
    stems += [("output_blocks_motion_module", "up", lv, i, 3 * lv + i) for lv in range(4) for i in range(3)]
    state = own.state_dict()
    out = {}
    for side, name, level, index, place in stems:
        prefix = f"{side}.{place}.0."
        for key in (k for k in state if k.startswith(prefix)):
            stored = f"module.{name}_blocks.{level}.motion_modules.{index}.{key.removeprefix(prefix)}"
            shape = (1, 24, state[key].shape[2]) if key.endswith(".pe") else state[key].shape
            out[stored] = torch.randn(shape)
    if middle:
        prefix = "middle_block_motion_module.0."
        for key in (k for k in state if k.startswith(prefix)):
            out[f"module.mid_block.motion_modules.0.{key.removeprefix(prefix)}"] = torch.randn(state[key].shape)
    return out


@pytest.mark.parametrize("middle", [False, True])
def test_animatediff_starts_the_view_attention(tmp_path, capsys, middle):
    state = animatediff(middle)
    save_file(state, tmp_path / "mm.safetensors")
    module, _ = load_input(str(tmp_path / "mm.safetensors"), "view_consistency")
    own, tail = module.state_dict(), "temporal_transformer.proj_out.weight"
    for here, there in (("input_blocks_motion_module.4", "down_blocks.1.motion_modules.1"),
                        ("output_blocks_motion_module.11", "up_blocks.3.motion_modules.2")):  # fmt: skip
        assert torch.equal(own[f"{here}.0.{tail}"], state[f"module.{there}.{tail}"])
    assert not own[f"input_blocks_motion_module.2.0.{tail}"].any()  # after a Downsample
    assert not own[f"output_blocks_motion_module.2.1.{tail}"].any()  # the second after an Upsample
    assert own[f"middle_block_motion_module.0.{tail}"].any() == middle
    printed = capsys.readouterr().out
    assert f"{20 + middle} of 27 modules" in printed and "output_blocks_motion_module.8.1" in printed
    assert ("middle_block_motion_module.0" in printed) != middle


def test_an_incomplete_motion_module_is_named(tmp_path):
    state = animatediff(False)
    del state["module.up_blocks.2.motion_modules.1.temporal_transformer.norm.bias"]
    save_file(state, tmp_path / "mm.safetensors")
    with pytest.raises(CheckpointError, match="output_blocks_motion_module.7.0.temporal_transformer.norm.bias"):
        load_input(str(tmp_path / "mm.safetensors"), "view_consistency")


def test_the_empty_prompt_of_a_checkpoint(made):
    """Against the transformer written out: causal, pre-norm, quick GELU."""
    _, files = made
    got = encode_empty_prompt(open_checkpoint(files["sd.safetensors"]))
    w = {k.removeprefix(TEXT): v for k, v in text_encoder_of(files["sd.safetensors"]).items()}
    tokens = torch.tensor([TOKENS - 2] + [TOKENS - 1] * (LENGTH - 1))
    x = w["embeddings.token_embedding.weight"][tokens] + w["embeddings.position_embedding.weight"]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (64,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    for layer in range(2):
        stem = f"encoder.layers.{layer}."
        h = norm(x, f"{stem}layer_norm1")
        q, k, v = (linear(h, f"{stem}self_attn.{n}_proj") for n in "qkv")
        x = x + linear(torch.softmax(q @ k.T / 8 + mask, -1) @ v, f"{stem}self_attn.out_proj")
        h = linear(norm(x, f"{stem}layer_norm2"), f"{stem}mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{stem}mlp.fc2")
    assert got.shape == (1, LENGTH, 64)
    assert torch.allclose(got[0], norm(x, "final_layer_norm"), atol=1e-4)


def text_encoder_of(file):
    source = open_checkpoint(file)
    return {name: source.get(name) for name in source.entries if name.startswith(TEXT)}


def test_the_empty_prompt_from_a_file_or_not_at_all(made, networks, tmp_path):
    _, files = made
    save_file({"states": torch.ones(7, 64)}, tmp_path / "prompt.safetensors")
    assert torch.equal(empty_prompt(str(tmp_path / "prompt.safetensors"), None, 64), torch.ones(1, 7, 64))
    with pytest.raises(CheckpointError, match=r"reads \[1, tokens, 32\]"):
        empty_prompt(str(tmp_path / "prompt.safetensors"), None, 32)
    with pytest.raises(CheckpointError, match="inputs.context=FILE"):
        empty_prompt(None, files["cn.safetensors"], 64)
    assert torch.equal(empty_prompt(None, networks["unet"], 32), torch.zeros(1, 1, 32))  # trained here: knows no text


def test_networks_of_different_widths_are_refused(networks, dataset, tmp_path):
    from .conftest import stage_config

    save_network(tmp_path / "wide.safetensors", ReferenceEncoder(UNetConfig(model_channels=64)), "reference_encoder")
    others = {**networks, "reference_encoder": str(tmp_path / "wide.safetensors")}
    stage, config = stage_config("view_control", dataset, others, tmp_path)
    with pytest.raises(ValueError, match="inputs.reference_encoder is 64 channels wide"):
        stage(config, torch.device("cpu"), InputNetworks(config.inputs), 64)
