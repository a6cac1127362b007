"""How a step's work reaches the device: as it is, or on CUDA recorded once as a graph and replayed.

The networks of the miniature have hundreds of small layers: launching their kernels one by one takes longer than the
kernels. A CUDA graph launches all of a step at once. What is replayed are kernels and addresses, so the inputs are
copied into the tensors of the recording, and no number of the step may come from the host.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .config import StageConfig
from .cost import Cost, StepCounts

WARM_UP = 3  # plain steps before a recording: kernels are chosen, the optimizer makes its states
AHEAD = 4  # steps that the host may be ahead of the device: a time limit must not be known too late


class Pass(NamedTuple):
    """One batch of a step: what the loss reads, the stage's variant, and its weight among the processes."""

    inputs: dict[str, Tensor]
    variant: str
    weight: float


Work = Callable[[list[Pass]], Tensor]  # a whole step, to the values that are logged


class CudaGraphs:
    """Runs work once so that it can be run again.

    All graphs share their memory, since no step reads what another has left there.
    """

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def plain(self, work: Callable[[], Tensor]) -> Tensor:
        """The work as it is, where recordings take place."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            values = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return values

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What runs the work again, and the tensor that then holds its result. Does not count as a run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            values = work()
        return graph.replay, values


class Steps:
    """Runs steps, those of each variant by a recording of their own, after a few plain ones.

    Args:
        work: a step on inputs whose shapes depend on the variants alone.
        recorder: None: every step is plain.
    """

    def __init__(self, name: str, work: Work, recorder: CudaGraphs | None):
        self.name, self.work, self.recorder = name, work, recorder
        self.runs: Counter[tuple[str, ...]] = Counter()
        self.costs: dict[tuple[str, ...], Cost] = {}
        self.recorded: dict[tuple[str, ...], tuple[Callable[[], None], list[Pass], Tensor]] = {}

    def __call__(self, passes: list[Pass]) -> Tensor:
        """The step's values; those of a recording last until its next run."""
        key = tuple(part.variant for part in passes)
        self.runs[key] += 1
        if key not in self.costs:
            return self._counted(key, passes)
        if self.recorder is None:
            return self.work(passes)
        if self.runs[key] <= WARM_UP:
            return self.recorder.plain(lambda: self.work(passes))
        if key not in self.recorded:
            held = [part._replace(inputs={k: v.clone() for k, v in part.inputs.items()}) for part in passes]
            try:
                replay, values = self.recorder.record(lambda: self.work(held))
            except RuntimeError as error:
                self.recorder = None
                print(f"{self.name}: steps run without a CUDA graph, since recording failed: {error}", flush=True)
                return self.work(passes)
            self.recorded[key] = replay, held, values
        replay, held, values = self.recorded[key]
        for own, given in zip(held, passes, strict=True):
            for name, tensor in own.inputs.items():
                tensor.copy_(given.inputs[name])
        replay()
        return values

    def _counted(self, key: tuple[str, ...], passes: list[Pass]) -> Tensor:
        """The first step of its variant."""
        with StepCounts() as counts:
            values = self.recorder.plain(lambda: self.work(passes)) if self.recorder else self.work(passes)
        self.costs[key] = counts.cost()
        return values

    def flops(self) -> int:
        """Of all steps so far."""
        return sum(cost.flops * self.runs[key] for key, cost in self.costs.items())


def recorder_for(config: StageConfig, device: torch.device, processes: int, dtype: torch.dtype) -> CudaGraphs | None:
    """CUDA graphs, or None where the steps cannot be recorded; on CUDA a line says why."""
    if device.type != "cuda":
        return None
    loop = config.loop
    obstacles = {
        "loop.graphs=false": not loop.graphs,
        f"{processes} processes": processes > 1,
        f"loop.accumulate={loop.accumulate}": loop.accumulate > 1,
        "loop.checkpointing=true": loop.checkpointing,
        "float16's loss scaler": dtype == torch.float16,
        f"optimizer.name={config.optimizer.name}": config.optimizer.name != "adamw",
    }
    found = [obstacle for obstacle, there in obstacles.items() if there]
    if found:
        print(f"Steps run without a CUDA graph: {', '.join(found)}.", flush=True)
    return None if found else CudaGraphs()


class DeviceClock:
    """Adds up the time in which the device computes steps, from measurements on the device itself."""

    def __init__(self, device: torch.device):
        self.cuda, self.total = device.type == "cuda", 0.0
        self.running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(self, *_: object) -> None:
        self.running.append((self.start, self._now()))
        while len(self.running) > (AHEAD if self.cuda else 0):
            self._take()

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _take(self) -> None:
        start, end = self.running.popleft()
        if not self.cuda:
            self.total += end - start
            return
        end.synchronize()
        self.total += start.elapsed_time(end) / 1000

    def seconds(self) -> float:
        """Of all steps so far; waits for the last ones."""
        while self.running:
            self._take()
        return self.total
