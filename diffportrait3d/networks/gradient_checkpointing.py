"""Gradient checkpointing: blocks whose inner activations are computed anew in the backward pass instead of kept.

It changes neither results nor gradients; a step takes about a third more work and several times less memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """A block that may be run twice. Subclasses implement `compute`; callers use the module as any other.

    Attributes:
        checkpointing: run `compute` again in the backward pass, where there is one.
    """

    checkpointing = False

    def compute(self, *inputs: Any, **_: Any) -> Any:
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Any:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.compute(*inputs)
        return checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)


def set_checkpointing(network: nn.Module, on: bool = True) -> int:
    """Switches it in every block of `network`; returns the number of blocks."""
    blocks = [module for module in network.modules() if isinstance(module, Checkpointed)]
    for block in blocks:
        block.checkpointing = on
    return len(blocks)
