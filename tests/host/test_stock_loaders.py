"""The ordinary way in: the host's own loaders, with files as they lie on everybody's disk. The checkpoint is of SD1.5's
family and 320 channels wide, with two levels instead of four, and has random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffportrait3d.networks import UNetConfig
from diffportrait3d.weights.files import save_network
from diffportrait3d.weights.text_encoder import TextEncoderSizes
from evaluation.goldens.core import NETWORKS

CONFIG = UNetConfig(model_channels=320, channel_mult=(1, 1), num_res_blocks=1, attention_levels=(0,), max_views=6)
NAME = "stock.safetensors"
VIEWS = 2


def random_network(kind: str) -> torch.nn.Module:
    network = NETWORKS[kind](CONFIG)
    for parameter in network.parameters():
        if not parameter.any():  # the method begins with zeros that hide what is behind them
            torch.nn.init.normal_(parameter, std=0.05)
    return network


def text_encoder() -> dict[str, torch.Tensor]:
    """CLIP at its fixed size: twelve layers that change nothing around random words."""
    shapes = TextEncoderSizes().shapes()
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name.endswith("token_embedding.weight"):
            tensor.copy_(torch.randn(tensor.shape))
        elif name.endswith("final_layer_norm.weight"):
            tensor.fill_(1.0)
    return tensors


def lora() -> dict[str, torch.Tensor]:
    layer = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_v"
    return {f"{layer}.lora_up.weight": torch.randn(320, 4), f"{layer}.lora_down.weight": torch.randn(4, 320)}


@pytest.fixture(scope="module", autouse=True)
def files(host, pack, stock_autoencoder):
    """One file for every loader, in the host's folders."""
    models, portrait = Path(host.folder_paths.models_dir), Path(host.folder_paths.get_input_directory()) / "stock.png"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = {name: tensor.half() for name, tensor in random_network("unet").state_dict().items()}
        vae = stock_autoencoder()
        checkpoint = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
        checkpoint |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()} | text_encoder()
        stock = {"checkpoints": checkpoint, "diffusion_models": unet, "vae": vae, "loras": lora()}
        for folder, tensors in stock.items():
            (models / folder).mkdir(exist_ok=True)
            save_file(tensors, models / folder / NAME)
        ours = {
            "controlnet": "view_controlnet",
            "diffportrait3d/reference": "reference_encoder",
            "diffportrait3d/views": "view_consistency",
        }
        for folder, kind in ours.items():
            save_network(models / folder / NAME, random_network(kind), kind, torch.float16)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(portrait)
    yield
    for folder in (*stock, "controlnet"):
        (models / folder / NAME).unlink()
    for folder in ("reference", "views"):
        shutil.rmtree(models / "diffportrait3d" / folder)
    portrait.unlink()


def node(kind: str, /, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(**changes) -> dict:
    """Two views with a LoRA, two texts, portrait, cameras and start views; `changes` replaces nodes."""
    nodes = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=NAME),
        "unet": node("CheckpointLoaderSimple", ckpt_name=NAME),
        "lora": node(
            "LoraLoader",
            model=["unet", 0],
            clip=["checkpoint", 1],
            lora_name=NAME,
            strength_model=0.5,
            strength_clip=0.5,
        ),
        "vae": node("VAELoader", vae_name=NAME),
        "control": node("ControlNetLoader", control_net_name=NAME),
        "encoder": node("DP3D_LoadReferenceEncoder", name=f"reference/{NAME}"),
        "views": node("DP3D_LoadViewConsistency", name=f"views/{NAME}"),
        "positive": node("CLIPTextEncode", clip=["lora", 1], text="an oil painting"),
        "negative": node("CLIPTextEncode", clip=["lora", 1], text="a photograph"),
        "portrait": node("LoadImage", image="stock.png"),
        "path": node(
            "DP3D_CameraTrajectory",
            kind="arc",
            views=VIEWS,
            yaw_min=-30.0,
            yaw_max=30.0,
            pitch_min=0.0,
            pitch_max=0.0,
            roll=0.0,
            radius=2.7,
            fov=13.37,
        ),
        "pictures": node("DP3D_RenderCameraConditions", cameras=["path", 0], resolution=64, subject=0),
        "reference": node(
            "DP3D_ApplyReferenceAttention",
            model=["lora", 0],
            reference_encoder=["encoder", 0],
            vae=["vae", 0],
            image=["portrait", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        ),
        "cameras": node(
            "DP3D_ViewControlNet",
            positive=["positive", 0],
            control_net=["control", 0],
            image=["pictures", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        ),
        "noise": node(
            "DP3D_3DAwareNoise", vae=["vae", 0], cameras=["path", 0], proxies=["pictures", 0], resolution=64, seed=0
        ),
        "sampler": node(
            "DP3D_ViewConsistencySampler",
            model=["reference", 0],
            positive=["cameras", 0],
            negative=["negative", 0],
            latent=["noise", 0],
            noise=["noise", 1],
            view_consistency=["views", 0],
            cfg=3.0,
            preset="custom",
            steps=2,
            eta=0.5,
            start="t=999",
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "shown": node("PreviewImage", images=["decode", 0]),
    }
    return nodes | changes


@pytest.fixture(scope="module")
def views(host):
    """views(**changes of the graph): latents of the sampler; nodes that did not change are not run again."""
    executor = host.new_executor()

    def run(**changes):
        values = host.run_workflow(graph(**changes), executor).values
        assert values["decode"][0].shape == (VIEWS, 64, 64, 3) and torch.isfinite(values["decode"][0]).all()
        return values["sampler"][0]["samples"]

    return run


def difference(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_everything_from_stock_loaders(views):
    """Each way to load the same file gives the same views, bit for bit; and everything loaded has its effect."""
    stock = views()
    assert torch.equal(views(unet=node("UNETLoader", unet_name=NAME, weight_dtype="default")), stock)
    assert torch.equal(views(control=node("DP3D_LoadViewControlNet", name=NAME)), stock)
    without = {
        "LoRA": graph()["lora"] | {"inputs": graph()["lora"]["inputs"] | {"strength_model": 0.0}},
        "reference": graph()["reference"] | {"inputs": graph()["reference"]["inputs"] | {"strength": 0.0}},
        "cameras": graph()["cameras"] | {"inputs": graph()["cameras"]["inputs"] | {"strength": 0.0}},
        "text": node("CLIPTextEncode", clip=["lora", 1], text="a marble statue"),
    }
    for part, name in (("LoRA", "lora"), ("reference", "reference"), ("cameras", "cameras"), ("text", "positive")):
        assert difference(views(**{name: without[part]}), stock) > 1e-4, part
    assert torch.equal(views(), stock), "and back again"
