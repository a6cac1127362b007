"""A stage's plan against the same stage really run, at small width."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from training.plan import _ATTENTION, make_plan

from .test_stages import stage_config, trainer_of

WORK = {"loop.batch_size=8", "loop.precision=float32", "optimizer.ema=0.9"}
CASES = [
    ("reference", []),
    ("reference", ["loop.accumulate=2", "loop.checkpointing=true"]),
    ("reference", ["loop.precision=bfloat16", "loop.frozen_precision=training"]),
    ("view_control", ["targets_per_reference=2"]),
    ("view_consistency", ["loop.batch_size=4"]),
    ("novel_view", []),
    ("autoencoder", []),
    ("base", []),
]


def bytes_of(values) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def measure(trainer) -> dict[str, int]:
    """Parameters, FLOPs, what is in memory between steps, and the most that a step adds to it."""
    trainer.one_step()  # the optimizer makes its states
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        trainer.one_step()
    trainer.optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.one_step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        now += change
        peak = max(peak, now)
    stage = trainer.stage
    networks = (stage.trainable, *stage.frozen.values())
    lasting = sum(bytes_of(m.state_dict().values()) for m in networks) + bytes_of(trainer.average.shadow.values())
    states = [v for state in trainer.optimizer.state.values() for v in state.values()]
    return {
        "trained": sum(p.numel() for p in stage.trainable.parameters()),
        "frozen": sum(p.numel() for m in stage.frozen.values() for p in m.parameters()),
        "flops": counter.get_total_flops(),
        "memory": lasting + bytes_of(states) + peak,
    }


@pytest.mark.parametrize(("stage", "more"), CASES)
def test_the_plan_is_what_a_run_measures(stage, more, dataset, networks, tmp_path):
    settings = [*WORK, *more]
    measured = measure(trainer_of(stage, dataset, networks, tmp_path, *settings))
    module, config = stage_config(stage, dataset, networks, tmp_path, *settings)
    made = make_plan(module.build, config)
    # A plan needs no autoencoder where latents are cached; its parameters are known.
    encoder = trained_elsewhere(stage, networks)
    assert sum(made.trained.values()) == pytest.approx(measured["trained"], rel=0.1)
    assert sum(made.frozen.values()) + encoder["count"] == pytest.approx(measured["frozen"], rel=0.1)
    assert made.flops == pytest.approx(measured["flops"], rel=0.1)
    print(stage, more, made.peak + encoder["bytes"], measured["memory"], made.memory)
    assert made.peak + encoder["bytes"] == pytest.approx(measured["memory"], rel=0.2)


def trained_elsewhere(stage, networks) -> dict[str, int]:
    from diffportrait3d.checkpoints import load_network

    if stage in ("autoencoder", "novel_view"):
        return {"count": 0, "bytes": 0}
    parameters = list(load_network(networks["autoencoder"])[0].parameters())
    return {"count": sum(p.numel() for p in parameters), "bytes": bytes_of(parameters)}
