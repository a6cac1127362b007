"""Weights that are cast all together, and norms in their type, against autocast and float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from training.engine.cost import StepCounts
from training.engine.precision import cast_weights, norms_in_type_of_weights

from .conftest import STAGES, trainer_of


def network(norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8) if norm else nn.Identity(), nn.SiLU(), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5))


def test_gradients_are_those_of_autocast_to_the_bit():
    """Every weight's, in its own type; one that takes no part has none, so that AdamW leaves it alone."""
    plain, x = network(norm=False), torch.randn(2, 3, 8, 8)
    plain.register_parameter("unused", nn.Parameter(torch.ones(3)))
    cast = copy.deepcopy(plain)
    with torch.autocast("cpu", torch.bfloat16):
        plain(x).float().square().mean().backward()
        functional_call(cast, cast_weights(cast, torch.bfloat16), x).float().square().mean().backward()
    assert cast.unused.grad is None
    for (name, own), other in zip(cast.named_parameters(), plain.parameters(), strict=True):
        assert own.dtype == torch.float32 and (name == "unused" or own.grad.dtype == torch.float32)
        assert name == "unused" or torch.equal(own.grad, other.grad), name


def test_norms_compute_in_the_type_of_their_weights():
    module, x = network(norm=True), torch.randn(2, 3, 8, 8)
    wanted = module(x)
    norms_in_type_of_weights(module)
    assert torch.equal(module(x), wanted) and list(module.state_dict()) == list(network(norm=True).state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = functional_call(module, cast_weights(module, torch.bfloat16), x)
        assert (
            module[1](module[0](x)).dtype == torch.float32
            and module[1].half()(x.new_ones(1, 8, 2, 2)).dtype == torch.half
        )
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


# torch's gradient of 3D convolutions in bfloat16 on CPUs is not finite for S's small volumes, with autocast alone, too.
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "novel_view"])
def test_steps_in_bfloat16(stage, dataset, networks, tmp_path):
    """Losses are those of autocast, within the type's precision, by fewer kernels."""
    losses, kernels = [], []
    for number, setting in enumerate(("loop.cast_once=false", "loop.cast_once=true")):
        settings = ["loop.precision=bfloat16", "loop.frozen_precision=training", setting]
        trainer = trainer_of(stage, dataset, networks, tmp_path / str(number), *settings)
        for _ in range(2):
            trainer.one_step(0.0)
        losses.append(trainer.read()["loss"])
        assert all(p.dtype == torch.float32 for p in trainer.parameters)
        with StepCounts() as counts:  # without AdamW, which has a kernel for each weight on a CPU
            trainer.optimizer.register_step_pre_hook(lambda *_, counts=counts: setattr(counts, "counting", False))
            trainer.optimizer.register_step_post_hook(lambda *_, counts=counts: setattr(counts, "counting", True))
            trainer.one_step(0.0)
        kernels.append(counts.cost().operators)
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert kernels[1] < 0.9 * kernels[0]
