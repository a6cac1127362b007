"""Optimizer and learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import OptimizerConfig

BETA1 = 0.9


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Learning rate of the 0-based `step` at `progress` in [0, 1] of the run."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress, floor = min(1.0, progress), config.final_lr_ratio
    factor = {
        "constant": 1.0,
        "linear": 1.0 - (1.0 - floor) * progress,
        "cosine": floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.decay]
    return config.lr * warmup * factor


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, with states in 32 or 8 bits.

    Raises:
        ValueError: 8 bits without bitsandbytes.
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": (BETA1, config.beta2), "weight_decay": config.weight_decay}
    if config.name == "adamw":
        cuda = parameters[0].device.type == "cuda"
        if cuda:  # a recorded step reads its rate on the device
            settings |= {"lr": torch.tensor(config.lr, device=parameters[0].device), "capturable": True}
        # One kernel for many weights, without copies of them; on CPUs it rounds otherwise than the plain one.
        return torch.optim.AdamW(parameters, fused=cuda, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer.name=adamw8bit needs bitsandbytes: pip install bitsandbytes, or use optimizer.name=adamw."
        ) from error
    return AdamW8bit(parameters, **settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load states that may be of another device: how the optimizer works is this one's own."""
    saved = state["param_groups"]
    own = [{**group, "params": old["params"]} for group, old in zip(optimizer.param_groups, saved, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": own})


def state_bytes(config: OptimizerConfig, parameters: list[nn.Parameter]) -> int:
    """What the optimizer keeps in memory for these parameters, in bytes."""
    if config.name != "adamw8bit":
        return sum(8 * p.numel() for p in parameters)
    # bitsandbytes keeps small tensors in 32 bits, and for the others a float per block of 256 values.
    return sum(8 * p.numel() if p.numel() < 4096 else 2 * p.numel() + 8 * (p.numel() // 256) for p in parameters)
