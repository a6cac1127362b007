"""Results written identity by identity, so that an interrupted run resumes."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import numpy as np

from diffportrait3d.files import json_object, write_text
from training.dataset.images import DataError, read_manifest

from ..subjects.dataset import json_digest

RECORD = ("digest", "results")  # what every record has


def read_log(path: Path, expected: dict, root: Path) -> list[dict]:
    """Finished identities of an earlier run under the same conditions; starts the log if there is none.

    Of a damaged log the records before the damage count; without its first line, the conditions, none does: it is kept
    beside the new one.

    Raises:
        DataError: conditions or subjects differ.
    """
    found, *records = _read_lines(path) or [None]
    if found is None:
        write_text(path, json.dumps(expected) + "\n")
        return []
    expected = json.loads(json.dumps(expected))  # tuples are lists there
    differing = [name for name in expected if found.get(name) != expected[name]]
    test = [s for s in read_manifest(root)[1] if s["split"] == "test"]
    if any(record["digest"] != json_digest(line) for record, line in zip(records, test, strict=False)):
        differing.append("subjects")
    if differing:
        raise DataError(f"'{path}' holds results with other {', '.join(differing)}; delete it or choose another --out.")
    return records


def _read_lines(path: Path) -> list[dict]:
    """The conditions and the records up to the first line that is damaged; the file keeps no more than these."""
    if not path.is_file():
        return []
    lines, read = path.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines):
        entry = json_object(line)
        if entry is None or not all(name in entry for name in (RECORD if number else ())):
            break
        read.append(entry)
    if not read:
        kept = path.with_name(path.name + ".damaged")
        os.replace(path, kept)
        print(f"'{path}' is damaged from its beginning (kept as '{kept.name}'): all is measured anew.", file=sys.stderr)
    elif len(read) < len(lines) - 1 or lines[-1]:  # not only the empty end behind the last line
        rest = f"'{path}' is cut off or damaged in line {len(read) + 1}: {len(read) - 1} finished identities are kept."
        print(rest, file=sys.stderr)
        write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in read))
    return read


def column(records: list[dict], row: str, metric: str) -> np.ndarray:
    """One number per identity, float64 [identities]; NaN where it does not exist."""
    return np.array([record["results"][row][metric] for record in records], dtype=np.float64)


def write_json(path: Path, results: dict) -> None:
    """Atomically, with null for the quantities that do not exist: JSON has no NaN."""
    text = json.dumps(_without_nan(results), indent=1, allow_nan=False)
    write_text(path, text)


def _without_nan(value):
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
