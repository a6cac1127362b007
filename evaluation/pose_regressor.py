"""Trains the small network that reads a camera's direction from an image of a head, to measure camera control.

    python -m evaluation.pose_regressor --data DIR --out weights/miniature/pose_regressor.safetensors

It is trained on the TRAINING identities of a rendered dataset and scored on its held-out renders, whose error is the
floor below which errors of generated views mean nothing. Generated views are blurrier and off in colour, so training
images are blurred, recoloured, shifted, covered in part and noised.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffportrait3d.cameras.labels import viewing_directions
from diffportrait3d.command import run_main
from training.dataset.images import MultiViewDataset, SingleImages, pick, pick_labels

from .metrics.pose import INPUT_SIZE, PoseRegressor, angle_between, save_pose_regressor
from .studies.command import run_command
from .tables.bootstrap import bootstrap_mean


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """What may happen to generated images [N, 3, H, W] in [-1, 1] without their cameras changing."""
    n, size = images.shape[0], images.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *(shape or (1, 1, 1)), generator=generator) * (high - low) + low

    coarse = F.interpolate(images, size=int(torch.randint(size // 4, size, (), generator=generator)), mode="area")
    blurred = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    images = torch.lerp(images, blurred, (uniform(-0.5, 1.5)).clamp(0, 1))
    images = images * uniform(0.7, 1.3, 3, 1, 1) + uniform(-0.25, 0.25, 3, 1, 1)
    theta = torch.eye(2, 3).repeat(n, 1, 1)
    theta[:, :, 2] = uniform(-0.03, 0.03, 2)
    theta[:, :, :2] *= uniform(0.97, 1.03, 1, 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    axis = torch.arange(size) / size
    left, top, side = uniform(-0.2, 1, 1), uniform(-0.2, 1, 1), uniform(0, 0.35, 1)
    columns, rows = (axis > left) & (axis < left + side), (axis > top) & (axis < top + side)  # [N, S]
    hole = (rows[:, :, None] & columns[:, None, :])[:, None] & (uniform(0, 1) < 0.3)
    images = torch.where(hole, uniform(-1, 1, 3, 1, 1), images)
    return images + torch.randn(images.shape, generator=generator) * uniform(0, 0.12)


def train(dataset: MultiViewDataset, options: argparse.Namespace) -> PoseRegressor:
    """AdamW with warm-up and cosine decay, for a time or for a number of steps (then deterministic)."""
    torch.manual_seed(options.seed)
    model, generator = PoseRegressor(options.width), torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batches, start, progress, step = SingleImages(dataset, options.batch_size, options.seed), time.monotonic(), 0.0, 0
    small = F.interpolate(dataset.images.float(), size=INPUT_SIZE, mode="area").round().to(torch.uint8)
    bar = tqdm(total=100, desc="pose regressor", unit="%", mininterval=2)
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * progress))
        batch = next(batches)
        images = augment(pick(small, batch.targets, batch.flips), generator)
        truth = viewing_directions(pick_labels(dataset.labels, batch.targets, batch.flips))
        loss = F.smooth_l1_loss(model.raw(images), truth, beta=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress = step / options.steps if options.steps else (time.monotonic() - start) / (60 * options.minutes)
        bar.n = min(100, round(100 * progress))
        bar.set_postfix_str(f"step {step}, loss {loss.item():.5f}", refresh=False)
        bar.update(0)
    bar.close()
    return model.eval().requires_grad_(False)


def floor(model: PoseRegressor, dataset: MultiViewDataset) -> np.ndarray:
    """Mean error in degrees per identity on real renders [identities]."""
    directions = torch.cat([model.predict(rows.float() / 127.5 - 1) for rows in dataset.images.split(256)])
    errors = angle_between(directions, viewing_directions(dataset.labels)).numpy()
    return np.array([errors[rows].mean() for rows in dataset.subjects])


def run(options: argparse.Namespace) -> None:
    dataset, held_out = MultiViewDataset(options.data, "train"), MultiViewDataset(options.data, "test")
    model = train(dataset, options)
    errors = {"train": bootstrap_mean(floor(model, dataset)), "test": bootstrap_mean(floor(model, held_out))}
    facts = {f"{split}_error_degrees": list(interval) for split, interval in errors.items()}
    save_pose_regressor(options.out, model, data_fingerprint=dataset.fingerprint, seed=options.seed, **facts)
    for split, interval in errors.items():
        print(f"{split}: {interval} degrees over {interval.count} identities")
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.pose_regressor", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="dataset folder written by training.render")
    parser.add_argument("--out", required=True, type=Path, help="where the .safetensors file goes")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time (default %(default)s)")
    parser.add_argument("--steps", type=int, help="train for exactly so many steps instead (repeatable to the bit)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=24, help="channels of the first layer, a multiple of 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return run_command(run, parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
