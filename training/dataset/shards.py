"""Version 2 of the data set format: the people of one split in shards, their camera conditions in a bank.

A shard is a safetensors file with `images` uint8 [P * V, 3, H, W], the views of some people, and their lines of the
manifest as JSON in `records`. A file of the bank has `images` uint8 [K, 3, H, W], one condition person at some of the
bank's cameras, and `rows` int64 [K], the places of these images in the bank. Views name their row in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffportrait3d.weights.safetensors_writer import write_tensors


class ConditionBank:
    """Camera conditions that views share: indexed by the views' rows like a tensor uint8 [N, 3, H, W].

    Args:
        images: of the bank, uint8 [C, 3, H, W].
        rows: of every view in the bank [N].
    """

    def __init__(self, images: Tensor, rows: Tensor):
        self.images, self.rows = images, rows

    @property
    def device(self) -> torch.device:
        return self.images.device

    def __getitem__(self, views: slice | Tensor) -> Tensor:
        return self.images[self.rows[views]]

    def to(self, device: torch.device | str) -> ConditionBank:
        return ConditionBank(self.images.to(device), self.rows.to(device))


def write_shard(path: Path, images: Tensor, records: Sequence[Mapping[str, Any]]) -> None:
    """The views of some people, in the order of their records; whole or not at all."""
    write_tensors(path, {"images": images}, {"records": json.dumps(records)})


def read_records(path: Path) -> list[dict[str, Any]] | None:
    """The manifest's lines of a shard; None if it is not there or damaged."""
    try:
        with safe_open(str(path), "pt") as file:  # checks that all of its bytes are there
            return json.loads(file.metadata()["records"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def read_tensors(path: Path, *names: str) -> list[Tensor]:
    """Tensors of a shard or of a file of the bank.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        with safe_open(str(path), "pt") as file:
            return [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}); delete it, then run training.render again.") from None


def read_bank(root: Path, rows: Tensor, resolution: int) -> ConditionBank:
    """The bank of the data set in `root`, for views with these rows of it.

    Raises:
        ValueError: a condition that a view names is not there.
    """
    count = int(rows.max()) + 1
    images = torch.empty(count, 3, resolution, resolution, dtype=torch.uint8)
    found = torch.zeros(count, dtype=torch.bool)
    for path in sorted((root / "conditions").glob("*.safetensors")):
        part, places = read_tensors(path, "images", "rows")
        used = places < count
        images[places[used]], found[places[used]] = part[used], True
    missing = rows[~found[rows]]
    if len(missing):
        raise ValueError(
            f"Camera condition {int(missing[0])} is not in '{root / 'conditions'}'; run training.render again."
        )
    return ConditionBank(images, rows)
