"""Rehearses the use of the authors' checkpoint at full size, with known weights in its place.

    python -m tools.full_size_rehearsal WORK_FOLDER [--dtype fp16] [--stage build|convert|host]

Builds a pickle with all 2937 keys of the release (2871 M deterministic values; 11.5 GB in fp32, 5.7 GB in fp16),
converts it in a process of its own, and loads the results into the real ComfyUI for one guided step at 64 pixels.
Time and peak memory of every stage are printed. `--model-channels 64 --context-dim 96` rehearses the rehearsal.
"""
from __future__ import annotations

import argparse
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffportrait3d.conversion.layout import SCHEDULE, SD15_AUTOENCODER, TextEncoderSizes, release_shapes
from diffportrait3d.diffusion import Schedule
from diffportrait3d.networks import UNetConfig
from evaluation.golden_data import deterministic_tensor

CHECKPOINT = "rehearsal.th"
STAGES = ("build", "convert", "host")
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
REMAP_BYTES = 2**30


def release_weights(config: UNetConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Shapes of all keys of the release at a width, and the values of those that are no network's (the schedule)."""
    full_size = config == UNetConfig()
    width = config.context_dim
    text = TextEncoderSizes() if full_size else TextEncoderSizes(1000, width, 77, hidden=4 * width, layers=2)
    autoencoder = SD15_AUTOENCODER if full_size else replace(SD15_AUTOENCODER, ch=32, num_res_blocks=1)
    groups = release_shapes(config, autoencoder, text)
    shapes = {name: shape for names in groups.values() for name, shape in names.items()}
    return shapes, dict(zip(groups[SCHEDULE], schedule_buffers(), strict=True))


def schedule_buffers() -> Iterator[Tensor]:
    """The 13 tensors that latent diffusion keeps of its schedule, in the release's order, float64 [1000]."""
    betas = Schedule().betas.double()
    alphas = 1 - betas
    bar = torch.cumprod(alphas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = betas * (1 - previous) / (1 - bar)
    yield from (betas, bar, previous, bar.sqrt(), (1 - bar).sqrt())
    yield from ((1 - bar).log(), (1 / bar).sqrt(), (1 / bar - 1).sqrt())
    yield from (variance, variance.clamp(min=1e-20).log())
    yield from (betas * previous.sqrt() / (1 - bar), (1 - previous) * alphas.sqrt() / (1 - bar))
    yield torch.zeros_like(betas)


def build(path: Path, config: UNetConfig, dtype: torch.dtype) -> None:
    """Writes the checkpoint as `torch.save` does, a `state_dict` in a zip, with one tensor in memory at a time."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes, schedule = release_weights(config)
    values = sum(math.prod(shape) for shape in shapes.values())
    print(f"{path}: {len(shapes)} keys, {values / 1e6:.2f} M values, {values * dtype.itemsize / 1e9:.2f} GB")
    partial = path.with_suffix(".partial")
    with FakeTensorMode():
        outline = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):  # leaves room for the values
        torch.save({"state_dict": outline}, partial)
    tensors, filled = _mapped(partial), 0
    for name, shape in tqdm(shapes.items(), unit="tensor", desc="Building"):
        if filled > REMAP_BYTES:  # or all pages written so far would count as memory
            tensors, filled = _mapped(partial), 0
        tensors[name].copy_(schedule[name] if name in schedule else deterministic_tensor(name, shape))
        filled += tensors[name].nbytes
    del tensors
    os.replace(partial, path)


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, such that writing to them writes to the file."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]


def run(*command: str) -> None:
    """Runs a process to its end and prints its time and peak memory.

    Raises:
        SystemExit: it failed.
    """
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{command[0]}: {time.monotonic() - start:.0f} s, peak memory {peak / 1e9:.2f} GB (10^9 bytes)", flush=True)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with status {process.returncode}.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.full_size_rehearsal", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for checkpoint and results: 23 GB in fp32, 11.5 in fp16")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the checkpoint")
    parser.add_argument("--model-channels", type=int, default=UNetConfig.model_channels)
    parser.add_argument("--context-dim", type=int, default=UNetConfig.context_dim)
    parser.add_argument("--stage", choices=STAGES, help="only this one (default: all that is not done yet)")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given = parse_arguments()
    config = UNetConfig(model_channels=given.model_channels, context_dim=given.context_dim)
    checkpoint = given.folder / CHECKPOINT
    if given.in_process:
        if given.stage == "build":
            build(checkpoint, config, DTYPES[given.dtype])
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    for stage in [given.stage] if given.stage else STAGES:
        if stage == "convert":
            run("diffportrait3d.convert", str(checkpoint), "--out", str(given.folder / "converted"), "--verify")
        elif stage != "build" or given.stage or not checkpoint.exists():
            run("tools.full_size_rehearsal", *sys.argv[1:], "--stage", stage, "--in-process")
    return 0


if __name__ == "__main__":
    sys.exit(main())
