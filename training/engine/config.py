"""Configuration: pydantic models filled from a YAML file and `--set section.key=value` overrides, checked strictly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from diffportrait3d.networks import NETWORKS

# Settings of other trainers that must not exist here. 3D-aware noise works because SD1.5's last timestep still holds
# 7 % of the image, and because F predicts noise: these change the one or the other.
REFUSED = {
    "zero_snr", "enable_zero_snr", "zero_terminal_snr", "rescale_betas_zero_snr", "zsnr",
    "v_prediction", "v_parameterization", "prediction_type", "parameterization", "noise_offset",
}  # fmt: skip

# YAML 1.1 reads "1e-4" as a string.
Number = Annotated[float, BeforeValidator(lambda value: float(value) if isinstance(value, str) else value)]


class ConfigError(ValueError):
    """A configuration with an unknown key or an invalid value; the message names it and what is allowed."""


class Settings(BaseModel):
    """A section of a configuration; unknown keys and values of another type are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True)


T = TypeVar("T", bound=Settings)


class DataConfig(Settings):
    """Which multi-view dataset is read (`training.dataset.images` documents the format)."""

    root: str = "runs/miniature/data"
    split: str = "train"
    validation_split: str = "val"
    flip: bool = Field(True, description="random horizontal mirroring, camera labels included")
    on_device: bool = Field(True, description="images and latents stay in the device's memory; off: in the host's")
    in_memory: bool = Field(True, description="images are read once; off: when needed (512 px take 0.8 MB each)")


# Files of the networks that a stage builds on, by their kinds. One of the kind that the stage itself trains is what it
# starts from, in place of fresh weights. Files of other projects that may be named, too, and what the empty prompt is
# without `context`: `training.engine.inputs`.
InputsConfig = create_model(
    "InputsConfig",
    __base__=Settings,
    **{kind: (str | None, None) for kind in NETWORKS},
    context=(str | None, Field(None, description="CLIP's states of the empty prompt")),
)


class OptimizerConfig(Settings):
    """AdamW with linear warm-up, then a constant or decaying learning rate."""

    name: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit needs bitsandbytes")
    lr: Number = 4e-4
    beta2: Number = Field(0.999, description="how long AdamW remembers squared gradients; 0.99: some hundred steps")
    weight_decay: Number = 1e-2
    warmup_steps: int = 100
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_ratio: Number = Field(0.02, description="of lr, reached at the end of the run")
    grad_clip: Number = 1.0
    ema: Number | None = Field(None, description="decay of the weight average; none: the last weights are saved")


class LoopConfig(Settings):
    """How long to train, what to write and how often, and on which device."""

    steps: int = 1000
    minutes: Number | None = Field(None, description="time limit over all resumes; the earlier limit ends the run")
    batch_size: int = Field(32, ge=1, description="samples of one pass, divided among all processes")
    accumulate: int = Field(1, ge=1, description="passes whose gradients make one step")
    checkpointing: bool = Field(False, description="recompute activations: less memory, a third more work")
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of computation; trained weights are in float32"
    )
    frozen_precision: Literal["float32", "training"] = Field(
        "float32", description="of frozen weights in memory; training: that of precision"
    )
    cast_once: bool = Field(
        True, description="in bfloat16 a step casts all weights at once, and norms compute in it; off: autocast alone"
    )
    graphs: bool = Field(True, description="on CUDA steps are recorded as graphs; off: their kernels come one by one")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, description="torch intra-op threads")


class StageConfig(Settings):
    """What all stages have in common; every stage's script extends it."""

    run_dir: str = "runs/stage"
    data: DataConfig = DataConfig()
    inputs: InputsConfig = InputsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()


def from_dict(cls: type[T], values: Any) -> T:
    """The settings `cls` with these values; what is not named has its default.

    Raises:
        ConfigError: unknown keys (the message lists the known ones) or invalid values.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentences(cls, error))) from None


def to_dict(config: Settings) -> dict[str, Any]:
    """Plain nested dict of a configuration, lists for tuples, ready for YAML or JSON."""
    return config.model_dump(mode="json")


def _sentences(cls: type[Settings], error: ValidationError) -> Iterator[str]:
    for found in error.errors():
        where = ".".join(map(str, found["loc"])) or "the configuration"
        if found["type"] != "extra_forbidden":
            yield f"'{where}': {found['msg'][0].lower()}{found['msg'][1:]}, not {found['input']!r}"
        elif found["loc"][-1] in REFUSED:
            yield (
                f"'{where}' does not exist on purpose: zero terminal SNR, v-prediction and noise offsets destroy what "
                "3D-aware noise relies on; remove it"
            )
        else:
            section = cls
            for name in found["loc"][:-1]:
                section = section.model_fields[str(name)].annotation
            yield f"unknown key '{where}'; known here: {', '.join(sorted(section.model_fields))}"


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c` override to a nested dict in place; `c` is read as YAML."""
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set wants section.key=value, got '{assignment}'.")
    *parents, last = path.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {path}: '{parent}' is a value, not a section.")
    values[last] = yaml.safe_load(text) if text.strip() else None


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file (or only defaults if `path` is None), apply overrides and check everything.

    Raises:
        ConfigError: the message names file, key, value and what is allowed.
    """
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"No configuration file at '{path}'; the presets are in training/configs/.")
    values = {} if path is None else yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' must hold a mapping of keys to values.")
    for assignment in overrides:
        set_value(values, assignment)
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{path or 'defaults'}: {error}.") from None


def settings_help(cls: type[Settings], section: str = "") -> Iterator[str]:
    """One line for every key of a configuration: default, choices, meaning."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from settings_help(field.annotation, f"{section}{name}.")
            continue
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        notes = [" | ".join(choices), field.description or ""]
        yield (f"  {section}{name}={field.default}".ljust(44) + "; ".join(filter(None, notes))).rstrip()
