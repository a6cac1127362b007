"""One small explicit training loop, shared by all stages.

A stage brings its networks, its batches and its loss (`training.engine.stage`); `run_stage` does the rest: AdamW,
warm-up and decay, gradient accumulation and clipping, an average of the weights, logs, validation, checkpoints,
resuming. A run has one folder:

    config.yaml  log.jsonl  tensorboard/  validation/*.png  checkpoints/step-*.pt  summary.json  <network>.safetensors

`summary.json` is written last: a folder that has it is finished, any other resumes from its newest checkpoint. Files
of the run that are damaged are named and replaced: by the checkpoint before, or by what a checkpoint holds. On a
CPU and limited by steps a resumed run of one process gives the same bits as an uninterrupted one.

`accelerate launch -m training.<stage>` runs it in several processes (see `training.engine.distributed`).
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from diffportrait3d.files import file_hash, write_text, writing

from .config import StageConfig, to_dict
from .device import pick_precision, prepare
from .distributed import Call, init, shard
from .log import RunLog
from .optimizer import build_optimizer, learning_rate, restore_optimizer, set_rate
from .precision import cast_weights, casts_once, norms_in_type_of_weights
from .stage import Stage
from .state import (
    CONFIG,
    EMA,
    check_settings,
    newest_checkpoint,
    read_checkpoint,
    restore_rng,
    rng_state,
    write_checkpoint,
)
from .steps import DeviceClock, Pass, Steps, recorder_for

SUMMARY = "summary.json"
SUMMARY_ENTRIES = {"stage", "steps", "samples", "minutes", "samples_per_second", "losses"}
# Below this the loss overflows whatever its scale: the run has diverged.
SMALLEST_SCALE = 1.0
RECENT = 200  # steps whose losses the summary averages


class Interrupted(Exception):
    """The run was stopped by a signal after saving; the same command continues it."""


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list, so that a run stops between two steps."""
    received: list[int] = []
    before = {}
    with contextlib.suppress(ValueError):  # only the main thread may install handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """State and mechanics of one run."""

    def __init__(self, stage: Stage, config: StageConfig, accelerator: Accelerator):
        self.stage, self.config, self.accelerator, self.device = stage, config, accelerator, accelerator.device
        self.run_dir, self.main = Path(config.run_dir), accelerator.is_main_process
        self.dtype = pick_precision(config.loop.precision, self.device)
        frozen_dtype = self.dtype if config.loop.frozen_precision == "training" else torch.float32
        for name, module in stage.frozen.items():
            module.to(self.device, torch.float32 if name in stage.full_precision else frozen_dtype)
        stage.trainable.to(self.device)
        stage.freeze(config.loop.checkpointing)
        self.call = accelerator.prepare_model(Call(stage.trainable))
        self.cast_once = casts_once(config, self.dtype, accelerator.num_processes)
        if self.cast_once:
            for module in (stage.trainable, *stage.frozen.values()):
                norms_in_type_of_weights(module)
        self.parameters = list(stage.trainable.parameters())
        self._assert_separate()
        self.optimizer = build_optimizer(config.optimizer, self.parameters)
        recorder = recorder_for(config, self.device, accelerator.num_processes, self.dtype)
        self.steps, self.clock = Steps(stage.name, self.descend, recorder), DeviceClock(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = EMA(stage.trainable, config.optimizer.ema) if config.optimizer.ema else None
        self.step, self.seen, self.elapsed_before, self.started = 0, 0, 0.0, time.monotonic()
        self.recent: dict[str, list[float]] = {}
        self.names: list[str] = []  # of a step's values
        self.rate = 0.0
        self.unread: list[Tensor] = []  # values of the latest steps, still on the device
        if accelerator.num_processes > 1:
            torch.manual_seed(config.loop.seed + accelerator.process_index)  # every process has noise of its own

    def _assert_separate(self) -> None:
        trained = {id(p) for p in self.parameters}
        for name, module in self.stage.frozen.items():
            shared = [k for k, p in module.named_parameters() if id(p) in trained or p.requires_grad]
            assert not shared, f"{self.stage.name}: frozen network '{name}' would be trained at {shared[:3]}"

    def describe(self) -> str:
        """One line per network: trained or frozen, and how many parameters."""
        count, trained = self.accelerator.num_processes, self.stage.trainable
        rows = [f"{self.stage.name}: device {self.device}, {_name(self.dtype)}" + f", {count} processes" * (count > 1)]
        networks = [("trained", type(trained).__name__, trained), *(("frozen", *f) for f in self.stage.frozen.items())]
        for state, name, module in networks:
            rows.append(f"  {state:<8}{sum(p.numel() for p in module.parameters()) / 1e6:8.3f} M  {name}")
        return "\n".join(rows)

    def save(self) -> None:
        """Write everything needed to resume."""
        self.read()
        rngs = gather_object([rng_state()])
        if self.main:
            state = {
                "config": to_dict(self.config),
                "step": self.step,
                "seen": self.seen,
                "elapsed": self.elapsed(),
                "recent": self.recent,
                "network": self.stage.trainable.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.ema.state_dict() if self.ema else None,
                "scaler": self.scaler.state_dict(),
                "sampler": self.stage.sampler.state_dict(),
                "rng": rngs[0],
                "other_rngs": rngs[1:],
            }
            write_checkpoint(self.run_dir, state, self.config.loop.keep_last)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Load the newest intact checkpoint, if there is one.

        Another number of processes resumes, too, but with new noise.

        Raises:
            ValueError: the run was started with other settings, all checkpoints are damaged, or a finished run has none
                to be finished from again.
        """
        found = newest_checkpoint(self.run_dir) if self.main else None
        path = gather_object([found and found[0]])[0]
        if path is None:
            if (self.run_dir / SUMMARY).exists():
                raise ValueError(
                    f"'{self.run_dir}' was finished, has damaged results, and has no checkpoint to write them from; "
                    "delete the folder to train it again."
                )
            return False
        state = found[1] if found else read_checkpoint(path)
        check_settings(self.run_dir, state["config"], self.config)
        self.stage.trainable.load_state_dict(state["network"])
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["average"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.stage.sampler.load_state_dict(state["sampler"])
        self.step, self.seen, self.elapsed_before = state["step"], state["seen"], state["elapsed"]
        self.recent = state["recent"]
        rngs = [state["rng"], *state.get("other_rngs", [])]
        if len(rngs) == self.accelerator.num_processes:
            restore_rng(rngs[self.accelerator.process_index])
        return True

    def elapsed(self) -> float:
        """Seconds of training, over all resumes."""
        return self.elapsed_before + time.monotonic() - self.started

    def progress(self) -> float:
        """0 at the start, 1 when the steps or the minutes are used up."""
        loop = self.config.loop
        by_time = self.elapsed() / 60 / loop.minutes if loop.minutes else 0.0
        return max(self.step / max(1, loop.steps), by_time)

    def autocast(self, on: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=on and self.dtype != torch.float32)

    def one_step(self, progress: float) -> None:
        """Draw `accumulate` batches, descend once; nothing waits for the device. `read` gives the losses."""
        if len(self.unread) == RECENT:
            self.read()
        self.rate = learning_rate(self.config.optimizer, self.step, progress)
        set_rate(self.optimizer, self.rate)
        self.optimizer.zero_grad(set_to_none=True)
        passes = [self.draw(progress) for _ in range(self.config.loop.accumulate)]
        with self.clock:
            values = self.steps(passes)
        if self.ema:
            self.ema.update(self.stage.trainable)
        self.step += 1
        self.unread.append(values.clone())

    def draw(self, progress: float) -> Pass:
        """The next batch, as far as it is this process's."""
        variant = self.stage.variant(progress)
        batch = next(self.stage.sampler)
        self.seen += self.stage.samples(batch, variant)
        part, weight = shard(batch, self.accelerator)
        return Pass(self.stage.inputs(part, variant), variant, weight)

    def losses(self, inputs: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
        """The stage's, of a batch."""
        with self.autocast():
            if not self.cast_once:
                return self.call(self.stage.loss, inputs, variant)
            weights = cast_weights(self.call, self.dtype)
            return functional_call(self.call, weights, (self.stage.loss, inputs, variant))

    def descend(self, passes: list[Pass]) -> Tensor:
        """One step, all of it on the device: its losses and the gradient's norm, float64, in the order of `names`."""
        values = []
        for index, (inputs, variant, weight) in enumerate(passes):
            last = index == len(passes) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.call):
                losses = self.losses(inputs, variant)
                self.scaler.scale(losses["loss"] * (weight / len(passes))).backward()
            values.append(torch.stack([loss.detach().double() for loss in losses.values()]) * weight)
            self.names = [*losses, "grad_norm"]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        means = self.accelerator.reduce(sum(values) / len(passes), "mean")
        return torch.cat([means, norm.double()[None]])

    def read(self) -> dict[str, float]:
        """Losses, rate and gradient's norm of the latest step; waits for the device.

        Raises:
            FloatingPointError: a gradient was not finite (float16 skips steps while it searches for its scale).
        """
        if not self.unread:
            return {}
        rows = torch.stack(self.unread).tolist()
        self.unread.clear()
        broken = next((number for number, row in enumerate(rows) if not math.isfinite(row[-1])), None)
        if broken is not None and self.scaler.get_scale() <= SMALLEST_SCALE:
            raise FloatingPointError(
                f"{self.stage.name}: the gradient is not finite at step {self.step - len(rows) + broken}; lower "
                f"optimizer.lr (the newest checkpoint in '{self.run_dir}' is from before)."
            )
        for name, column in zip(self.names[:-1], zip(*rows, strict=True), strict=False):
            self.recent[name] = [*self.recent.get(name, []), *column][-RECENT:]
        values = dict(zip(self.names, rows[-1], strict=True))
        return {**values, "lr": self.rate}

    def validate(self) -> dict[str, float]:
        """The stage's validation on averaged weights, without touching the training's random numbers."""
        image = self.run_dir / "validation" / f"step-{self.step:08d}.png"
        with writing(image.parent):
            image.parent.mkdir(parents=True, exist_ok=True)
        with (
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            torch.no_grad(),
            self.ema.applied(self.stage.trainable) if self.ema else contextlib.nullcontext(),
            self.autocast(self.config.loop.frozen_precision == "training"),
        ):
            torch.manual_seed(self.config.loop.seed)
            self.stage.trainable.eval()
            values = self.stage.validate(image)
            self.stage.trainable.train()
        return {f"validation/{name}": value for name, value in values.items()}

    def run(self) -> dict[str, Any]:
        """Train to the end and write the network and the summary.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived in any process; everything is saved.
        """
        loop = self.config.loop
        resumed = self.resume()
        if self.main:
            write_text(self.run_dir / CONFIG, yaml.safe_dump(to_dict(self.config), sort_keys=False))
            print(self.describe() + (f"\n  resumed at step {self.step}" if resumed else ""), flush=True)
        log = RunLog(self.run_dir, self.step, self.main)
        bar = tqdm(total=loop.steps, initial=self.step, desc=self.stage.name, mininterval=5, disable=not self.main)
        with caught_signals() as received, bar:
            while True:
                everyone = gather_object([(self.progress(), *received[:1])])  # all end at the same step
                stops = [signals[0] for _, *signals in everyone if signals]
                if stops:
                    self.save()
                    raise Interrupted(
                        f"{self.stage.name}: stopped by {signal.Signals(stops[0]).name} and saved at step {self.step}; "
                        "the same command continues."
                    )
                progress = everyone[0][0]
                if progress >= 1:
                    break
                self.one_step(progress)
                bar.update()
                if self.step % loop.log_every == 0:
                    values = self.read()
                    recent, speed = np.mean(self.recent["loss"][-50:]), self.seen / max(1e-9, self.elapsed())
                    bar.set_postfix_str(f"loss {recent:.4f}, {speed:.1f} img/s", refresh=False)
                    log.write(self.step, {**values, "samples": self.seen, "minutes": self.elapsed() / 60})
                if self.step % loop.validate_every == 0 and self.main:
                    log.write(self.step, self.validate())
                if self.step % loop.checkpoint_every == 0:
                    self.save()
        self.save()
        return gather_object([self._finish(log) if self.main else {}])[0]

    def _finish(self, log: RunLog) -> dict[str, Any]:
        minutes, busy = self.elapsed() / 60, max(1e-9, self.clock.seconds())
        here = max(1e-9, 60 * minutes - self.elapsed_before)  # seconds of this process
        if self.ema:
            self.ema.copy_to(self.stage.trainable)
        self.ema = None
        validation = self.validate()
        log.write(self.step, validation)
        summary = {
            "stage": self.stage.name,
            "steps": self.step,
            "samples": self.seen,
            "minutes": round(minutes, 3),
            "samples_per_second": round(self.seen / max(1e-9, 60 * minutes), 2),
            "device": str(self.device),
            "precision": _name(self.dtype),
            "processes": self.accelerator.num_processes,
            "losses": {name: float(np.mean(v)) for name, v in self.recent.items()},
            "idle_share": round(max(0.0, 1 - busy / here), 4),
            "tflops_per_second": round(self.steps.flops() / busy / 1e12, 4),
            "costs": {"+".join(variants): cost._asdict() for variants, cost in self.steps.costs.items()},
            **validation,
        }
        self.stage.trainable.eval()
        with torch.no_grad():
            self.stage.finish(self.run_dir, summary)
        summary["sha256"] = {file.name: file_hash(file) for file in sorted(self.run_dir.glob("*.safetensors"))}
        write_text(self.run_dir / SUMMARY, json.dumps(summary, indent=1))
        return summary


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def finished(run_dir: str | Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None; also None, after a message, if it or a network is damaged."""
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


def run_stage(build: Callable[[Any, torch.device], Stage], config: StageConfig) -> dict[str, Any]:
    """Train (or resume) a stage in its run folder and return its summary; a finished folder returns it at once.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; everything is saved.
        ValueError: the folder holds a run with other settings.
    """
    done = finished(config.run_dir)
    if done is not None:
        print(f"{done['stage']}: '{config.run_dir}' is finished (delete the folder to train it again).")
        return done
    accelerator = init(prepare(config.loop))
    try:
        with accelerator.main_process_first():  # it encodes the latents
            stage = build(config, accelerator.device)
        return Trainer(stage, config, accelerator).run()
    finally:
        accelerator.end_training()
