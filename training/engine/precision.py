"""What a step in bfloat16 spares against autocast alone.

Autocast copies every layer's weights by a kernel of its own, and their gradients back, and on GPUs takes each norm, and
what follows it until the next convolution or product, to float32 and back. Here all weights are cast at once, and a
norm computes in the type of its weights (inside of its kernel in float32).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .config import StageConfig
from .cost import NORMS


class _Cast(torch.autograd.Function):
    """Tensors in another type; their gradients come back in their own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight that took no part has no gradient
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return tuple(_copies(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        own = _copies([gradients[index] for index in there], [ctx.dtypes[index] for index in there])
        found = dict(zip(there, own, strict=True))
        return None, *(found.get(index) for index in range(len(gradients)))


def _copies(tensors: Any, dtypes: list[torch.dtype]) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def cast_weights(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All parameters of a network in `dtype`, by their names; gradients reach the parameters themselves."""
    names, weights = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, _Cast.apply(dtype, *weights), strict=True))


def casts_once(config: StageConfig, dtype: torch.dtype, processes: int) -> bool:
    """Whether a run takes this way: in bfloat16, where nothing reads the weights after the passes."""
    return config.loop.cast_once and dtype == torch.bfloat16 and processes == 1 and not config.loop.checkpointing


def norms_in_type_of_weights(network: nn.Module) -> None:
    """Takes a network's norms out of autocast."""
    for layer in network.modules():
        if isinstance(layer, NORMS):
            layer.forward = functools.partial(_norm, layer)


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return type(layer).forward(layer, x.to(layer.weight.dtype))
