"""A stage's plan against the same stage really run, at small width."""

from __future__ import annotations

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffportrait3d.networks import UNet, UNetConfig
from diffportrait3d.weights.files import save_network
from training.engine.command import stage_main
from training.engine.config import load_config
from training.engine.plan import make_plan
from training.miniature import CONFIGS
from training.reference import ReferenceStage

from .conftest import STAGES, TINY_AUTOENCODER, TINY_UNET, stage_config, trainer_of

WORK = ["loop.batch_size=8", "loop.precision=float32", "optimizer.ema=0.9"]
CASES = [
    ("reference", ["loop.precision=bfloat16", "loop.frozen_precision=training"]),
    ("reference", ["loop.accumulate=2", "loop.checkpointing=true"]),
    ("view_consistency", ["loop.batch_size=4"]),
    ("novel_view", []),
    ("autoencoder", ["crop=64", "whole_batch_size=8"]),
]

NARROW = {
    "autoencoder": TINY_AUTOENCODER,
    "base": TINY_UNET,
    "novel_view": {"render_size": 16, "base_channels": 16, "volume_size": 8, "samples_per_ray": 4},
}


def bytes_of(values) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def measure(trainer) -> dict[str, int]:
    """Parameters, FLOPs, what is in memory between steps, and the most that a step adds to it."""
    trainer.one_step(0.0)  # the optimizer makes its states
    with FlopCounterMode(display=False) as counter:
        trainer.one_step(0.0)
    trainer.optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.one_step(0.0)
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        now += change
        peak = max(peak, now)
    stage = trainer.stage
    networks = (stage.trainable, *stage.frozen.values())
    lasting = sum(bytes_of(m.state_dict().values()) for m in networks) + bytes_of(trainer.ema.shadow.values())
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
    made = make_plan(*stage_config(stage, dataset, networks, tmp_path, *settings))
    assert sum(made.trained.values()) == pytest.approx(measured["trained"], rel=0.1)
    assert sum(made.frozen.values()) == pytest.approx(measured["frozen"], rel=0.1)
    assert made.cost.flops == pytest.approx(measured["flops"], rel=0.1)
    assert made.peak == pytest.approx(measured["memory"], rel=0.2)


@pytest.mark.parametrize(
    ("preset", "stage"),
    [(path.parent.name, path.stem) for path in sorted(CONFIGS.glob("*/*.yaml")) if path.stem in STAGES],
)
def test_every_preset_can_be_planned(preset, stage, networks, tmp_path):
    """With narrow networks, for time's sake."""
    values = [
        f"data.root={tmp_path}",
        "loop.device=cuda",
        *(f"inputs.{kind}={file}" for kind, file in networks.items()),
    ]
    if stage in NARROW:
        values.append(f"network={json.dumps(NARROW[stage])}")
    config = load_config(STAGES[stage].config_class, CONFIGS / preset / f"{stage}.yaml", values)
    made = make_plan(STAGES[stage], config, resolution=256)
    assert made.cost.flops > 0 and made.peak > made.memory["weights, trained"] > 0


def test_a_plan_says_what_it_assumed(tmp_path, capsys):
    """Without data and without networks it is SD1.5 at 512 px; here with a narrow one, for time's sake."""
    save_network(tmp_path / "unet.safetensors", UNet(UNetConfig.from_dict(TINY_UNET)), "unet")
    values = [f"inputs.unet={tmp_path / 'unet.safetensors'}", f"data.root={tmp_path}", "loop.batch_size=4"]
    assert stage_main(ReferenceStage, ["--plan", "--processes", "2", "--set", *values]) == 0
    printed = capsys.readouterr().out
    assert "512 px assumed" in printed and "2 samples x 1 passes" in printed
    for word in (
        "trained",
        "frozen",
        "gradients",
        "optimizer",
        "activations",
        "peak",
        "TFLOP per step",
        "GB read and written",
    ):
        assert word in printed
    assert not (tmp_path / "runs").exists()
