"""The operators of a step without the Python around them: what would be left if that cost nothing?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def clock() -> float:
    """Seconds: of this process on a CPU, else with the GPU's work finished."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class OperatorTape(TorchFunctionMode):
    """Keeps the calls of torch that give tensors, with all of their arguments, while `recording`."""

    def __init__(self):
        super().__init__()
        self.recording = False
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.recording and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self.calls.append((func, args, kwargs or {}))
        return out

    def play(self) -> float:
        """Makes the calls again, one right after the other, and gives the seconds that they take."""
        begin = clock()
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)
        return clock() - begin
