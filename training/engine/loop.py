"""One small explicit training loop, shared by all stages.

A stage brings its networks, its batches and its loss (``training.engine.stage``); ``train`` does the rest: AdamW,
warm-up and decay, gradient accumulation and clipping, an average of the weights, logs, validation, checkpoints,
resuming. A run lives in one folder::

    config.yaml  log.jsonl  tensorboard/  validation/*.png  checkpoints/step-*.pt  summary.json  <network>.safetensors

``summary.json`` is written last: a folder that has it is finished, any other resumes from its newest checkpoint. Files
of the run that are damaged are named and replaced: by the checkpoint before, or by what a checkpoint holds. On a
CPU and limited by steps a resumed run of one process gives the same bits as an uninterrupted one.

``accelerate launch -m training.<stage>`` runs it in several processes (see ``training.engine.distributed``).
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffportrait3d.files import file_hash, write_atomically, write_text, writing
from diffportrait3d.networks import set_checkpointing

from .config import StageConfig, to_dict
from .device import pick_precision, prepare
from .distributed import Processes, join, put_together, sharded_like, whole
from .log import RunLog
from .optimizer import Scaler, build_optimizer, learning_rate
from .stage import Stage
from .state import (
    WeightAverage,
    check_config,
    checkpoint_file,
    checkpoints,
    newest_checkpoint,
    read_checkpoint,
    restore_rng,
    rng_state,
)

SUMMARY = "summary.json"
SUMMARY_ENTRIES = {"stage", "steps", "samples", "minutes", "samples_per_second", "losses"}


class Interrupted(Exception):
    """The run was stopped by a signal after saving; the same command continues it."""


class _Signals:
    """Turns SIGINT and SIGTERM into a flag while training, so that a run stops between two steps."""

    def __enter__(self) -> _Signals:
        self.received: int | None = None
        self.kept: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread may install handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.kept[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self.kept.items():
            signal.signal(number, handler)


class Trainer:
    """State and mechanics of one run; ``train`` below is its short form."""

    def __init__(self, stage: Stage, config: StageConfig, device: torch.device, processes: Processes | None = None):
        self.stage, self.config, self.device = stage, config, device
        self.processes = processes or Processes(device)
        self.run_dir = Path(config.run_dir)
        self.dtype = pick_precision(config.loop.precision, device)
        self._check()
        self.frozen_dtype = self.dtype if config.loop.frozen_precision == "training" else torch.float32
        for name, module in stage.frozen.items():
            module.to(device, torch.float32 if name in stage.full_precision else self.frozen_dtype)
            module.eval().requires_grad_(False)
        stage.trainable.to(device).train().requires_grad_(True)
        for module in (stage.trainable, *stage.frozen.values()):
            set_checkpointing(module, config.loop.checkpointing)
        self.call = self.processes.wrap(stage.trainable)
        self.parameters = list(stage.trainable.parameters())
        self._assert_separate()
        self.optimizer = build_optimizer(config.optimizer, self.parameters, self.processes.sharded)
        self.scaler = Scaler(device, self.dtype)
        self.average = WeightAverage(stage.trainable, config.optimizer.ema) if config.optimizer.ema else None
        self.step, self.seen, self.elapsed_before = 0, 0, 0.0
        self.recent: dict[str, list[float]] = {}
        if self.processes.count > 1:
            torch.manual_seed(config.loop.seed + self.processes.rank)  # every process has noise of its own

    def _check(self) -> None:
        sharded = self.processes.sharded
        if sharded and self.dtype == torch.float16:
            raise ValueError("loop.precision=float16 does not work with FSDP; use bfloat16, or DDP.")
        if sharded and self.stage.branches:
            raise ValueError(f"{self.stage.name}: its batches use different layers, which FSDP cannot do; use DDP.")

    def _assert_separate(self) -> None:
        trained = {id(p) for p in self.parameters}
        for name, module in self.stage.frozen.items():
            shared = [k for k, p in module.named_parameters() if id(p) in trained or p.requires_grad]
            assert not shared, f"{self.stage.name}: frozen network '{name}' would be trained at {shared[:3]}"

    def describe(self) -> str:
        """One line per network: trained or frozen, and how many parameters."""

        def millions(module: nn.Module) -> str:
            return f"{sum(p.numel() for p in module.parameters()) / 1e6:8.3f} M"

        several = f", {self.processes.count} processes" if self.processes.count > 1 else ""
        rows = [
            f"{self.stage.name}: device {self.device}, {str(self.dtype).removeprefix('torch.')}{several}",
            f"  trained {millions(self.stage.trainable)}  {type(self.stage.trainable).__name__}",
        ]
        return "\n".join(rows + [f"  frozen  {millions(m)}  {name}" for name, m in self.stage.frozen.items()])

    def save(self) -> None:
        """Everything needed to go on, atomically; older checkpoints beyond ``keep_last`` go."""
        rngs = self.processes.gathered(rng_state())
        state = {
            "config": to_dict(self.config),
            "step": self.step,
            "seen": self.seen,
            "elapsed": self.elapsed(),
            "recent": self.recent,
            "network": whole(self.stage.trainable.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "average": whole(self.average.state_dict()) if self.average else None,
            "scaler": self.scaler.state_dict(),
            "sampler": self.stage.sampler.state_dict(),
            "rng": rngs[0],
            "other_rngs": rngs[1:],
        }
        if self.processes.main:
            path = checkpoint_file(self.run_dir, self.step)
            write_atomically(path, lambda file: torch.save(state, file))
            before = [old for old in checkpoints(self.run_dir) if old < path]  # a later one was damaged
            for old in before[max(1, self.config.loop.keep_last) - 1 :]:
                old.unlink()
        self.processes.wait()

    def resume(self) -> bool:
        """Load the newest checkpoint that is whole, if there is one.

        With another number of processes it goes on, too, but they draw new noise.

        Raises:
            ValueError: there are checkpoints and all are damaged, or a finished run has none to be finished from again.
        """
        found = newest_checkpoint(self.run_dir) if self.processes.main else None
        path = self.processes.gathered(found and found[0])[0]
        if path is None:
            if (self.run_dir / SUMMARY).exists():
                raise ValueError(
                    f"'{self.run_dir}' was finished, has damaged results, and has no checkpoint to write them from; "
                    "delete the folder to train it again."
                )
            return False
        state = found[1] if found else read_checkpoint(path)
        own = self.stage.trainable.state_dict()
        self.stage.trainable.load_state_dict({k: sharded_like(v, own[k]) for k, v in state["network"].items()})
        for index, values in state["optimizer"]["state"].items():
            p = self.parameters[index]
            values.update({k: sharded_like(v, p) for k, v in values.items() if isinstance(v, Tensor)})
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            shadow = state["average"]["shadow"]
            shadow.update({k: sharded_like(v, self.average.shadow[k]) for k, v in shadow.items()})
            self.average.load_state_dict(state["average"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.stage.sampler.load_state_dict(state["sampler"])
        self.step, self.seen, self.elapsed_before = state["step"], state["seen"], state["elapsed"]
        self.recent = state["recent"]
        rngs = [state["rng"], *state.get("other_rngs", [])]
        if len(rngs) == self.processes.count:
            restore_rng(rngs[self.processes.rank])
        return True

    def elapsed(self) -> float:
        """Seconds spent in the loop, over all resumes."""
        return self.elapsed_before + time.monotonic() - self.started

    def progress(self) -> float:
        """0 at the start, 1 when the steps or the minutes are used up."""
        loop = self.config.loop
        by_time = self.elapsed() / 60 / loop.minutes if loop.minutes else 0.0
        return max(self.step / max(1, loop.steps), by_time)

    def autocast(self, on: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=on and self.dtype != torch.float32)

    def one_step(self, progress: float | None = None) -> dict[str, float]:
        """Draw ``accumulate`` batches, descend once. Returns the losses."""
        progress = self.progress() if progress is None else progress
        rate = learning_rate(self.config.optimizer, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        passes = [self.one_pass(progress, index) for index in range(self.config.loop.accumulate)]
        self.scaler.unscale(self.optimizer)
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.grad_clip)))
        if not self.scaler.accepts(norm):
            raise FloatingPointError(
                f"{self.stage.name}: the gradient is not finite at step {self.step}; lower optimizer.lr "
                f"(the newest checkpoint in '{self.run_dir}' is from before)."
            )
        self.scaler.step(self.optimizer)
        if self.average:
            self.average.update(self.stage.trainable)
        self.step += 1
        values = {name: sum(losses[name] for losses in passes) / len(passes) for name in passes[0]}
        for name, value in values.items():
            self.recent[name] = (self.recent.get(name, []) + [value])[-200:]
        return {**values, "lr": rate, "grad_norm": norm}

    def one_pass(self, progress: float, index: int) -> dict[str, float]:
        """Forward and backward pass number ``index`` of a step; the mean over its batches is what is minimised."""
        passes = self.config.loop.accumulate
        batch = next(self.stage.sampler)
        part, weight = self.processes.share(batch)
        with self.processes.gradients(self.call, last=index == passes - 1):
            with self.autocast():
                losses = self.call(self.stage.loss, part, progress)
            loss = losses["loss"] if passes == 1 and weight == 1 else losses["loss"] * (weight / passes)
            self.scaler.scale(loss).backward()
        self.seen += self.stage.samples(batch)
        return self.processes.mean({name: weight * float(value.detach()) for name, value in losses.items()})

    def validate(self) -> dict[str, float]:
        """The stage's validation on averaged weights, without touching the training's random numbers.

        All processes run it, as sharded weights need; the first one's picture is kept.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        applied = self.average.applied(self.stage.trainable) if self.average else contextlib.nullcontext()
        call = self.call if self.processes.sharded else _directly
        with (
            tempfile.TemporaryDirectory() as elsewhere,
            torch.random.fork_rng(devices),
            torch.no_grad(),
            applied,
            self.autocast(self.frozen_dtype != torch.float32),
        ):
            folder = self.run_dir / "validation" if self.processes.main else Path(elsewhere)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(self.config.loop.seed)
            self.stage.trainable.eval()
            values = call(self.stage.validate, folder / f"step-{self.step:08d}.png")
            self.stage.trainable.train()
        return {f"validation/{name}": value for name, value in values.items()}

    def run(self) -> dict[str, Any]:
        """Train to the end (or raise ``Interrupted`` after saving) and write the network and the summary."""
        loop, main = self.config.loop, self.processes.main
        self.started = time.monotonic()
        resumed = self.resume()
        if main:
            print(self.describe() + (f"\n  resumed at step {self.step}" if resumed else ""), flush=True)
        log = RunLog(self.run_dir, self.step, main)
        with (
            _Signals() as signals,
            tqdm(total=loop.steps, initial=self.step, desc=self.stage.name, mininterval=5, disable=not main) as bar,
        ):
            while True:
                progress, received = self.processes.agree(self.progress(), signals.received)
                if received is not None:
                    self._stop(received)
                if progress >= 1:
                    break
                values = self.one_step(progress)
                bar.update()
                if self.step % loop.log_every == 0:
                    speed = self.seen / max(1e-9, self.elapsed())
                    bar.set_postfix_str(
                        f"loss {np.mean(self.recent['loss'][-50:]):.4f}, {speed:.1f} img/s", refresh=False
                    )
                    log.write(self.step, {**values, "samples": self.seen, "minutes": self.elapsed() / 60})
                if self.step % loop.validate_every == 0:
                    log.write(self.step, self.validate())
                if self.step % loop.checkpoint_every == 0:
                    self.save()
        self.save()
        return self._finish(log)

    def _stop(self, received: int) -> None:
        self.save()
        raise Interrupted(
            f"{self.stage.name}: stopped by {signal.Signals(received).name} and saved at step {self.step}; "
            "the same command continues."
        )

    def _finish(self, log: RunLog) -> dict[str, Any]:
        minutes = self.elapsed() / 60
        if self.average:
            self.average.copy_to(self.stage.trainable)
            self.average = None
        validation = self.validate()
        log.write(self.step, validation)
        summary = {
            "stage": self.stage.name,
            "steps": self.step,
            "samples": self.seen,
            "minutes": round(minutes, 3),
            "samples_per_second": round(self.seen / max(1e-9, 60 * minutes), 2),
            "device": str(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
            "processes": self.processes.count,
            "losses": {name: float(np.mean(v)) for name, v in self.recent.items()},
            **validation,
        }
        put_together(self.call)
        if self.processes.main:
            self._write(summary)
        self.processes.wait()
        return summary

    def _write(self, summary: dict[str, Any]) -> None:
        self.stage.trainable.eval()
        with torch.no_grad():
            self.stage.finish(self.run_dir, summary)
        summary["sha256"] = {file.name: file_hash(file) for file in sorted(self.run_dir.glob("*.safetensors"))}
        write_text(self.run_dir / SUMMARY, json.dumps(summary, indent=1))


def _directly(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def finished(run_dir: str | Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None; also None, after a word about it, if it or a network is damaged."""
    path = Path(run_dir) / SUMMARY
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or no text at all
        summary = None
    if not isinstance(summary, dict) or not SUMMARY_ENTRIES <= summary.keys():
        damaged = path
    else:
        digests = {path.parent / name: digest for name, digest in summary.get("sha256", {}).items()}
        damaged = next((p for p, digest in digests.items() if not p.is_file() or file_hash(p) != digest), None)
    if damaged is None:
        return summary
    print(f"'{damaged}' is damaged or gone; it is written again from the newest checkpoint.", file=sys.stderr)
    return None


def train(
    stage: Stage, config: StageConfig, device: torch.device, processes: Processes | None = None
) -> dict[str, Any]:
    """Run (or continue) one stage in ``config.run_dir`` and return its summary.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; everything is saved.
        ValueError: the folder holds a run with other settings.
    """
    processes = processes or Processes(device)
    with processes.main_first():
        check_config(Path(config.run_dir), config)
    return Trainer(stage, config, device, processes).run()


def run_stage(build: Any, config: StageConfig) -> dict[str, Any]:
    """``build(config, device) -> Stage``, trained in its run folder; a finished folder returns its summary at once."""
    done = finished(config.run_dir)
    if done is not None:
        print(f"{done['stage']}: '{config.run_dir}' is finished (delete the folder to train it again).")
        return done
    device = prepare(config.loop)
    processes = join(config.loop.device) or Processes(device)
    try:
        with processes.main_first():  # it encodes the latents
            stage = build(config, processes.device)
        return train(stage, config, processes.device, processes)
    finally:
        processes.leave()
