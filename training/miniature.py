"""The miniature: the whole system, base model included, trained small on rendered heads by one command.

    python -m training.miniature --preset cpu --out runs/miniature [--data DIR] [--ict ict_model.npz] [--export]
        [--start weights/miniature]

Renders the data if they are not there, then trains every network in order, each in a folder of its own. Whatever
is finished is skipped, whatever was stopped is resumed. Ends with a table of what each stage took. `--export` also
writes the networks in half precision to weights/miniature, where the ComfyUI nodes find them. `--start` continues
from networks that are there, in place of fresh ones; of the autoencoder only the decoder is trained then.

    python -m training.miniature --preset gpu --minutes 10 --out DIR

`--minutes` is the time for all of it. The preset's shares divide it among the stages, people are rendered beside the
first one, and a page shows the result (DIR/report.html). A run that was killed continues with the time that is left.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from diffportrait3d.command import run_main
from diffportrait3d.networks import NETWORKS
from diffportrait3d.weights.files import facts_of, load_network, save_network

from . import render
from .autoencoder import AutoencoderStage
from .base import BaseStage
from .dataset.images import DataError, read_manifest
from .engine.background import Background
from .engine.budget import Budget, BudgetConfig, trained_seconds
from .engine.command import exit_status
from .engine.config import StageConfig, load_config
from .engine.loop import finished, run_stage
from .engine.report import table, write_page
from .engine.stage import Stage
from .novel_view import NovelViewStage
from .reference import ReferenceStage
from .view_consistency import ViewConsistencyStage
from .view_control import ViewControlStage

CONFIGS = Path(__file__).parent / "configs"
PRESETS = ("cpu", "gpu", "smoke")
SHARD_BYTES = 15 * 2**20

# In the order in which they are trained.
STAGES: tuple[type[Stage], ...] = (
    AutoencoderStage,
    BaseStage,
    ReferenceStage,
    ViewControlStage,
    ViewConsistencyStage,
    NovelViewStage,
)


def network_file(out: Path, stage: type[Stage]) -> Path:
    """Where a stage of the run `out` writes its network."""
    return out / stage.name / f"{stage.kind}.safetensors"


def stage_overrides(stage: type[Stage], out: Path, data: Path, start: Path | None = None) -> list[str]:
    """What ties a preset's stage to this run: folders, data, the networks it builds on, and the one it starts from."""
    values = {"run_dir": out / stage.name, "data.root": data}
    needed = NETWORKS[stage.kind].needs
    values |= {f"inputs.{other.kind}": network_file(out, other) for other in STAGES if other.kind in needed}
    if "latents_dir" in stage.config_class.model_fields:
        values["latents_dir"] = out / "latents"  # encoded once for all stages
    if start is not None:
        values[f"inputs.{stage.kind}"] = start / f"{stage.kind}.safetensors"
    overrides = [f"{key}={json.dumps(str(value))}" for key, value in values.items()]
    if start is not None and "decoder_only" in stage.config_class.model_fields:
        overrides.append("decoder_only=true")  # the other networks know the latents of its encoder
    return overrides


def render_arguments(preset: str, data: Path, ict: Path | None) -> list[str]:
    """The command line of `training.render` for a preset's data set."""
    settings = yaml.safe_load((CONFIGS / preset / "render.yaml").read_text(encoding="utf-8"))
    arguments = ["--out", str(data), *(f"--ict={ict}" for _ in range(ict is not None))]
    return [*arguments, *(f"--{key.replace('_', '-')}={value}" for key, value in settings.items())]


def is_complete(data: Path) -> bool:
    """Whether there is a dataset of which nothing is left to render.

    Raises:
        DataError: it is damaged, and was not rendered here.
    """
    if not (data / "manifest.jsonl").is_file():
        return False
    try:
        return read_manifest(data)[0].get("complete", True)
    except DataError as error:
        if not (data / "settings.json").is_file():
            raise
        print(f"data: {error}", file=sys.stderr)
        return False


def stage_configs(options: argparse.Namespace, *more: str) -> list[StageConfig]:
    """The settings of all stages, before anything is done: a typing error must not cost hours. `more`: overrides."""
    return [
        load_config(
            stage.config_class,
            CONFIGS / options.preset / f"{stage.name}.yaml",
            [*stage_overrides(stage, options.out, options.data, options.start), *options.overrides, *more],
        )
        for stage in STAGES
    ]


def run(options: argparse.Namespace) -> None:
    """Data and all stages, and a table of what they took."""
    configs = stage_configs(options)
    if is_complete(options.data):
        print(f"data: '{options.data}' is there.")
    elif render.main(render_arguments(options.preset, options.data, options.ict)) != 0:
        raise ValueError(f"Rendering to '{options.data}' failed; the message is above.")
    print("\n" + table([run_stage(stage.build, config) for stage, config in zip(STAGES, configs, strict=True)]))
    if options.export:
        files = export(options.out, options.weights)
        size = sum(f.stat().st_size for f in files) / 2**20
        print(f"{len(files)} files, {size:.1f} MiB, written to '{options.weights}'.")


def run_minutes(options: argparse.Namespace) -> None:
    """The same within a fixed time, and a page about it. Every network is exported as soon as it is written.

    Raises:
        ValueError: the preset does not say how to divide the time.
    """
    path, out, data = CONFIGS / options.preset / "minutes.yaml", options.out, options.data
    if not path.is_file():
        raise ValueError(
            f"Preset '{options.preset}' has no {path.name}, which divides the time; use one that has, e.g. gpu."
        )
    settings = load_config(BudgetConfig, path)
    configs = stage_configs(options, f"loop.steps={10**9}")
    budget, summaries, beside = Budget(out, options.minutes, settings), [], 0.0
    with contextlib.ExitStack() as rendering:
        # Later stages want the data as they are by then.
        if finished(out / STAGES[0].name) is None and not is_complete(data):
            arguments = render_arguments(options.preset, data, options.ict)
            renderer = rendering.enter_context(Background("training.render", arguments, out / "render.log"))
            wait_for_people(data, settings.first_people, renderer)
        for stage, config in zip(STAGES, configs, strict=True):
            summary = run_stage(functools.partial(_timed, stage, budget), config)
            summaries.append({**summary, "planned_minutes": round(budget.planned(stage.name), 3)})
            rendering.close()
            beside = budget.note(sum(map(trained_seconds, map(Path, (c.run_dir for c in configs)))) - budget.begun)
            for file in export(out, options.weights, [stage]) if options.export else ():
                print(f"'{file}' is written.", flush=True)
    text = table(summaries, {"planned_minutes": budget.around(), "minutes": beside / 60})
    print(f"{options.minutes:g} minutes were given, {options.minutes - budget.left() / 60:.2f} taken.\n\n{text}")
    print(f"'{write_page(out, summaries, text)}' shows it.")


def _timed(stage: type[Stage], budget: Budget, config: StageConfig, device: torch.device) -> Stage:
    """The stage, and in its settings how long it may train."""
    built = stage.build(config, device)
    config.loop.minutes = budget.training_minutes(stage.name, Path(config.run_dir))
    return built


def wait_for_people(data: Path, count: int, renderer: Background) -> None:
    """Until `count` training people, or all, are there, and those of validation."""
    while True:
        working = renderer.running()
        try:
            splits = Counter(subject["split"] for subject in read_manifest(data)[1])
        except DataError:
            splits = Counter()
        if splits["train"] >= count and splits["val"] or not working:
            print(f"data: {splits['train']} training people to begin with.", flush=True)
            return
        time.sleep(0.2)


def export(out: Path, weights: Path, stages: Sequence[type[Stage]] = STAGES) -> list[Path]:
    """Copy a finished run's networks to `weights` in half precision, shards below 16 MiB, metadata kept."""
    written = []
    for stage in stages:
        path = network_file(out, stage)
        if finished(out / stage.name) is None:
            raise ValueError(f"Stage '{stage.name}' of '{out}' is not finished; run the recipe to its end first.")
        module, metadata = load_network(path)
        metadata = facts_of(metadata)
        metadata["training"] = without_paths(metadata.get("training", {}))
        target = weights / path.name
        written += save_network(target, module, stage.kind, torch.float16, max_shard_bytes=SHARD_BYTES, **metadata)
    return written


def without_paths(training: dict[str, Any]) -> dict[str, Any]:
    """A training summary without the folders of the machine it ran on."""
    folders = ("run_dir", "latents_dir", "inputs")
    config = {key: value for key, value in training.get("config", {}).items() if key not in folders}
    if "data" in config:
        config["data"] = {k: v for k, v in config["data"].items() if k != "root"}
    return {**training, "config": config}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="cpu: 128 px, hours on two cores; gpu: 256 px")
    add("--out", type=Path, default=Path("runs/miniature"), help="folder of the run")
    add("--data", type=Path, help="multi-view dataset; rendered if absent (default: OUT/data)")
    add("--ict", type=Path, help="ICT face model (.npz) to render people from; without it all are analytic")
    add("--start", type=Path, help="folder of six networks to start from, e.g. weights/miniature")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a value of every stage, e.g. loop.threads=1")  # fmt: skip
    add("--threads", type=int, help="torch threads (short for --set loop.threads=N)")
    add("--minutes", type=float, help="time for rendering and all stages together")
    add("--export", action="store_true", help="write weights/miniature at the end")
    add("--weights", type=Path, default=Path("weights/miniature"), help="where --export writes")
    options = parser.parse_args(argv)
    options.data = options.data or options.out / "data"
    if options.threads is not None:
        options.overrides = [*options.overrides, f"loop.threads={options.threads}"]
    return exit_status(lambda: run(options) if options.minutes is None else run_minutes(options))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
