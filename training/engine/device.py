"""Where a run computes and how precisely."""

from __future__ import annotations

import torch

from .config import LoopConfig


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and on CPUs with AMX tiles, else float32."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, name)


def prepare(config: LoopConfig) -> torch.device:
    """Set threads and the seed; returns the device. Call it before the networks are built."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True  # shapes are the same in every step
    return pick_device(config.device)
