"""What a run keeps on disk and in averages: checkpoints, random states, weight averages, its settings."""

from __future__ import annotations

import contextlib
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from diffportrait3d.files import write_text

from .config import ConfigError, StageConfig, from_dict, to_dict

# Settings that may change between a run and its continuation without changing what is trained.
FREE_TO_CHANGE = {
    "steps",
    "minutes",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_last",
    "threads",
    "device",
}

CHECKPOINT_ENTRIES = {"step", "seen", "elapsed", "recent", "network", "optimizer", "average", "sampler", "rng"}


class DamagedFile(ValueError):
    """A file of the run's own that cannot be read any more; the message names it."""

    def __init__(self, path: Path, reason: object):
        first_line = next(iter(str(reason).splitlines()), "") or type(reason).__name__
        super().__init__(f"'{path}' is damaged ({first_line}).")


class WeightAverage:
    """Exponential moving average of a network's parameters (buffers are not averaged).

    The decay grows as (1 + n) / (10 + n) up to its final value, so that short runs are not held back by the start.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        shadow = [self.shadow[name] for name, _ in module.named_parameters()]
        torch._foreach_lerp_(shadow, [p.detach() for p in module.parameters()], 1.0 - decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, ``module`` holds the averaged weights."""
        kept = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.copy_to(module)
        try:
            yield
        finally:
            _assign(module, kept)

    def copy_to(self, module: nn.Module) -> None:
        _assign(module, self.shadow)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


@torch.no_grad()
def _assign(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, p in module.named_parameters():
        p.copy_(values[name])


def rng_state() -> dict[str, Any]:
    """States of all generators that training may touch, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Counterpart of ``rng_state``."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def checkpoint_file(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}.pt"


def checkpoints(run_dir: Path) -> list[Path]:
    """The files of all checkpoints, the newest first."""
    return sorted((run_dir / "checkpoints").glob("step-*.pt"), reverse=True)


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """File and content of the newest checkpoint that is whole, or None if there is none at all. Damaged ones are named.

    Raises:
        ValueError: all of them are damaged.
    """
    files = checkpoints(run_dir)
    for path in files:
        try:
            return path, read_checkpoint(path)
        except DamagedFile as error:
            print(f"{error} An older checkpoint is looked for.", file=sys.stderr)
    if files:
        raise ValueError(f"'{run_dir}' has no checkpoint that can be read; delete the folder to start over.")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; every byte of it is checked (torch.load itself reads over damaged numbers).

    Raises:
        DamagedFile: truncated, overwritten, or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can end in almost any
        raise DamagedFile(path, error) from error
    if not isinstance(state, dict) or not CHECKPOINT_ENTRIES <= state.keys():
        raise DamagedFile(path, "it is no checkpoint")
    return state


def check_config(run_dir: Path, config: StageConfig) -> None:
    """Keep the resolved configuration in the run folder; refuse to continue a run with a different one."""
    path, now = run_dir / "config.yaml", to_dict(config)
    before = _settings_before(run_dir, path)
    if before is not None:
        with contextlib.suppress(ConfigError):  # settings that are newer than the run have their defaults there
            before = to_dict(from_dict(type(config), before))
        changed = sorted(_differences(before, now))
        if changed:
            raise ValueError(
                f"'{run_dir}' was started with other settings ({', '.join(changed)}); continue it with the "
                f"ones in '{path}', or choose another run_dir, or delete the folder to start over."
            )
    write_text(path, yaml.safe_dump(now, sort_keys=False))


def _settings_before(run_dir: Path, path: Path) -> dict[str, Any] | None:
    """Those that the run was started with: from config.yaml or, if that is damaged, from the newest checkpoint."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text) if text.endswith("\n") else None  # a cut-off file may still be YAML
    except (yaml.YAMLError, ValueError):  # no YAML, or no text at all
        settings = None
    found = newest_checkpoint(run_dir)
    kept = found[1].get("config") if found else None
    if _has_keys(settings, kept or {}):
        return settings
    source = f"the settings are those of '{found[0]}'" if kept else "the settings given now are taken for the run's own"
    print(f"'{path}' is damaged; {source}, and it is written again.", file=sys.stderr)
    if kept:
        write_text(path, yaml.safe_dump(kept, sort_keys=False))
    return kept


def _has_keys(settings: Any, kept: dict[str, Any]) -> bool:
    """Whether no section or value of ``kept`` is missing from ``settings``."""
    return isinstance(settings, dict) and all(
        key in settings and (not isinstance(value, dict) or _has_keys(settings[key], value))
        for key, value in kept.items()
    )


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    for key in sorted({*before, *now}):
        name = f"{where}{key}"
        if isinstance(before.get(key), dict) and isinstance(now.get(key), dict):
            yield from _differences(before[key], now[key], name + ".")
        elif before.get(key) != now.get(key) and not (where == "loop." and key in FREE_TO_CHANGE) and name != "run_dir":
            yield name
