"""What a step costs: operations, bytes that they move, FLOPs; counted as they are called, on any device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count


# torch counts the attention kernels of GPUs only.
@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def operator_flops(function: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of one call of an ATen operator; 0 for those that torch has no formula for."""
    formula = flop_registry.get(function.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


class Cost(NamedTuple):
    """Of one step: calls of ATen operations that are no views, bytes that these read and write (a cache may spare
    some), and FLOPs (a multiplication and an addition are two)."""

    operators: int
    bytes: int
    flops: int


class CostMode(TorchDispatchMode):
    """Counts while it is active.

    (torch's `FlopCounterMode` puts hooks on every module's inputs, which keep recomputed activations alive.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.moved = self.flops = 0

    def cost(self) -> Cost:
        return Cost(self.operators, self.moved, self.flops)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.flops += operator_flops(function, args, kwargs, out)
        if not function.is_view:
            self.operators += 1
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in tensors)
        return out
