"""What a run keeps on disk and in averages: checkpoints, random states, weight averages, its settings."""

from __future__ import annotations

import contextlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffportrait3d.files import write_atomically

from .config import ConfigError, StageConfig, from_dict, to_dict

CONFIG = "config.yaml"  # a copy of the settings for people; a run that continues compares with its checkpoint's
# Settings that may change between a run and its continuation without changing what is trained.
FREE_IN_LOOP = "steps minutes log_every validate_every checkpoint_every keep_last threads device graphs"
FREE_TO_CHANGE = {"run_dir", *(f"loop.{name}" for name in FREE_IN_LOOP.split())}
CHECKPOINT_ENTRIES = {*"config step seen elapsed recent network optimizer average sampler rng".split()}


class DamagedFile(ValueError):
    """A file of the run's own that cannot be read any more; the message names it."""

    def __init__(self, path: Path, reason: object):
        first_line = next(iter(str(reason).splitlines()), "") or type(reason).__name__
        super().__init__(f"'{path}' is damaged ({first_line}).")


class EMA:
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
        """Inside, `module` holds the averaged weights."""
        kept = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.copy_to(module)
        try:
            yield
        finally:
            module.load_state_dict(kept, strict=False)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.shadow, strict=False)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


def rng_state() -> dict[str, Any]:
    """States of the global generators that training draws from: torch's (samplers have generators of their own)."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng(state: dict[str, Any]) -> None:
    """Counterpart of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def checkpoints(run_dir: Path) -> list[Path]:
    """The files of all checkpoints, the newest first."""
    return sorted((run_dir / "checkpoints").glob("step-*.pt"), reverse=True)


def write_checkpoint(run_dir: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, whole or not at all; earlier ones beyond the last `keep` are deleted."""
    path = run_dir / "checkpoints" / f"step-{state['step']:08d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    before = [old for old in checkpoints(run_dir) if old < path]  # a later one was damaged
    for old in before[max(1, keep) - 1 :]:
        old.unlink()


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """File and content of the newest intact checkpoint, or None if there is none at all. Damaged ones are named.

    Raises:
        ValueError: all of them are damaged.
    """
    files = checkpoints(run_dir)
    for path in files:
        try:
            return path, read_checkpoint(path)
        except DamagedFile as error:
            print(f"{error} Trying an older checkpoint.", file=sys.stderr)
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
        raise DamagedFile(path, "it is not a checkpoint")
    return state


def check_settings(run_dir: Path, before: dict[str, Any], config: StageConfig) -> None:
    """Refuse to continue a run, started with the settings `before`, with different ones.

    Raises:
        ValueError: the message names the settings.
    """
    with contextlib.suppress(ConfigError):  # settings that are newer than the run have their defaults there
        before = to_dict(from_dict(type(config), before))
    old, new = _flat(before), _flat(to_dict(config))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} - FREE_TO_CHANGE
    if changed:
        raise ValueError(
            f"'{run_dir}' was started with other settings ({', '.join(sorted(changed))}); continue it with the "
            f"ones in '{run_dir / CONFIG}', or choose another run_dir, or delete the folder to start over."
        )


def _flat(settings: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Nested settings by their full keys; an empty section has one, too."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{section}{key}.") if nested else {f"{section}{key}": value}
    return flat
