"""A rendered dataset that needs no renderer: a ball in eight colours, exact in every number; a tiny system."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.labels import orbit_camera, split_label
from diffportrait3d.networks import (
    AutoencoderConfig,
    AutoencoderKL,
    CrossViewAttention,
    NovelViewConfig,
    NovelViewModel,
    ReferenceEncoder,
    UNet,
    UNetConfig,
    ViewControlNet,
)
from diffportrait3d.weights.files import save_network
from evaluation.metrics.pose import PoseRegressor, save_pose_regressor

RADIUS, CENTRE = 0.18, torch.tensor([0.0, 0.0, 0.2])


def ball(label: torch.Tensor, size: int, colours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture [3, H, W] in [0, 1] and camera depth [H, W] (0 = background) of a ball whose octants are coloured."""
    pose, intrinsics = split_label(label)
    axis = (torch.arange(size) + 0.5) / size
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    rays = torch.stack([(u - 0.5) / intrinsics[0, 0], (v - 0.5) / intrinsics[1, 1], torch.ones_like(u)], dim=-1)
    rays = rays @ pose[:3, :3].T  # camera depth 1
    offset = pose[:3, 3] - CENTRE
    a, b, c = (rays * rays).sum(-1), (rays * offset).sum(-1), (offset * offset).sum() - RADIUS**2
    root = b * b - a * c
    depth = (-b - root.clamp(min=0).sqrt()) / a
    octant = ((offset + rays * depth[..., None] > 0) * torch.tensor([1, 2, 4])).sum(-1)
    image = torch.where(root[..., None] > 0, colours[octant], torch.tensor(0.4))
    return image.permute(2, 0, 1), torch.where(root > 0, depth, torch.zeros_like(depth))


@pytest.fixture(scope="session")
def ball_dataset(tmp_path_factory) -> Path:
    """Three subjects to train on and three to test on, five views each, 64 px."""
    root, size, lines = tmp_path_factory.mktemp("balls"), 64, []
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 3), ("test", 3)):
        for index in range(count):
            name = f"ball-{split}-{index}"
            folder = root / split / name
            folder.mkdir(parents=True)
            colours, other = torch.rand(2, 8, 3, generator=generator)
            yaw, pitch = (torch.rand(2, 5, generator=generator) - 0.5) * torch.tensor([[60.0], [20.0]])
            views = []
            for k, label in enumerate(orbit_camera(yaw, pitch)):
                (image, depth), (condition, _) = ball(label, size, colours), ball(label, size, other)
                for file, picture in ((f"{k:02d}.png", image), (f"{k:02d}_condition.png", condition)):
                    pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
                    Image.fromarray(pixels).save(folder / file)
                np.savez(folder / f"{k:02d}_depth.npz", depth=depth.numpy().astype(np.float16), mask=depth.numpy() > 0)
                names = {"image": f"{k:02d}.png", "condition": f"{k:02d}_condition.png", "depth": f"{k:02d}_depth.npz"}
                paths = {key: f"{split}/{name}/{file}" for key, file in names.items()}
                views.append({**paths, "condition_subject": "ball-other", "label": label.tolist()})
            lines.append({"id": name, "split": split, "provider": "ball", "seed": index, "views": views})
    header = {"format": "diffportrait3d-multiview", "version": 1, "resolution": size}
    (root / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in [header, *lines]) + "\n")
    return root


def wake(module: torch.nn.Module) -> torch.nn.Module:
    """Zero-initialised layers get values, so that every part of the system changes the pictures."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A tiny untrained system, every part of which changes the pictures."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    cfg = UNetConfig(model_channels=32, context_dim=8, channel_mult=(1, 1), num_res_blocks=1, attention_levels=(0, 1))
    for kind, network in (("unet", UNet), ("reference_encoder", ReferenceEncoder), ("view_controlnet", ViewControlNet),
                          ("view_consistency", CrossViewAttention)):  # fmt: skip
        save_network(folder / f"{kind}.safetensors", wake(network(cfg)), kind, linear_end=0.00489)
    autoencoder = AutoencoderKL(AutoencoderConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1))
    save_network(folder / "autoencoder.safetensors", wake(autoencoder), "autoencoder")
    small = NovelViewConfig(image_size=64, render_size=16, base_channels=8, feature_channels=6, volume_size=8,
                            volume_channels=4, prior_channels=2, samples_per_ray=8)  # fmt: skip
    save_network(folder / "novel_view.safetensors", wake(NovelViewModel(small)), "novel_view")
    save_pose_regressor(folder / "pose_regressor.safetensors", PoseRegressor(8))
    return folder
