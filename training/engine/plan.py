"""What a stage would take: parameters, memory and FLOPs of a step, without allocating any of it.

The stage is built and runs one step on fake tensors, which have shapes and no values (torch's `FakeTensorMode`, on the
meta device). FLOPs are counted operation by operation; memory is followed as tensors come and go. What the CUDA kernels
need inside themselves, the allocator's waste and data kept on the device are not in it.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from diffportrait3d.networks import NETWORKS, UNetConfig, set_checkpointing
from diffportrait3d.networks.sizes import SD15_AUTOENCODER
from diffportrait3d.weights.checkpoints import open_checkpoint
from diffportrait3d.weights.files import holds_network, read_metadata
from diffportrait3d.weights.sd15 import network_of

from ..dataset.images import read_manifest
from .config import StageConfig
from .device import pick_device, pick_precision
from .optimizer import state_bytes
from .stage import Stage

SD15_RESOLUTION = 512
CLIP_WIDTH, CLIP_TOKENS = 768, 77


@dataclass
class Plan:
    """One step of one process.

    Attributes:
        trained, frozen: parameters per network.
        memory: bytes by what they are for.
        peak: bytes at the worst moment of a step; less than the sum, as activations go while gradients come.
        flops: of a step (a multiplication and an addition are two).
        notes: what was assumed.
    """

    trained: dict[str, int]
    frozen: dict[str, int]
    memory: dict[str, int]
    peak: int
    flops: int
    notes: list[str] = field(default_factory=list)


class Unallocated:
    """A stage's networks by the files that ``inputs`` names, where these exist, else SD1.5's; without weights."""

    weights = False

    def __init__(self, inputs: Any, notes: list[str]):
        self.inputs, self.notes = inputs, notes

    def __call__(self, kind: str) -> tuple[nn.Module, dict[str, Any]]:
        path = getattr(self.inputs, kind)
        if not path or not Path(path).is_file():
            self.notes.append(f"inputs.{kind} {f'({path}) ' if path else ''}is not there: SD1.5's sizes")
            config = SD15_AUTOENCODER if kind == "autoencoder" else NETWORKS[kind].config()
            return NETWORKS[kind].module(config), {}
        if holds_network(path):
            metadata = read_metadata(path)
            return NETWORKS[kind].build(metadata["config"]), metadata
        if NETWORKS[kind].sd15_prefix:
            return network_of(open_checkpoint(path).shapes, kind, path), {}
        return NETWORKS[kind].module(UNetConfig()), {}

    def prompt(self, context_dim: int) -> Tensor:
        return torch.zeros(1, CLIP_TOKENS if context_dim == CLIP_WIDTH else 1, context_dim)


class _Living(TorchDispatchMode):
    """Follows the bytes of tensors from the operation that makes them until nobody holds them.

    cycles: fake tensors may lie in reference cycles, as those of checkpointed blocks do (real ones do not): a peak
    higher by BELIEVED is believed after a garbage collection, and a smaller rise is left out.
    """

    BELIEVED = 0.02  # with a collection after every operation a plan of full width would take hours

    def __init__(self, known: list[Tensor], cycles: bool):
        super().__init__()
        self.known = {id(t.untyped_storage()): None for t in known}
        self.bytes = self.peak = 0
        self.cycles = cycles

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if self.bytes > (1 + self.BELIEVED * self.cycles) * self.peak:
            # What held a tensor may itself be garbage only after a collection.
            while self.cycles and self.bytes > self.peak and gc.collect():
                pass
            self.peak = max(self.peak, self.bytes)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.finalize(storage, self._remove, key, size)
            self.bytes += size

    def _remove(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.bytes -= size

    def forget(self) -> None:
        """Stops waiting for what still lives."""
        for end in self.known.values():
            if end is not None:
                end.detach()


def make_plan(stage: type[Stage], config: StageConfig, resolution: int | None = None, processes: int = 1) -> Plan:
    """Runs one step of ``stage`` on fake tensors.

    Args:
        resolution: of the pictures; None: the dataset's, or 512 if there is none.
        processes: the batch is shared out over so many (DDP); the plan is of the one with the largest share.
    """
    notes: list[str] = []
    device = pick_device(config.loop.device)
    dtype = pick_precision(config.loop.precision, device)
    pixels = resolution or _resolution(config, notes)
    samples = -(-config.loop.batch_size // processes)
    notes.append(f"{samples} samples x {config.loop.accumulate} passes, {pixels} px, {device.type}, {dtype}")
    with FakeTensorMode():
        built = stage(config, torch.device("cpu"), Unallocated(config.inputs, notes), pixels)
        for name, module in built.frozen.items():
            if config.loop.frozen_precision == "training" and name not in stage.full_precision:
                _cast(module, dtype)
            module.eval().requires_grad_(False)
        built.trainable.train().requires_grad_(True)
        for module in (built.trainable, *built.frozen.values()):
            set_checkpointing(module, config.loop.checkpointing)
        return _measure(built, config, samples, dtype, device.type == "cuda", notes)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for child in module.modules():
        for name, p in child.named_parameters(recurse=False):
            child._parameters[name] = nn.Parameter(p.detach().to(dtype), requires_grad=False)


def _resolution(config: StageConfig, notes: list[str]) -> int:
    if (Path(config.data.root) / "manifest.jsonl").is_file():
        return int(read_manifest(config.data.root)[0]["resolution"])
    notes.append(f"no data at '{config.data.root}': {SD15_RESOLUTION} px assumed; --resolution changes it")
    return SD15_RESOLUTION


def _measure(stage: Stage, config: StageConfig, samples: int, dtype: torch.dtype, cuda: bool, notes: list[str]) -> Plan:
    parameters = list(stage.trainable.parameters())
    frozen = [p for module in stage.frozen.values() for p in (*module.parameters(), *module.buffers())]
    weights = [*parameters, *stage.trainable.buffers()]
    living = _Living([*weights, *frozen], config.loop.checkpointing)
    counter, saved = FlopCounterMode(display=False, custom_mapping=ATTENTION), {}
    skipped = set(living.known)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in skipped:
            saved[id(storage)] = storage.nbytes()
        return tensor

    gc.collect()
    gc.freeze()  # what exists by now need not be searched again
    with living, counter, cuda_norms() if cuda else contextlib.nullcontext():
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            loss = stage.dummy_loss(samples)["loss"]
        loss.backward()
    living.forget()
    gc.unfreeze()
    average = 4 * sum(p.numel() for p in parameters) if config.optimizer.ema else 0
    memory = {
        "weights, trained": _bytes(weights),
        "weights, frozen": _bytes(frozen),
        "gradients": _bytes([p.grad for p in parameters if p.grad is not None]),
        "optimizer": state_bytes(config.optimizer, [p for p in parameters if p.grad is not None]),
        "average": average,
        "activations": sum(saved.values()),
    }
    # From the second pass on the gradients of the first are there.
    before = memory["gradients"] if config.loop.accumulate > 1 else 0
    lasting = sum(memory[k] for k in ("weights, trained", "weights, frozen", "optimizer", "average"))
    return Plan(
        trained={type(stage.trainable).__name__: sum(p.numel() for p in parameters)},
        frozen={name: sum(p.numel() for p in module.parameters()) for name, module in stage.frozen.items()},
        memory=memory,
        peak=lasting + before + living.peak,
        flops=counter.get_total_flops() * config.loop.accumulate,
        notes=notes,
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# torch's counter knows the attention kernels of GPUs only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@contextlib.contextmanager
def cuda_norms() -> Iterator[None]:
    """Norms compute in float32, as autocast has it on GPUs; on CPUs they keep the type of their input."""

    def in_float32(norm: Any) -> Any:
        def run(x: Tensor, size: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            return norm(x.float(), size, weight.float(), bias.float(), eps)

        return run

    with (
        mock.patch.object(F, "group_norm", in_float32(F.group_norm)),
        mock.patch.object(F, "layer_norm", in_float32(F.layer_norm)),
    ):
        yield


def describe(made: Plan, name: str) -> str:
    """The plan as a table."""
    rows = [f"{name}: plan of one step of one process", *(f"  ({note})" for note in made.notes)]
    for state, networks in (("trained", made.trained), ("frozen", made.frozen)):
        rows += [f"  {state:<10}{count / 1e6:10.3f} M parameters  {network}" for network, count in networks.items()]
    rows += [f"  {what:<18}{size / 2**30:8.2f} GiB" for what, size in made.memory.items()]
    rows.append(f"  {'peak':<18}{made.peak / 2**30:8.2f} GiB")
    rows.append(f"  {'work':<18}{made.flops / 1e12:8.2f} TFLOP per step")
    return "\n".join(rows)
