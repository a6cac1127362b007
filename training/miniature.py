"""The miniature: the whole system, base model included, trained small on rendered heads by one command.

    python -m training.miniature --preset cpu --out runs/miniature [--data DIR] [--ict ict_model.npz] [--export]
        [--start weights/miniature]

Renders the data if they are not there, then trains every network in order, each in a folder of its own. Whatever
is finished is skipped, whatever was stopped is resumed. Ends with a table of what each stage took. `--export` also
writes the networks in half precision to weights/miniature, where the ComfyUI nodes find them. `--start` continues
from networks that are there, in place of fresh ones; of the autoencoder only the decoder is trained then.
"""

from __future__ import annotations

import argparse
import json
import sys
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
from .engine.command import exit_status
from .engine.config import load_config
from .engine.loop import finished, run_stage
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


def render_data(preset: str, data: Path, ict: Path | None) -> None:
    """Render the preset's dataset; one that is complete is left as it is, an interrupted one continues."""
    manifest = data / "manifest.jsonl"
    if manifest.is_file():
        try:
            read_manifest(data)
            print(f"data: '{data}' is there.")
            return
        except DataError as error:
            if not (data / "settings.json").is_file():  # rendered by nobody here
                raise
            print(f"data: {error}", file=sys.stderr)
    settings = yaml.safe_load((CONFIGS / preset / "render.yaml").read_text(encoding="utf-8"))
    arguments = ["--out", str(data)]
    for key, value in settings.items():
        arguments += [f"--{key.replace('_', '-')}", str(value)]
    if ict is not None:
        arguments += ["--ict", str(ict)]
    if render.main(arguments) != 0:
        raise ValueError(f"Rendering to '{data}' failed; the message is above.")


def run(
    preset: str, out: Path, data: Path, ict: Path | None, overrides: list[str], start: Path | None = None
) -> list[dict[str, Any]]:
    """Data and all stages; `overrides` apply to every stage. Returns the stages' summaries in order."""
    configs = [  # all of them first: a typing error must not cost hours
        load_config(
            stage.config_class,
            CONFIGS / preset / f"{stage.name}.yaml",
            [*stage_overrides(stage, out, data, start), *overrides],
        )
        for stage in STAGES
    ]
    render_data(preset, data, ict)
    return [run_stage(stage.build, config) for stage, config in zip(STAGES, configs, strict=True)]


def table(summaries: list[dict[str, Any]]) -> str:
    """What each stage took, one line each."""
    lines = [f"{'stage':<18}{'minutes':>9}{'steps':>9}{'samples':>10}{'samples/s':>11}{'loss':>10}   validation"]
    for s in summaries:
        validation = ", ".join(
            f"{k.removeprefix('validation/')} {v:.4g}" for k, v in s.items() if k.startswith("validation/")
        )
        lines.append(
            f"{s['stage']:<18}{s['minutes']:>9.1f}{s['steps']:>9}{s['samples']:>10}{s['samples_per_second']:>11.1f}"
            f"{s['losses']['loss']:>10.4f}   {validation}"
        )
    lines.append(f"{'total':<18}{sum(s['minutes'] for s in summaries):>9.1f}")
    return "\n".join(lines)


def export(out: Path, weights: Path) -> list[Path]:
    """Copy a finished run's networks to `weights` in half precision, shards below 16 MiB, metadata kept."""
    written = []
    for stage in STAGES:
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
    config = dict(training.get("config", {}))
    for key in ("run_dir", "latents_dir", "inputs"):
        config.pop(key, None)
    if "data" in config:
        config["data"] = {k: v for k, v in config["data"].items() if k != "root"}
    return {**training, "config": config}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m training.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--preset", choices=PRESETS, default="cpu", help="cpu: 128 px, hours on two cores; gpu: 256 px")
    p.add_argument("--out", type=Path, default=Path("runs/miniature"), help="folder of the run")
    p.add_argument("--data", type=Path, help="multi-view dataset; rendered if absent (default: OUT/data)")
    p.add_argument("--ict", type=Path, help="ICT face model (.npz) to render people from; without it all are analytic")
    p.add_argument("--start", type=Path, help="folder of six networks to start from, e.g. weights/miniature")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
                   help="override a value of every stage, e.g. loop.threads=1")  # fmt: skip
    p.add_argument("--threads", type=int, help="torch threads (short for --set loop.threads=N)")
    p.add_argument("--export", action="store_true", help="write weights/miniature at the end")
    p.add_argument("--weights", type=Path, default=Path("weights/miniature"), help="where --export writes")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    overrides = list(arguments.overrides)
    if arguments.threads is not None:
        overrides.append(f"loop.threads={arguments.threads}")
    data = arguments.data or arguments.out / "data"

    def work() -> None:
        summaries = run(arguments.preset, arguments.out, data, arguments.ict, overrides, arguments.start)
        print("\n" + table(summaries))
        if arguments.export:
            files = export(arguments.out, arguments.weights)
            size = sum(f.stat().st_size for f in files) / 2**20
            print(f"{len(files)} files, {size:.1f} MiB, written to '{arguments.weights}'.")

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
