"""The processes of one run, by accelerate: a single one, or those that `accelerate launch` has started, with DDP.

A batch is divided among the processes, so `loop.batch_size` means the same on any number of them: the gradient of a
step is that of the joint batch.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

TIMEOUT = timedelta(hours=12)  # the other processes wait while the first one encodes the latents


class Call(nn.Module):
    """Runs anything as the forward pass of a module that owns the trained network, as DDP requires."""

    def __init__(self, trained: nn.Module):
        super().__init__()
        self.trained = trained

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def init(device: torch.device) -> Accelerator:
    """This process among those of its run; its `device` is where this one computes.

    Raises:
        ValueError: they were launched for another kind of parallel training than DDP.
    """
    if device.index is not None:
        torch.cuda.set_device(device)
    handlers = [
        InitProcessGroupKwargs(timeout=TIMEOUT),
        # Some layers take no part in a step: those behind F_ref's last tokens, and the middle view module.
        DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
    ]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=handlers)
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(f"{kind.value} is not supported, only DDP: see training/configs/paper_6xa100/ddp.yaml.")
    return accelerator


def shard(batch: Any, accelerator: Accelerator) -> tuple[Any, float]:
    """This process's part of a batch, and the factor that makes the mean over processes that of the whole batch.

    Raises:
        DataError: there are more processes than samples.
    """
    part = batch.part(accelerator.process_index, accelerator.num_processes)
    return part, len(part) * accelerator.num_processes / len(batch)
