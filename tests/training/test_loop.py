"""The loop: resuming to the bit, signals, budgets, averages, refusing what cannot be continued."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from diffportrait3d.files import WriteError
from diffportrait3d.weights.safetensors_writer import write_tensors
from training.engine import loop
from training.engine.config import LoopConfig, OptimizerConfig, StageConfig
from training.engine.device import pick_precision, prepare
from training.engine.distributed import init
from training.engine.loop import Interrupted, run_stage
from training.engine.stage import Stage
from training.engine.state import EMA, newest_checkpoint

from .conftest import DAMAGES, CountedBatch, Counting


class Toy(Stage):
    """Fits a line, with noise from the global generator in every step."""

    name = "toy"

    def __init__(self, kill_at: int | None = None):
        self.trainable = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.frozen = {"teacher": nn.Linear(3, 1)}
        self.sampler, self.kill_at, self.validated = Counting(), kill_at, 0

    def inputs(self, batch, variant):
        if self.kill_at == batch[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"numbers": torch.tensor(batch)}

    def loss(self, inputs, variant):
        x = torch.randn(4, 3) + inputs["numbers"][0] % 3
        return {"loss": (self.trainable(x) - self.frozen["teacher"](x)).square().mean()}

    def validate(self, image):
        self.validated += 1
        return {"noise": float(torch.randn(()))}  # would disturb training if the loop let it

    def finish(self, run_dir, summary):
        torch.save(self.trainable.state_dict(), run_dir / "toy.pt")


def config(run_dir: Path, **changes) -> StageConfig:
    values = {"steps": 12, "log_every": 1, "validate_every": 3, "checkpoint_every": 4, "device": "cpu",
              "precision": "float32", "threads": 1} | changes  # fmt: skip
    return StageConfig(run_dir=str(run_dir), loop=LoopConfig(**values), optimizer=OptimizerConfig(lr=1e-2, ema=0.9))


def run(run_dir: Path, kill_at: int | None = None, **changes):
    def build(settings, device):
        return Toy(kill_at)

    return run_stage(build, config(run_dir, **changes))


def curve(run_dir: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [tuple((k, v) for k, v in sorted(line.items()) if k != "minutes") for line in lines]


@pytest.mark.parametrize(("kill_at", "accumulate"), [(2, 1), (4, 1), (9, 1), (7, 3)])
def test_a_stopped_run_continues_to_the_same_bits(tmp_path, kill_at, accumulate):
    """Also in the middle of a step of three passes, which is taken to its end first."""
    run(tmp_path / "whole", accumulate=accumulate)
    with pytest.raises(Interrupted, match=f"step {-(-kill_at // accumulate)}"):
        run(tmp_path / "stopped", kill_at, accumulate=accumulate)
    assert not (tmp_path / "stopped/summary.json").exists()
    run(tmp_path / "stopped", accumulate=accumulate)
    whole, stopped = torch.load(tmp_path / "whole/toy.pt"), torch.load(tmp_path / "stopped/toy.pt")
    assert all(torch.equal(whole[k], stopped[k]) for k in whole)
    assert curve(tmp_path / "whole") == curve(tmp_path / "stopped")


def test_a_crash_continues_from_the_last_checkpoint_to_the_same_bits(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    original = Toy.inputs

    def crash(self, batch, variant):
        if batch[0] == 11:
            raise RuntimeError("power cut")
        return original(self, batch, variant)

    monkeypatch.setattr(Toy, "inputs", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "crashed")
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "crashed")[0].name == "step-00000008.pt"
    run(tmp_path / "crashed")
    assert curve(tmp_path / "whole") == curve(tmp_path / "crashed")  # steps 9 and 10 are not logged twice


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "toy.pt").stat().st_mtime_ns
    assert run(tmp_path) == first
    assert (tmp_path / "toy.pt").stat().st_mtime_ns == before


def test_only_the_last_checkpoints_stay(tmp_path):
    run(tmp_path, checkpoint_every=2, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010.pt", "step-00000012.pt"]


def test_other_settings_are_not_continued(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, kill_at=3)
    with pytest.raises(ValueError, match="loop.batch_size"):
        run(tmp_path, batch_size=7)
    assert run(tmp_path, steps=6)["steps"] == 6  # a longer or shorter run is the same training


def test_minutes_end_a_run_and_anneal_it(tmp_path, monkeypatch):
    clock = iter(range(0, 100000, 1))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    summary = run(tmp_path, steps=100000, minutes=1.0, validate_every=10**9, checkpoint_every=10**9)
    assert 5 < summary["steps"] < 60
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()[:-1]]
    peak = max(rates)
    assert rates[-1] < 0.1 * peak or rates[-1] < rates[len(rates) // 2]


def test_average_follows_the_formula():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = EMA(module, 0.5)
    expected, value = 0.0, 0.0
    for n in range(1, 40):
        value += 1.0
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    with average.applied(module):
        assert module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == value


def test_a_diverged_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Toy, "loss", lambda self, inputs, variant: {"loss": self.trainable[0].weight.sum() * float("inf")}
    )
    with pytest.raises(FloatingPointError, match="step 0"):
        run(tmp_path)


def test_a_shared_frozen_parameter_is_caught(tmp_path):
    toy = Toy()
    toy.frozen["thief"] = toy.trainable
    settings = config(tmp_path)
    with pytest.raises(AssertionError, match="thief"):
        loop.Trainer(toy, settings, init(prepare(settings.loop)))


def test_settings_that_are_newer_than_a_run_have_their_defaults(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, kill_at=3)
    path, state = newest_checkpoint(tmp_path)
    del state["config"]["loop"]["accumulate"], state["config"]["optimizer"]["name"]
    torch.save(state, path)
    assert run(tmp_path)["steps"] == 12


def test_accumulated_passes_are_one_larger_batch(tmp_path, monkeypatch):
    rows = torch.randn(4, 6, 3)

    def loss(self, inputs, variant):
        x = rows[(inputs["numbers"] - 1) % 4].flatten(0, 1)
        return {"loss": (self.trainable[0](x) - 1).square().mean()}

    monkeypatch.setattr(Toy, "loss", loss)
    gradients = []
    for name, accumulate, sampler in (("passes", 4, Counting()), ("joint", 1, iter([CountedBatch([1, 2, 3, 4])]))):
        settings = config(tmp_path / name, accumulate=accumulate)
        device = prepare(settings.loop)
        trainer = loop.Trainer(Toy(), settings, init(device))
        trainer.stage.sampler = sampler
        trainer.one_step(0.0)
        gradients.append(trainer.stage.trainable[0].weight.grad)
    assert torch.allclose(*gradients, rtol=1e-5)


def test_float16_scales_its_loss_and_skips_steps_until_it_fits(tmp_path):
    settings = config(tmp_path, precision="float16")
    trainer = loop.Trainer(Toy(), settings, init(prepare(settings.loop)))
    before = trainer.scaler.get_scale()
    weight = trainer.stage.trainable[0].weight
    kept = weight.detach().clone()
    trainer.stage.loss = lambda inputs, variant: {"loss": weight.sum() * float("inf")}
    trainer.one_step(0.0)
    assert trainer.scaler.get_scale() < before and torch.equal(weight, kept)
    del trainer.stage.loss
    trainer.one_step(0.0)
    trainer.one_step(0.0)
    assert not torch.equal(weight, kept)
    trainer.save()
    again = loop.Trainer(Toy(), settings, init(prepare(settings.loop)))
    assert again.resume() and again.scaler.get_scale() == trainer.scaler.get_scale()


def test_precision():
    assert pick_precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert pick_precision("auto", torch.device("cuda")) == torch.bfloat16


def spoil(path: Path, how: str) -> None:
    path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys, how):
    run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", 10, keep_last=3)
    spoil(newest_checkpoint(tmp_path / "stopped")[0], how)
    run(tmp_path / "stopped", keep_last=1)
    said = capsys.readouterr()
    assert "step-00000010.pt' is damaged" in said.err and "resumed at step 8" in said.out
    whole, stopped = torch.load(tmp_path / "whole/toy.pt"), torch.load(tmp_path / "stopped/toy.pt")
    assert all(torch.equal(whole[k], stopped[k]) for k in whole)
    assert curve(tmp_path / "whole") == curve(tmp_path / "stopped")


def test_a_damaged_checkpoint_is_not_one_of_the_last_that_stay(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, 10, keep_last=3)
    spoil(newest_checkpoint(tmp_path)[0], "zeroed")
    with pytest.raises(Interrupted):
        run(tmp_path, 9, keep_last=1, checkpoint_every=100)
    assert newest_checkpoint(tmp_path)[0].name == "step-00000009.pt"


def test_nothing_but_damaged_checkpoints(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, 3)
    for path in (tmp_path / "checkpoints").iterdir():
        spoil(path, "truncated")
    with pytest.raises(ValueError, match="no checkpoint that can be read; delete the folder"):
        run(tmp_path)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_configuration_is_written_again(tmp_path, how):
    """It is a copy for people: what a run was started with is in its checkpoints."""
    with pytest.raises(Interrupted):
        run(tmp_path, 3)
    before = (tmp_path / "config.yaml").read_bytes()
    spoil(tmp_path / "config.yaml", how)
    with pytest.raises(ValueError, match="loop.batch_size"):
        run(tmp_path, batch_size=7)
    assert run(tmp_path)["steps"] == 12
    assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["summary.json", "log.jsonl", "toy.safetensors"])
def test_damaged_results_are_written_again(tmp_path, capsys, monkeypatch, how, name):
    monkeypatch.setattr(
        Toy, "finish", lambda self, run_dir, summary: write_tensors(run_dir / "toy.safetensors",
                                                                    self.trainable.state_dict(), {})
    )  # fmt: skip
    first = run(tmp_path)
    network, lines = (tmp_path / "toy.safetensors").read_bytes(), set(curve(tmp_path))
    spoil(tmp_path / name, how)
    if name == "log.jsonl":
        (tmp_path / "summary.json").unlink()
    again = run(tmp_path)
    said = capsys.readouterr().err
    assert f"{name}' is damaged" in said or (name, how) == ("log.jsonl", "empty")
    assert (tmp_path / "toy.safetensors").read_bytes() == network
    assert again["sha256"] == first["sha256"] and again["losses"] == first["losses"]
    assert loop.finished(tmp_path) == again and set(curve(tmp_path)) <= lines


def test_damaged_results_without_a_checkpoint_are_not_trained_again_unasked(tmp_path):
    run(tmp_path)
    spoil(tmp_path / "summary.json", "truncated")
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no checkpoint to write them from; delete the folder"):
        run(tmp_path)


@pytest.mark.parametrize("size", [300, 2500, 9000])
def test_a_run_goes_on_when_there_is_room_again(tmp_path, room, size):
    """Wherever it is that the disk is full: at the settings, the log, a checkpoint, an image."""
    run(tmp_path / "whole")
    with room(size), pytest.raises(WriteError, match="cannot be written: .*; make room, then run it again"):
        run(tmp_path / "stopped")
    assert not [path for path in (tmp_path / "stopped").rglob("*") if path.suffix == ".tmp"]
    run(tmp_path / "stopped")
    assert curve(tmp_path / "whole") == curve(tmp_path / "stopped")
    whole, stopped = torch.load(tmp_path / "whole/toy.pt"), torch.load(tmp_path / "stopped/toy.pt")
    assert all(torch.equal(whole[k], stopped[k]) for k in whole)


def test_tensorboard_reads_what_is_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Interrupted):
        run(tmp_path, 6, checkpoint_every=100)
    run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, 13))
    logged = {line["step"]: line["loss"] for line in map(dict, curve(tmp_path)) if "loss" in line}
    assert all(event.value == pytest.approx(logged[event.step]) for event in events)
