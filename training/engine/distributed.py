"""The processes of one run: a single one, or those that `accelerate launch` has started, with DDP or FSDP.

A batch is shared out over the processes, so `loop.batch_size` means the same on any number of them: the gradient of a
step is that of the joint batch. One process needs neither the launcher nor accelerate.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffportrait3d.networks.cross_view_attention import CrossViewModule
from diffportrait3d.networks.layers import Attention, FeedForward, ResBlock
from diffportrait3d.networks.novel_view import ResidualBlock

# What FSDP gathers at a time. All of these are only ever run by calling them, which is when FSDP gathers them.
SHARDED_UNITS = (ResBlock, Attention, FeedForward, CrossViewModule, ResidualBlock)
# The other processes wait while the first one encodes the latents.
PATIENCE = timedelta(hours=12)


class Call(nn.Module):
    """Runs anything as the forward pass of a module that owns the trained network, as DDP and FSDP want it."""

    def __init__(self, trained: nn.Module):
        super().__init__()
        self.trained = trained

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class Processes:
    """This process among those of its run.

    Attributes:
        device: where this process computes.
        rank, count: its number from 0, and how many there are.
        sharded: FSDP: weights, gradients and optimizer states are spread over the processes.
    """

    def __init__(self, device: torch.device, accelerator: Any = None):
        self.device, self.accelerator = device, accelerator
        self.rank = accelerator.process_index if accelerator else 0
        self.count = accelerator.num_processes if accelerator else 1
        self.sharded = bool(accelerator) and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    @property
    def main(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process runs the body alone; the others then find the files that it has written."""
        with self.accelerator.main_process_first() if self.accelerator else contextlib.nullcontext():
            yield

    def wrap(self, trained: nn.Module) -> nn.Module:
        """`Call` around the trained network, with gradients averaged over the processes."""
        call = Call(trained)
        if self.sharded:
            return shard(call, self.device)
        return self.accelerator.prepare_model(call) if self.accelerator else call

    def share(self, batch: Any) -> tuple[Any, float]:
        """This process's part of a batch, and the factor that makes the mean over processes that of the whole batch.

        Raises:
            ValueError: there are more processes than samples.
        """
        if self.count == 1:
            return batch, 1.0
        part = batch.part(self.rank, self.count)
        return part, len(part) * self.count / len(batch)

    @contextlib.contextmanager
    def gradients(self, call: nn.Module, last: bool) -> Iterator[None]:
        """Around one backward pass of a step; DDP exchanges gradients after the last one only."""
        local = self.accelerator and not self.sharded and not last
        with call.no_sync() if local else contextlib.nullcontext():
            yield

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Averages over the processes."""
        if self.count == 1:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.accelerator.reduce(numbers, "mean").tolist(), strict=True))

    def agree(self, progress: float, stop: int | None) -> tuple[float, int | None]:
        """The first process's progress, and a signal that any process has received: all end at the same step."""
        if self.count == 1:
            return progress, stop
        mine = torch.tensor([progress if self.main else 0.0, 0.0], dtype=torch.float64, device=self.device)
        signals = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        signals[self.rank] = stop or 0
        progress, _, *received = self.accelerator.reduce(torch.cat([mine, signals]), "sum").tolist()
        return progress, int(max(received)) or None

    def gathered(self, value: Any) -> list[Any]:
        """Everyone's `value`, by rank."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        if self.accelerator:
            self.accelerator.wait_for_everyone()

    def leave(self) -> None:
        """Ends the communication; without it a launcher complains."""
        if self.accelerator:
            self.accelerator.end_training()


def join(device: str) -> Processes | None:
    """The processes that a launcher has started with this one; None if there was no launcher.

    Raises:
        ValueError: accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise ValueError("Training in several processes needs accelerate: pip install accelerate.") from error
    handlers = [
        InitProcessGroupKwargs(timeout=PATIENCE),
        # Some layers take no part in a step: those behind F_ref's last tokens, and the middle view module.
        DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
    ]
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=handlers)
    return Processes(accelerator.device, accelerator)


def shard(call: Call, device: torch.device) -> Call:
    """FSDP by torch's `fully_shard`. Units that are never called as modules stay with the root, which is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in reversed(list(call.modules())):
        if isinstance(module, SHARDED_UNITS):
            fully_shard(module, mesh=mesh)
    return fully_shard(call, mesh=mesh)


def whole(tree: Any) -> Any:
    """Sharded tensors in nested dicts and lists, put together; a collective operation. Others stay as they are."""
    return tree_map(lambda x: x.full_tensor() if _is_sharded(x) else x, tree)


def sharded_like(value: Tensor, reference: Tensor) -> Tensor:
    """`value` spread over the processes as `reference` is, where that has the same shape and is spread."""
    if not _is_sharded(reference) or value.shape != reference.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)


@torch.no_grad()
def put_together(call: Call) -> None:
    """Gives a sharded network plain parameters, for saving it. It cannot be trained or run any more."""
    for child in call.modules():
        if hasattr(child, "reshard"):  # after a forward pass the outermost weights are still gathered
            child.reshard()
        for name, p in child.named_parameters(recurse=False):
            if _is_sharded(p):
                child._parameters[name] = nn.Parameter(p.full_tensor(), requires_grad=False)


def _is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")
