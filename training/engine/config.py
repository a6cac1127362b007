"""Configuration: dataclasses filled from a YAML file and ``--set section.key=value`` overrides, checked strictly."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

# Settings of other trainers that must not exist here. 3D-aware noise works because SD1.5's last timestep still holds
# 7 % of the image, and because F predicts noise: these change the one or the other.
REFUSED = {
    "zero_snr", "enable_zero_snr", "zero_terminal_snr", "rescale_betas_zero_snr", "zsnr",
    "v_prediction", "v_parameterization", "prediction_type", "parameterization", "noise_offset",
}  # fmt: skip


class ConfigError(ValueError):
    """A configuration that names an unknown key or holds a value of the wrong type."""


@dataclass
class DataConfig:
    """Which multi-view dataset is read (``training.dataset.images`` documents the format)."""

    root: str = "runs/miniature/data"
    split: str = "train"
    validation_split: str = "val"
    flip: bool = True  # random horizontal mirroring, camera labels included
    on_device: bool = True  # pictures and latents stay in the device's memory; off: in the host's
    in_memory: bool = True  # pictures are read once; off: when a batch needs them (512 px take 0.8 MB each)

    def store(self, device: Any) -> Any:
        """Where pictures and latents are kept."""
        return device if self.on_device else "cpu"


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up, then a constant or decaying learning rate."""

    name: str = "adamw"  # adamw | adamw8bit (needs bitsandbytes)
    lr: float = 4e-4
    weight_decay: float = 1e-2
    warmup_steps: int = 100
    decay: str = "cosine"  # cosine | linear | constant
    final_lr_ratio: float = 0.02  # of lr, reached at progress 1
    grad_clip: float = 1.0
    ema: float | None = None  # decay of the weight average; None: the last weights are saved


@dataclass
class LoopConfig:
    """How long to train, what to write and how often, and on which device."""

    steps: int = 1000
    minutes: float | None = None  # wall-clock budget over all resumes; the earlier of both limits ends the run
    batch_size: int = 32  # samples of one pass, shared out over all processes
    accumulate: int = 1  # passes whose gradients make one step
    checkpointing: bool = False  # compute activations anew in the backward pass: less memory, a third more work
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2
    precision: str = "auto"  # auto | float32 | bfloat16 | float16; of computation, trained weights are in float32
    frozen_precision: str = "float32"  # of frozen weights in memory: float32 | training (that of precision)
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int | None = None  # torch intra-op threads


@dataclass
class StageConfig:
    """What all stages have in common; every stage's script extends it."""

    run_dir: str = "runs/stage"
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build dataclass ``cls`` from plain ``values``; nested dataclasses from nested mappings.

    Raises:
        ConfigError: an unknown key (the message lists the known ones) or a value that does not fit its type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the configuration'} must be a mapping of keys to values, not {values!r}.")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key in REFUSED:
            raise ConfigError(
                f"'{where}{key}' does not exist on purpose: zero terminal SNR, v-prediction and noise offsets destroy "
                "what 3D-aware noise relies on; remove it."
            )
        if key not in names:
            raise ConfigError(f"Unknown key '{where}{key}'; known here: {', '.join(sorted(names))}.")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if value is None:
        if type(None) in options:
            return None
        raise ConfigError(f"'{where}' must not be empty.")
    kind = next(option for option in options if option is not type(None))
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where + ".")
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        item = typing.get_args(kind)[0]
        return origin(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads "1e-4" as a string
        except ValueError:
            pass
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"'{where}' must be of type {getattr(origin, '__name__', origin)}, got {value!r}.")


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply one ``a.b=c`` override to a nested dict in place; ``c`` is read as YAML."""
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set wants section.key=value, got '{assignment}'.")
    *parents, last = path.strip().split(".")
    for parent in parents:
        node = values.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {path}: '{parent}' is a value, not a section.")
        values = node
    values[last] = yaml.safe_load(text) if text.strip() else None


def load_config(cls: type[T], path: str | Path | None, overrides: typing.Sequence[str] = ()) -> T:
    """Read a YAML file (or only defaults if ``path`` is None), apply overrides and check everything."""
    values: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"No configuration file at '{path}'; the presets lie in training/configs/.")
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"'{path}' must hold a mapping of keys to values.")
    for assignment in overrides:
        set_value(values, assignment)
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{path or 'defaults'}: {error}") from None


class Command(typing.NamedTuple):
    """What a stage's command line says.

    config: the checked configuration.
    plan: only say what the stage would take.
    resolution: of the pictures that are planned with, in pixels; None: the dataset's.
    processes: that share the batch in the plan.
    """

    config: typing.Any
    plan: bool
    resolution: int | None
    processes: int


def parse_arguments(cls: type, description: str, argv: typing.Sequence[str] | None = None) -> Command:
    """The command line that every stage shares: ``--config FILE --set a.b=c ... [--plan]``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", help="YAML file, e.g. training/configs/cpu/base.yaml")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override single values, e.g. loop.steps=100 data.root=DIR",
    )
    parser.add_argument("--plan", action="store_true", help="print parameters, memory and FLOPs of a step, and stop")
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="with --plan: of pictures not there yet")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="with --plan: that share the batch")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(cls, arguments.config, arguments.overrides)
        return Command(config, arguments.plan, arguments.resolution, arguments.processes)
    except (ConfigError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a configuration, lists for tuples, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))
