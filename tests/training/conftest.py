"""A multi-view dataset of four subjects, made of coloured blobs: enough for every stage at 64 px; and the stages.

What the tests share is here: pytest loads this module first, and test modules cannot import one another.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import miniature
from training.engine.config import load_config
from training.engine.device import prepare
from training.engine.distributed import init
from training.engine.loop import Trainer

RESOLUTION = 64
VIEWS = 9
TINY_UNET = {
    "model_channels": 32,
    "context_dim": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [0],
}
TINY_AUTOENCODER = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "patch_size": 4}
STAGES = {stage.name: stage for stage in miniature.STAGES}
# What happens to files: name -> what is left of the bytes.
DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
    "random bytes": lambda data: np.random.default_rng(0).bytes(len(data)),
    "random bytes inside": lambda data: data[: len(data) // 2] + b"\x93" * 64 + data[len(data) // 2 + 64 :],
}
DENOISING = ("base", "reference", "view_control", "view_consistency")


def label(yaw: float) -> list[float]:
    """EG3D label of a camera at ``yaw`` degrees, radius 2.7, looking at the origin."""
    a = math.radians(yaw)
    rotation = [[math.cos(a), 0, -math.sin(a)], [0, -1, 0], [-math.sin(a), 0, -math.cos(a)]]
    position = [2.7 * math.sin(a), 0.0, 2.7 * math.cos(a)]
    pose = [[*row, p] for row, p in zip(rotation, position, strict=True)] + [[0, 0, 0, 1]]
    return [float(v) for row in pose for v in row] + [4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1]


def blob(seed: int, yaw: float) -> Image.Image:
    """A ball with a nose whose place shows the yaw, on a coloured ground."""
    rng = np.random.default_rng(seed)
    ground, skin, nose = rng.random((3, 3))
    y, x = np.mgrid[0:RESOLUTION, 0:RESOLUTION] / RESOLUTION - 0.5
    image = np.broadcast_to(ground, (RESOLUTION, RESOLUTION, 3)).copy()
    image[x**2 + y**2 < 0.12] = skin
    image[(x - 0.3 * math.sin(math.radians(yaw))) ** 2 + y**2 < 0.01] = nose
    return Image.fromarray((255 * image).astype(np.uint8))


def write_dataset(root: Path, splits: tuple[str, ...] = ("train", "train", "train", "val")) -> Path:
    lines = [{"format": "diffportrait3d-multiview", "version": 1, "resolution": RESOLUTION}]
    for seed, split in enumerate(splits):
        folder = root / split / f"s{seed}"
        folder.mkdir(parents=True)
        views = []
        for k, yaw in enumerate(np.linspace(-60, 60, VIEWS)):
            names = {"image": f"{split}/s{seed}/{k:02d}.png", "condition": f"{split}/s{seed}/{k:02d}_condition.png"}
            blob(seed, yaw).save(root / names["image"])
            blob(100 + seed, yaw).save(root / names["condition"])
            views.append({**names, "condition_subject": f"c{seed}", "label": label(yaw)})
        lines.append({"id": f"s{seed}", "split": split, "provider": "analytic", "seed": seed, "views": views})
    (root / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("multiview"))


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> dict[str, str]:
    """Files of tiny untrained networks, named as a stage's ``inputs``; zero-initialised layers are given values."""
    from diffportrait3d.networks import (
        AutoencoderConfig,
        AutoencoderKL,
        ReferenceEncoder,
        UNet,
        UNetConfig,
        ViewControlNet,
    )
    from diffportrait3d.weights.files import save_network

    folder, torch_state = tmp_path_factory.mktemp("networks"), torch.get_rng_state()
    torch.manual_seed(0)
    config = UNetConfig.from_dict(TINY_UNET)
    modules = {
        "autoencoder": AutoencoderKL(AutoencoderConfig.from_dict(TINY_AUTOENCODER)),
        "unet": UNet(config),
        "reference_encoder": ReferenceEncoder(config),
        "view_controlnet": ViewControlNet(config),
    }
    files = {}
    for kind, module in modules.items():
        for p in module.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
        files[kind] = str(folder / f"{kind}.safetensors")
        save_network(files[kind], module, kind, linear_end=0.005)
    torch.set_rng_state(torch_state)
    return files


def stage_config(stage, dataset, networks, run_dir, *more):
    """(the stage's class, its settings) for two steps on the tiny networks."""
    values = settings_of(stage, dataset, networks, run_dir, *more)
    return STAGES[stage], load_config(STAGES[stage].config_class, None, values)


def settings_of(stage, dataset, networks, run_dir, *more) -> list[str]:
    """The same settings as words of a command line."""
    values = [f"run_dir={run_dir}", f"data.root={dataset}", "loop.steps=2", "loop.batch_size=2", "loop.log_every=1",
              "loop.checkpoint_every=1", "loop.device=cpu", "optimizer.warmup_steps=0"]  # fmt: skip
    if stage in DENOISING:
        values += ["ddim_steps=2", "validation_loss_samples=2", "validation_subjects=2"]
    if stage in (*DENOISING, "novel_view"):
        values += [f"inputs.{kind}={file}" for kind, file in networks.items() if kind != STAGES[stage].kind]
    if stage == "autoencoder":
        values += [f"network={json.dumps(TINY_AUTOENCODER)}", "validation_images=2", "statistics_images=4",
                   "crop=32"]  # fmt: skip
    if stage == "base":
        values += [f"network={json.dumps(TINY_UNET)}", "linear_end=0.005", "samples=2"]
    if stage == "view_consistency":
        values += ["views=4"]
    if stage == "novel_view":
        values += ["network={render_size: 16, base_channels: 16, volume_size: 8, samples_per_ray: 4}"]
    return [*values, *more]


def trainer_of(stage, dataset, networks, run_dir, *more) -> Trainer:
    """The trainer of a stage, ready for its first step."""
    stage_class, config = stage_config(stage, dataset, networks, run_dir, *more)
    device = prepare(config.loop)
    return Trainer(stage_class.build(config, device), config, init(device))


@pytest.fixture(autouse=True)
def few_threads():
    """Tiny tensors are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CountedBatch(list):
    """Numbers in place of a batch; nothing to divide."""

    def part(self, rank, count):
        return self


class Counting:
    """A sampler that only counts."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return CountedBatch([self.position])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
