"""What a stage would take: parameters, memory and FLOPs of a step, without allocating any of it.

The stage is built and runs one step on fake tensors, which have shapes and no values (torch's `FakeTensorMode`, on the
meta device). FLOPs are counted operation by operation; memory is followed as tensors come and go. What the CUDA kernels
need inside themselves, the allocator's waste and data kept on the device are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from diffportrait3d.networks import NETWORKS, UNetConfig
from diffportrait3d.networks.sizes import SD15_AUTOENCODER
from diffportrait3d.weights.checkpoints import open_checkpoint
from diffportrait3d.weights.files import holds_network, read_metadata
from diffportrait3d.weights.sd15 import network_of

from ..dataset.images import read_manifest
from .config import StageConfig
from .cost import NORMS, Cost, StepCounts, norms_as_on_gpus
from .device import pick_device, pick_precision
from .optimizer import state_bytes
from .stage import Stage

SD15_RESOLUTION = 512
CLIP_WIDTH, CLIP_TOKENS = 768, 77


@dataclass
class Plan:
    """One step of one process.

    Attributes:
        stage: its name.
        trained, frozen: parameters per network.
        memory: bytes by what they are for.
        peak: bytes at the worst moment of a step; less than the sum, as activations go while gradients come.
        cost: of forward and backward passes of a step.
        notes: what was assumed.
    """

    stage: str
    trained: dict[str, int]
    frozen: dict[str, int]
    memory: dict[str, int]
    peak: int
    cost: Cost
    notes: list[str]


class Unallocated:
    """A stage's networks by the files that `inputs` names, where these exist, else SD1.5's; without weights."""

    weights = False

    def __init__(self, inputs: Any, notes: list[str]):
        self.inputs, self.notes = inputs, notes

    def __call__(self, kind: str) -> tuple[nn.Module, dict[str, Any]]:
        path, spec = getattr(self.inputs, kind), NETWORKS[kind]
        if not path or not Path(path).is_file():
            self.notes.append(f"inputs.{kind} {f'({path}) ' if path else ''}does not exist: SD1.5's sizes")
            return spec.module(SD15_AUTOENCODER if kind == "autoencoder" else spec.config()), {}
        if holds_network(path):
            metadata = read_metadata(path)
            return spec.build(metadata["config"]), metadata
        if spec.sd15_prefix:
            return network_of(open_checkpoint(path).shapes, kind, path), {}
        return spec.module(UNetConfig()), {}

    def prompt(self, context_dim: int) -> Tensor:
        return torch.zeros(1, CLIP_TOKENS if context_dim == CLIP_WIDTH else 1, context_dim)


class StepMode(StepCounts):
    """Follows the bytes of tensors, too, from the operation that makes them until nobody holds them."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.living = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.held = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(function, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.living:
                self.living.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._remove, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return out

    def _remove(self, size: int) -> None:
        self.held -= size


def make_plan(stage: type[Stage], config: StageConfig, resolution: int | None = None, processes: int = 1) -> Plan:
    """Runs one step of `stage` on fake tensors.

    Args:
        resolution: of the images; None: the dataset's, or 512 if there is none.
        processes: the batch is divided among so many (DDP); the plan is of the one with the largest share.
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
        built.freeze(config.loop.checkpointing)
        if device.type == "cuda":
            for module in (built.trainable, *built.frozen.values()):
                norms_as_on_gpus(module)
        return _measure(built, config, samples, dtype, notes)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """`module.to(dtype)`, which fake parameters do not support; without the norms, which are small."""
    for child in module.modules():
        for name, p in () if isinstance(child, NORMS) else child.named_parameters(recurse=False):
            child._parameters[name] = nn.Parameter(p.detach().to(dtype), requires_grad=False)


def _resolution(config: StageConfig, notes: list[str]) -> int:
    if (Path(config.data.root) / "manifest.jsonl").is_file():
        return int(read_manifest(config.data.root)[0]["resolution"])
    notes.append(f"no data at '{config.data.root}': {SD15_RESOLUTION} px assumed; --resolution changes it")
    return SD15_RESOLUTION


def _measure(stage: Stage, config: StageConfig, samples: int, dtype: torch.dtype, notes: list[str]) -> Plan:
    parameters = list(stage.trainable.parameters())
    weights = [*parameters, *stage.trainable.buffers()]
    frozen = [p for module in stage.frozen.values() for p in (*module.parameters(), *module.buffers())]
    step = StepMode([*weights, *frozen])
    with step:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = stage.dummy_loss(samples)["loss"]
        activations = step.held
        loss.backward()
    trained = [p for p in parameters if p.grad is not None]
    memory = {
        "weights, trained": _bytes(weights),
        "weights, frozen": _bytes(frozen),
        "optimizer": state_bytes(config.optimizer, trained),
        "average": _bytes(parameters) if config.optimizer.ema else 0,
    }
    # From the second pass on the gradients of the first are there.
    before = _bytes(trained) if config.loop.accumulate > 1 else 0
    return Plan(
        stage=stage.name,
        trained={type(stage.trainable).__name__: sum(p.numel() for p in parameters)},
        frozen={name: sum(p.numel() for p in module.parameters()) for name, module in stage.frozen.items()},
        memory={**memory, "gradients": _bytes(trained), "activations": activations},
        peak=sum(memory.values()) + before + step.peak,
        cost=Cost(*(count * config.loop.accumulate for count in step.cost())),
        notes=notes,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def describe(made: Plan) -> str:
    """The plan as a table."""
    rows = [f"{made.stage}: plan of one step of one process", *(f"  ({note})" for note in made.notes)]
    for state, networks in (("trained", made.trained), ("frozen", made.frozen)):
        rows += [f"  {state:<10}{count / 1e6:10.3f} M parameters  {network}" for network, count in networks.items()]
    for what, size in {**made.memory, "peak": made.peak}.items():
        rows.append(f"  {what:<18}{size / 2**30:8.2f} GiB")
    rows += [
        f"  {'work':<18}{made.cost.flops / 1e12:8.2f} TFLOP per step",
        f"  {'traffic':<18}{made.cost.bytes / 1e9:8.2f} GB read and written by {made.cost.operators:,} kernels",
    ]
    return "\n".join(rows)
