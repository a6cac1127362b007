"""What a training step of every stage costs: kernels, bytes, FLOPs, waits, samples per second; of two checkouts.

    python -m evaluation.step_costs [--preset gpu] [--against DIR] [--stages base reference ...] [--set KEY=VALUE ...]
        [--seconds] [--rounds 3] [--losses 20] [--weights weights/miniature] [--out runs/step_costs.json]

Counted is a whole step at the preset's batch: sampler, noise, passes, clipping, AdamW, average. On a GPU it is
computed; on a CPU operators on large tensors give empty ones, in bfloat16 and with norms in the type that a GPU's
autocast gives them, so that a large GPU's step is counted in seconds. --seconds times steps, too: on a GPU at the
preset's batch, on a CPU in float32 at the smallest one. --against measures the loop of another checkout of this
repository in the same way, in a process of its own, round by round in turns; --losses trains so many steps by both, in
float32 at the smallest batch from the same random numbers. The networks that a stage builds on are read from --weights;
the data are one rendered person.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from diffportrait3d.command import run_main
from diffportrait3d.files import write_text
from diffportrait3d.networks import NETWORKS
from training import render
from training.miniature import CONFIGS, PRESETS, STAGES

from .speed.worker import Worker
from .studies.command import WEIGHTS, run_command
from .tables.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "evaluation/speed/measured_steps.py"
SMALLEST = {"autoencoder": 2, "base": 8, "reference": 1, "view_control": 1, "view_consistency": 1, "novel_view": 1}
TIMED_STEPS = 2
VIEWS = 9  # of the person: a reference and a group
RANGE = 60.0, 20.0  # degrees of yaw and pitch


def training_loop(checkout: Path) -> Worker:
    """A process with the training loop of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return Worker([sys.executable, "-P", str(WORKER)], cwd=checkout, env=environment)


def settings(stage: str, options: argparse.Namespace, data: Path, small: bool) -> tuple[str, str, list[str]]:
    """What a stage's trainer is built of."""
    trained = next(found for found in STAGES if found.name == stage)
    values = {f"inputs.{kind}": options.weights / f"{kind}.safetensors" for kind in NETWORKS[trained.kind].needs}
    values |= {"data.root": data, "run_dir": options.out.parent / "step_costs", "loop.precision": "bfloat16"}
    if "latents_dir" in trained.config_class.model_fields:
        values["latents_dir"] = data
    if small:
        values |= {"loop.precision": "float32", "loop.batch_size": SMALLEST[stage], "loop.threads": 1}
    if stage == "view_consistency":
        values["unconditional"] = 0.0  # every step the same
    overrides = [f"{key}={json.dumps(value if isinstance(value, int | float) else str(value))}"
                 for key, value in values.items()]  # fmt: skip
    config = f"training/configs/{options.preset}/{stage}.yaml"  # each checkout's own
    return stage, config, [*overrides, *options.overrides]


def measure(options: argparse.Namespace, checkouts: dict[str, Worker], data: Path) -> list[dict[str, Any]]:
    """A record per stage, with what each checkout takes."""
    records = []
    for stage in options.stages:
        record: dict[str, Any] = {"stage": stage}
        for name, checkout in checkouts.items():
            checkout.ask("build", *settings(stage, options, data, small=False))
            record[name] = checkout.ask("count")
        if options.losses:
            losses = []
            for checkout in checkouts.values():
                checkout.ask("build", *settings(stage, options, data, small=True))
                losses.append(checkout.ask("losses", options.losses))
            record["loss_difference"] = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
        if options.seconds:
            small = settings(stage, options, data, small=not torch.cuda.is_available())
            seconds = time_in_turns(checkouts, small, options.rounds)
            batch = checkouts["this"].ask("samples")
            for name, taken in seconds.items():
                record[name]["samples_per_second"] = batch / statistics.median(taken)
            if "other" in seconds:
                pairs = zip(seconds["other"], seconds["this"], strict=True)
                record["other_by_this"] = statistics.median(other / own for other, own in pairs)
        records.append(record)
        print(f"{stage} is measured", file=sys.stderr, flush=True)
    return records


def time_in_turns(checkouts: dict[str, Worker], small: tuple, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by every checkout, round by round, after one that warms up."""
    for checkout in checkouts.values():
        checkout.ask("build", *small)
        checkout.ask("time", 1)
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    for _ in range(rounds):
        for name, checkout in checkouts.items():
            seconds[name].append(checkout.ask("time", TIMED_STEPS))
    return seconds


def table(records: list[dict[str, Any]]) -> str:
    """A row per stage; of two checkouts "other -> this"."""
    rows = []
    for record in records:
        sides = [record[name] for name in ("other", "this") if name in record]
        row = {"stage": record["stage"], "samples": str(sides[-1]["samples"])}
        row["kernels"] = arrow(f"{sum(side['kernels'].values()):,}" for side in sides)
        row["GB"] = arrow(f"{sum(side['bytes'].values()) / 1e9:.1f}" for side in sides)
        row["TFLOP"] = arrow(f"{sum(side['flops'].values()) / 1e12:.2f}" for side in sides)
        row["waits"] = arrow(str(sum(side["waits"].values())) for side in sides)
        if "loss_difference" in record:
            row["losses differ by"] = f"{record['loss_difference']:.2g}"
        if "samples_per_second" in sides[-1]:
            row["samples/s"] = arrow(f"{side['samples_per_second']:.3g}" for side in sides)
            row["ratio"] = f"{record['other_by_this']:.2f}" if "other_by_this" in record else ""
        rows.append(row)
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def arrow(values) -> str:
    return " -> ".join(values)


def run(options: argparse.Namespace) -> None:
    options.weights, options.out = options.weights.resolve(), options.out.resolve()
    resolution = yaml.safe_load((CONFIGS / options.preset / "render.yaml").read_text(encoding="utf-8"))["resolution"]
    data = options.cache.resolve() / f"step_costs-{resolution}px"
    made = render.dataset_settings(resolution, VIEWS, *RANGE, 0.0, 2, 0)
    render.render_dataset(data, made, {"train": 1, "val": 1, "test": 0}, None)
    checkouts = {"this": training_loop(ROOT)}
    if options.against:
        checkouts["other"] = training_loop(options.against.resolve())
    try:
        records = measure(options, checkouts, data)
    finally:
        for checkout in checkouts.values():
            checkout.close()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = table(records)
    print(f"{device}, torch {torch.__version__}\n\n{text}")
    write_text(options.out, json.dumps({"device": device, "torch": torch.__version__, "records": records}, indent=1))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.step_costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in STAGES]
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="gpu", help="whose settings are measured (default %(default)s)")
    add("--stages", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    add("--against", type=Path, metavar="DIR", help="another checkout of this repository")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="of every stage")
    add("--seconds", action="store_true", help="time steps, too")
    add("--losses", type=int, default=0, metavar="STEPS", help="compare the losses of so many steps with --against's")
    add("--rounds", type=int, default=3, help="of timing (default %(default)s)")
    add("--weights", type=Path, default=WEIGHTS, help="folder of the networks that stages build on")
    add("--cache", type=Path, default=Path(".cache/evaluation"), help="where the person is rendered")
    add("--out", type=Path, default=Path("runs/step_costs.json"), help="results")
    options = parser.parse_args(arguments)
    if options.losses and not options.against:
        parser.error("--losses compares with the loop of --against DIR")
    return options


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
