"""Steps of the training loop of the checkout on Python's path: the process that `evaluation.step_costs` starts.

    PYTHONPATH=CHECKOUT python -P evaluation/speed/measured_steps.py

Every line of its input is a request in JSON, [method of `Measured`, *arguments], every line of its output an answer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from training import miniature
from training.engine.config import load_config
from training.engine.device import prepare
from training.engine.distributed import init
from training.engine.loop import Trainer

BEFORE_GRAPHS = 5  # steps: where they are recorded as CUDA graphs, the ones after these are replayed


def counter():
    """The module that counts, of this file's own checkout: others may have none, or other rules."""
    file = Path(__file__).resolve().parents[2] / "training/engine/cost.py"
    spec = importlib.util.spec_from_file_location("step_counter", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Measured:
    """A stage's trainer and what is asked of it.

    Args:
        stage: its name.
        config: file with its settings.
        overrides: "key=value".
    """

    def __init__(self, stage: str, config: str, overrides: list[str]):
        stage_class = next(found for found in miniature.STAGES if found.name == stage)
        settings = load_config(stage_class.config_class, config, overrides)
        device = prepare(settings.loop)
        self.cuda = device.type == "cuda"
        self.trainer = Trainer(stage_class.build(settings, device), settings, init(device))

    def count(self) -> dict[str, Any]:
        """What the second step costs, by groups of operators; on a CPU its networks are not computed, and norms take
        the type that a GPU's autocast gives them."""
        cost = counter()
        if not self.cuda:
            for network in (self.trainer.stage.trainable, *self.trainer.stage.frozen.values()):
                cost.norms_as_on_gpus(network)
            self.lists_as_on_gpus()
        counts = cost.StepCounts(None if self.cuda else cost.SMALL, counting=False)
        own: dict[str, int] = {}  # AdamW counts its steps on the host, where a GPU waits for nothing
        self.trainer.optimizer.register_step_pre_hook(lambda *_: own.update(counts.waits))
        self.trainer.optimizer.register_step_post_hook(lambda *_: setattr(counts, "waits", Counter(own)))
        with counts:
            for counts.counting in (False, True):
                self.trainer.one_step(0.0)
        found = {name: dict(getattr(counts, name)) for name in ("kernels", "bytes", "flops", "waits")}
        return {**found, "samples": self.samples()}

    def samples(self) -> int:
        """Of a step."""
        return self.trainer.seen // self.trainer.step

    def losses(self, steps: int) -> list[float]:
        """Of the first steps of a run of that length."""
        found = []
        for step in range(steps):
            values = self.trainer.one_step(step / steps) or self.trainer.read()  # earlier loops gave them at once
            found.append(values["loss"])
        return found

    def lists_as_on_gpus(self) -> None:
        """There, AdamW and clipping take lists of tensors where they are left the choice, and AdamW one kernel where
        it is told what to do; in this process alone."""
        for group in self.trainer.optimizer.param_groups:
            group["fused"] = group["fused"] is not None
            group["foreach"] = not group["fused"]
        torch.nn.utils.clip_grad_norm_ = functools.partial(torch.nn.utils.clip_grad_norm_, foreach=True)

    def time(self, steps: int) -> float:
        """Seconds of a step, those of the processor on a CPU."""
        while self.cuda and self.trainer.step < BEFORE_GRAPHS:
            self.trainer.one_step(0.0)
        clock = time.perf_counter if self.cuda else time.process_time
        self.wait()
        start = clock()
        for _ in range(steps):
            self.trainer.one_step(0.0)
        self.wait()
        return (clock() - start) / steps

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def main() -> None:
    measured = None
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            if name == "build":
                measured, answer = Measured(*arguments), None
            else:
                answer = getattr(measured, name)(*arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
