"""Results written down identity by identity, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from training.data import DataError, read_manifest
from training.state import write_atomically

from .subjects import subject_digest


def read_journal(path: Path, expected: dict, root: Path) -> list[dict]:
    """Finished identities of an earlier run under the same conditions; starts the journal if there is none.

    Raises DataError if conditions or subjects differ.
    """
    if not path.is_file():
        write_atomically(path, lambda p: p.write_text(json.dumps(expected) + "\n", encoding="utf-8"))
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:  # a line cut off by an interruption
        write_atomically(path, lambda p: p.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))
    found, *records = [json.loads(line) for line in lines] or [{}]
    expected = json.loads(json.dumps(expected))  # tuples are lists there
    differing = [name for name in expected if found.get(name) != expected[name]]
    test = [s for s in read_manifest(root)[1] if s["split"] == "test"]
    if any(record["digest"] != subject_digest(line) for record, line in zip(records, test, strict=False)):
        differing.append("subjects")
    if differing:
        raise DataError(f"'{path}' holds results with other {', '.join(differing)}; delete it or choose another --out.")
    return records


def append_record(path: Path, record: dict) -> None:
    """Write down one finished identity."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def column(records: list[dict], row: str, metric: str) -> np.ndarray:
    """One number per identity, float64 [identities]; NaN where it does not exist."""
    return np.array([record["results"][row][metric] for record in records], dtype=np.float64)


def write_json(path: Path, results: dict) -> None:
    """Atomically, with null for the quantities that do not exist: JSON has no NaN."""
    text = json.dumps(_without_nan(results), indent=1, allow_nan=False)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def _without_nan(value):
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
