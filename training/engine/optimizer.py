"""Optimizer, learning rate, and the scaling of gradients that half precision needs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import OptimizerConfig

BETAS = (0.9, 0.999)
# Below this the loss overflows whatever its scale: the run has diverged.
SMALLEST_SCALE = 1.0


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Learning rate of the 0-based ``step`` at ``progress`` in [0, 1] of the run."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = min(1.0, progress)
    floor = config.final_lr_ratio
    if config.decay == "constant":
        factor = 1.0
    elif config.decay == "linear":
        factor = 1.0 - (1.0 - floor) * progress
    else:  # cosine
        factor = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * warmup * factor


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter], sharded: bool) -> torch.optim.Optimizer:
    """AdamW, with states in 32 or 8 bits.

    Raises:
        ValueError: 8 bits without bitsandbytes, or 8 bits with FSDP.
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": BETAS, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        # On GPUs the default one makes a temporary copy of all weights.
        fused = {"fused": True} if parameters[0].device.type == "cuda" else {}
        return torch.optim.AdamW(parameters, **settings, **fused)
    if sharded:
        raise ValueError("optimizer.name=adamw8bit does not work with FSDP; use adamw, or DDP.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer.name=adamw8bit needs bitsandbytes: pip install bitsandbytes, or use optimizer.name=adamw."
        ) from error
    return AdamW8bit(parameters, **settings)


def state_bytes(config: OptimizerConfig, parameters: list[nn.Parameter]) -> int:
    """What the optimizer keeps in memory for these parameters, in bytes."""
    if config.name != "adamw8bit":
        return sum(8 * p.numel() for p in parameters)
    # bitsandbytes keeps small tensors in 32 bits, and for the others a float per block of 256 values.
    return sum(8 * p.numel() if p.numel() < 4096 else 2 * p.numel() + 8 * (p.numel() // 256) for p in parameters)


class Scaler:
    """Scales the loss in float16, where small gradients vanish; elsewhere it does nothing."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def accepts(self, norm: float) -> bool:
        """Whether training may go on after a gradient of this norm. float16 skips steps while it finds its scale."""
        return math.isfinite(norm) or (self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)
