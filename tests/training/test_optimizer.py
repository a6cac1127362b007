"""Learning rates and optimizers; 8-bit Adam is bitsandbytes' own, on a CPU."""

import copy
import sys

import pytest
import torch
from torch import nn

from training.engine import loop
from training.engine.config import LoopConfig, OptimizerConfig, StageConfig
from training.engine.device import prepare
from training.engine.distributed import init
from training.engine.optimizer import build_optimizer, learning_rate, state_bytes
from training.engine.stage import Stage

from .conftest import Counting


def test_learning_rate():
    opt = OptimizerConfig(lr=1.0, warmup_steps=10, decay="cosine", final_lr_ratio=0.1)
    assert learning_rate(opt, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(opt, 50, 0.5) == pytest.approx(0.55)
    assert learning_rate(opt, 100, 1.0) == pytest.approx(0.1)
    assert learning_rate(OptimizerConfig(lr=1.0, decay="constant", warmup_steps=0), 7, 0.9) == 1.0


def test_a_missing_optimizer_is_named(monkeypatch):
    weights = [nn.Parameter(torch.zeros(8, 8))]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        build_optimizer(OptimizerConfig(name="adamw8bit"), weights)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))  # 6144 weights each: 8 bits from 4096 on


def fitted(name: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, float]:
    module = network()
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=1e-3), list(module.parameters()))
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (module(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
    return module, optimizer, float(loss.detach())


def test_eight_bits_descend_like_thirty_two():
    """The first step comes before anything was rounded; later ones differ by the rounding of the states."""
    start, (one, _, first_loss), (same, _, _) = network(), fitted("adamw8bit", 1), fitted("adamw", 1)
    for name, weights in same.state_dict().items():
        step = weights - start.state_dict()[name]
        assert torch.allclose(one.state_dict()[name] - start.state_dict()[name], step, rtol=1e-2, atol=1e-6), name
    last, wanted = fitted("adamw8bit", 100)[2], fitted("adamw", 100)[2]
    assert wanted < 0.3 * first_loss and last == pytest.approx(wanted, rel=0.1)


def test_eight_bits_take_what_a_plan_says():
    module, optimizer, _ = fitted("adamw8bit", 1)
    states = [optimizer.state[p] for p in module.parameters()]
    kept = [v for state in states for k, v in state.items() if isinstance(v, torch.Tensor) and "qmap" not in k]
    assert {v.dtype for v in kept} == {torch.uint8, torch.float32}
    planned = state_bytes(OptimizerConfig(name="adamw8bit"), list(module.parameters()))
    assert sum(v.numel() * v.element_size() for v in kept) == planned


class Fit(Stage):
    """Fits a shuffling of what the sampler counts."""

    name = "fit"

    def __init__(self):
        self.trainable, self.frozen, self.sampler = network(), {}, Counting()

    def inputs(self, batch, variant):
        return {"x": torch.randn(16, 64, generator=torch.Generator().manual_seed(batch[0]))}

    def loss(self, inputs, variant):
        x = inputs["x"]
        return {"loss": (self.trainable(x) - x.flip(1)).square().mean()}


def test_eight_bits_resume_to_the_same_bits(tmp_path):
    settings = StageConfig(
        run_dir=str(tmp_path),
        loop=LoopConfig(steps=8, device="cpu", precision="float32", threads=1),
        optimizer=OptimizerConfig(name="adamw8bit", lr=1e-3),
    )
    trainer = loop.Trainer(Fit(), settings, init(prepare(settings.loop)))
    for _ in range(4):
        trainer.one_step(0.5)
    trainer.save()
    saved = copy.deepcopy(trainer.stage.trainable.state_dict())
    again = loop.Trainer(Fit(), settings, init(prepare(settings.loop)))
    assert again.resume() and all(torch.equal(v, saved[k]) for k, v in again.stage.trainable.state_dict().items())
    for run in (trainer, again):
        for _ in range(4):
            run.one_step(0.5)
    resumed = again.stage.trainable.state_dict()
    assert all(torch.equal(v, resumed[k]) for k, v in trainer.stage.trainable.state_dict().items())
    assert any(not torch.equal(v, saved[k]) for k, v in resumed.items())
