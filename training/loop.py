"""One small explicit training loop, shared by all stages.

A stage brings its networks, its batches and its loss (class ``Stage``); ``train`` does the rest: AdamW, warm-up and
decay, gradient clipping, an average of the weights, logs, validation, checkpoints, resuming. A run lives in one
folder::

    config.yaml  log.jsonl  tensorboard/  validation/*.png  checkpoints/step-*.pt  summary.json  <network>.safetensors

``summary.json`` is written last: a folder that has it is finished, any other resumes from its newest checkpoint. On a
CPU and limited by steps a resumed run gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import LoopConfig, OptimizerConfig, StageConfig
from .state import WeightAverage, check_config, newest_checkpoint, restore_rng, rng_state, write_atomically


class Interrupted(Exception):
    """The run was stopped by a signal after saving; the same command continues it."""


class Stage:
    """What one training script gives to the loop. Subclasses set the attributes and fill in the methods.

    Attributes:
        name: the stage's name, also its summary's.
        trainable: the one network whose parameters are trained.
        frozen: networks that take part but must not change; the loop puts them in eval mode without gradients.
        sampler: yields batches by ``next()``; its position is ``state_dict()`` / ``load_state_dict()``.
    """

    name: str
    trainable: nn.Module
    frozen: dict[str, nn.Module]
    sampler: Any

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """Losses of one batch; the entry "loss" is minimised, all are logged. May draw from torch's global RNG."""
        raise NotImplementedError

    def samples(self, batch: Any) -> int:
        """Number of training images in a batch."""
        return len(batch)

    def validate(self, picture: Path) -> dict[str, float]:
        """Numbers to log; writes a grid to ``picture``. Runs on the averaged weights under ``no_grad``."""
        return {}

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        """Write the trained network (averaged weights are in place)."""
        raise NotImplementedError


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and on CPUs with AMX tiles, else float32."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"loop.precision must be auto, float32 or bfloat16, not '{name}'.")
    return getattr(torch, name)


def prepare(config: LoopConfig) -> torch.device:
    """Set threads and seeds; returns the device. Call it before the networks are built."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    return pick_device(config.device)


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Learning rate of the 0-based ``step`` at ``progress`` in [0, 1] of the run."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = min(1.0, progress)
    floor = config.final_lr_ratio
    if config.decay == "constant":
        factor = 1.0
    elif config.decay == "linear":
        factor = 1.0 - (1.0 - floor) * progress
    elif config.decay == "cosine":
        factor = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"optimizer.decay must be cosine, linear or constant, not '{config.decay}'.")
    return config.lr * warmup * factor


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


class _Log:
    """log.jsonl and tensorboard; on resuming, lines after the checkpoint are dropped."""

    def __init__(self, run_dir: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "log.jsonl"
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            write_atomically(self.path, lambda p: p.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


class Trainer:
    """State and mechanics of one run; ``train`` below is its short form."""

    def __init__(self, stage: Stage, config: StageConfig, device: torch.device):
        self.stage, self.config, self.device = stage, config, device
        self.run_dir = Path(config.run_dir)
        self.dtype = pick_precision(config.loop.precision, device)
        for module in stage.frozen.values():
            module.to(device).eval().requires_grad_(False)
        stage.trainable.to(device).train().requires_grad_(True)
        self.parameters = list(stage.trainable.parameters())
        self._assert_separate()
        opt = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=opt.lr, betas=(0.9, 0.999), weight_decay=opt.weight_decay
        )
        self.average = WeightAverage(stage.trainable, opt.ema) if opt.ema else None
        self.step, self.seen, self.elapsed_before = 0, 0, 0.0
        self.recent: dict[str, list[float]] = {}

    def _assert_separate(self) -> None:
        trained = {id(p) for p in self.parameters}
        for name, module in self.stage.frozen.items():
            shared = [k for k, p in module.named_parameters() if id(p) in trained or p.requires_grad]
            assert not shared, f"{self.stage.name}: frozen network '{name}' would be trained at {shared[:3]}"

    def describe(self) -> str:
        """One line per network: trained or frozen, and how many parameters."""

        def millions(module: nn.Module) -> str:
            return f"{sum(p.numel() for p in module.parameters()) / 1e6:8.3f} M"

        rows = [
            f"{self.stage.name}: device {self.device}, {str(self.dtype).removeprefix('torch.')}",
            f"  trained {millions(self.stage.trainable)}  {type(self.stage.trainable).__name__}",
        ]
        return "\n".join(rows + [f"  frozen  {millions(m)}  {name}" for name, m in self.stage.frozen.items()])

    def save(self) -> None:
        """Everything needed to go on, atomically; older checkpoints beyond ``keep_last`` go."""
        state = {
            "step": self.step,
            "seen": self.seen,
            "elapsed": self.elapsed(),
            "recent": self.recent,
            "network": self.stage.trainable.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "sampler": self.stage.sampler.state_dict(),
            "rng": rng_state(),
        }
        folder = self.run_dir / "checkpoints"
        write_atomically(folder / f"step-{self.step:08d}.pt", lambda p: torch.save(state, p))
        for old in sorted(folder.glob("step-*.pt"))[: -max(1, self.config.loop.keep_last)]:
            old.unlink()

    def resume(self) -> bool:
        """Load the newest checkpoint, if there is one."""
        path = newest_checkpoint(self.run_dir)
        if path is None:
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.stage.trainable.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.stage.sampler.load_state_dict(state["sampler"])
        self.step, self.seen, self.elapsed_before = state["step"], state["seen"], state["elapsed"]
        self.recent = state["recent"]
        restore_rng(state["rng"])
        return True

    def elapsed(self) -> float:
        """Seconds spent in the loop, over all resumes."""
        return self.elapsed_before + time.monotonic() - self.started

    def progress(self) -> float:
        """0 at the start, 1 when the steps or the minutes are used up."""
        loop = self.config.loop
        by_time = self.elapsed() / 60 / loop.minutes if loop.minutes else 0.0
        return max(self.step / max(1, loop.steps), by_time)

    def one_step(self) -> dict[str, float]:
        """Draw a batch, descend once. Returns the losses."""
        progress = self.progress()
        rate = learning_rate(self.config.optimizer, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = next(self.stage.sampler)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.stage.loss(batch, progress)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{self.stage.name}: the gradient is not finite at step {self.step}; lower optimizer.lr "
                f"(the newest checkpoint in '{self.run_dir}' is from before)."
            )
        self.optimizer.step()
        if self.average:
            self.average.update(self.stage.trainable)
        self.step += 1
        self.seen += self.stage.samples(batch)
        values = {name: float(value.detach()) for name, value in losses.items()}
        for name, value in values.items():
            self.recent[name] = (self.recent.get(name, []) + [value])[-200:]
        return {**values, "lr": rate, "grad_norm": float(norm)}

    def validate(self) -> dict[str, float]:
        """The stage's validation on averaged weights, without touching the training's random numbers."""
        picture = self.run_dir / "validation" / f"step-{self.step:08d}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        devices = [self.device] if self.device.type == "cuda" else []
        applied = self.average.applied(self.stage.trainable) if self.average else contextlib.nullcontext()
        with torch.random.fork_rng(devices), torch.no_grad(), applied:
            torch.manual_seed(self.config.loop.seed)
            self.stage.trainable.eval()
            values = self.stage.validate(picture)
            self.stage.trainable.train()
        return {f"validation/{name}": value for name, value in values.items()}

    def run(self) -> dict[str, Any]:
        """Train to the end (or raise ``Interrupted`` after saving) and write the network and the summary."""
        loop = self.config.loop
        self.started = time.monotonic()
        resumed = self.resume()
        print(self.describe() + (f"\n  resumed at step {self.step}" if resumed else ""), flush=True)
        log = _Log(self.run_dir, self.step)
        last: dict[str, float] = {}
        with (
            _Signals() as signals,
            tqdm(total=loop.steps, initial=self.step, desc=self.stage.name, mininterval=5) as bar,
        ):
            while self.progress() < 1:
                values = self.one_step()
                bar.update()
                if self.step % loop.log_every == 0:
                    speed = self.seen / max(1e-9, self.elapsed())
                    bar.set_postfix_str(
                        f"loss {np.mean(self.recent['loss'][-50:]):.4f}, {speed:.1f} img/s", refresh=False
                    )
                    log.write(self.step, {**values, "samples": self.seen, "minutes": self.elapsed() / 60})
                if self.step % loop.validate_every == 0:
                    last = self.validate()
                    log.write(self.step, last)
                if signals.received is not None:
                    self.save()
                    raise Interrupted(
                        f"{self.stage.name}: stopped by {signal.Signals(signals.received).name} and saved at step "
                        f"{self.step}; the same command continues."
                    )
                if self.step % loop.checkpoint_every == 0:
                    self.save()
        self.save()
        return self._finish(log)

    def _finish(self, log: _Log) -> dict[str, Any]:
        minutes = self.elapsed() / 60
        if self.average:
            self.average.copy_to(self.stage.trainable)
            self.average = None
        validation = self.validate()
        log.write(self.step, validation)
        log.board.close()
        summary = {
            "stage": self.stage.name,
            "steps": self.step,
            "samples": self.seen,
            "minutes": round(minutes, 3),
            "samples_per_second": round(self.seen / max(1e-9, 60 * minutes), 2),
            "device": str(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
            "losses": {name: float(np.mean(v)) for name, v in self.recent.items()},
            **validation,
        }
        self.stage.trainable.eval()
        with torch.no_grad():
            self.stage.finish(self.run_dir, summary)
        write_atomically(
            self.run_dir / "summary.json", lambda p: p.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        )
        return summary


def finished(run_dir: str | Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    path = Path(run_dir) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def train(stage: Stage, config: StageConfig, device: torch.device) -> dict[str, Any]:
    """Run (or continue) one stage in ``config.run_dir`` and return its summary.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; everything is saved.
        ValueError: the folder holds a run with other settings.
    """
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    check_config(Path(config.run_dir), config)
    return Trainer(stage, config, device).run()


def run_stage(build: Any, config: StageConfig) -> dict[str, Any]:
    """``build(config, device) -> Stage``, trained in its run folder; a finished folder returns its summary at once."""
    done = finished(config.run_dir)
    if done is not None:
        print(f"{done['stage']}: '{config.run_dir}' is finished (delete the folder to train it again).")
        return done
    device = prepare(config.loop)
    return train(build(config, device), config, device)


def stage_main(build: Any, config: StageConfig) -> int:
    """Exit status of a stage's script; errors that a user can mend become one sentence."""
    try:
        summary = run_stage(build, config)
    except Interrupted as stop:
        print(stop, flush=True)
        return 130
    except (FileNotFoundError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", flush=True)
        return 1
    print(json.dumps(summary, indent=1))
    return 0
