"""Steps do not wait for the device, and a recording of one runs like a plain one."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from training.engine.steps import WARM_UP, Steps

from .conftest import STAGES, trainer_of

META = torch.device("meta")
VARIANTS = {"autoencoder": ["crop", "whole"], "view_consistency": ["", "unconditional"]}


class Waits(TorchDispatchMode):
    """Lets a step run with everything on "meta", and notes where the host would wait for such a device.

    That is where it reads a number or a tensor back, or sends one from memory that is not pinned.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if function is torch.ops.aten._local_scalar_dense.default and before == {"meta"}:
            self.found.append("number read")
            return 0.5
        if "meta" in before and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.found.append("tensor read")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = function(*args, **kwargs)
        after = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        if before == {"cpu"} and after == {"meta"}:
            self.found.append("tensor sent")
        return out


def on_meta(trainer) -> None:
    """Everything that a GPU would hold is on "meta", as far as a stage was told of its device."""
    stage = trainer.stage
    stage.device = META
    for module in (stage.trainable, *stage.frozen.values()):
        module.to(META)
    trainer.parameters = list(stage.trainable.parameters())
    stage.data.images, stage.data.conditions = stage.data.images.to(META), stage.data.conditions.to(META)
    if hasattr(stage, "latents"):
        stage.latents = stage.latents.to(META)
        stage.schedule, stage.prompt = stage.schedule.to(META), stage.prompt.to(META)


@pytest.mark.parametrize(
    ("stage", "variant"), [(stage, variant) for stage in STAGES for variant in VARIANTS.get(stage, [""])]
)
def test_a_step_waits_nowhere(stage, variant, dataset, networks, tmp_path):
    """Sent are the batch's numbers alone, row numbers, mirroring and labels: on a GPU from pinned memory."""
    trainer = trainer_of(stage, dataset, networks, tmp_path)
    on_meta(trainer)
    batch = next(trainer.stage.sampler)
    with Waits() as batches:
        inputs = trainer.stage.inputs(batch, variant)
    with Waits() as work:
        losses = trainer.stage.loss(inputs, variant)
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0)
    assert norm.device == META and work.found == []
    assert set(batches.found) == {"tensor sent"} and len(batches.found) <= 8


class Tape(TorchDispatchMode):
    """A recorder for CPUs: notes the operations of a step, and runs them again on the same memory.

    As with a CUDA graph, numbers that came from the host are those of the recording.
    """

    def plain(self, work):
        return work()

    def record(self, work):
        self.operations = []
        before = torch.get_rng_state()
        saved = [(t, t.detach().clone()) for t in self.state()]
        with self:
            values = work()
        with torch.no_grad():
            for tensor, value in saved:  # recording is not running
                tensor.copy_(value)
        torch.set_rng_state(before)
        return functools.partial(self.replay, self.operations), values

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self, operations):
        for function, args, kwargs, out in operations:
            if function.is_view:
                continue
            again = function(*args, **kwargs)
            tree_map(lambda old, new: old.copy_(new) if isinstance(old, torch.Tensor) and old is not new else None,
                     out, again)  # fmt: skip


def recorded(trainer, tape: Tape):
    """The trainer with an optimizer whose step is on the device, as on CUDA, and steps by the tape if there is one."""
    rate = torch.tensor(1e-3)
    trainer.optimizer = torch.optim.AdamW(trainer.parameters, lr=rate, betas=(0.9, 0.999), fused=True)
    trainer.steps = Steps(trainer.stage.name, trainer.descend, tape)
    if tape is not None:
        tape.state = lambda: [
            *trainer.parameters,
            *(v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)),
        ]
    return trainer


@pytest.mark.parametrize("stage", STAGES)
def test_replayed_steps_are_plain_ones(stage, dataset, networks, tmp_path):
    """Learning rate, AdamW's averages, noise, timesteps, crops and batches go on: none is frozen."""
    count = WARM_UP + 4

    def train(recorder):
        more = {"view_consistency": ["unconditional=0.5"], "base": ["timesteps=cubic", "loss_weighting=velocity"]}
        settings = ["loop.precision=float32", "optimizer.ema=0.9", "loop.steps=1000", *more.get(stage, [])]
        trainer = recorded(trainer_of(stage, dataset, networks, tmp_path, *settings), recorder)
        trainer.stage.sampler.position = 3 if stage == "view_consistency" else 0
        rows = []
        for number in range(2 * count):
            trainer.one_step(number / (2 * count))
            rows.append(trainer.read())
        return trainer, rows

    tape = Tape()
    (plain, wanted), (replayed, got) = train(None), train(tape)
    assert replayed.steps.recorder is tape and replayed.steps.recorded
    for row, want in zip(got, wanted, strict=True):
        assert row == pytest.approx(want, rel=1e-6)
    for own, other in zip(plain.ema.shadow.values(), replayed.ema.shadow.values(), strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-7)
