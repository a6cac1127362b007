"""What a finished run of several stages shows: a table as text, JSON, and a page with the validation images."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffportrait3d.files import write_text

COLUMNS = (  # title, width, key, format
    ("planned", 9, "planned_minutes", ".1f"), ("minutes", 9, "minutes", ".1f"), ("steps", 9, "steps", "d"),
    ("samples", 10, "samples", "d"), ("samples/s", 11, "samples_per_second", ".1f"),
    ("operators", 11, "operators", "d"), ("MB/step", 9, "bytes", "d"), ("TFLOP/s", 9, "tflops_per_second", ".3g"),
    ("idle", 7, "idle_share", ".0%"), ("loss", 10, "loss", ".4f"),
)  # fmt: skip


def table(summaries: Sequence[dict[str, Any]], beside: dict[str, float] | None = None) -> str:
    """What each stage took, one line each.

    beside: minutes beside the training, planned and taken, of a run in a given time.
    """
    lines = [f"{'stage':<18}{''.join(f'{title:>{width}}' for title, width, *_ in COLUMNS)}   validation"]
    for s in summaries:
        costs = list(s.get("costs", {}).values())
        units = {"operators": 1, "bytes": 10**6} if costs else {}
        counts = {key: max(cost[key] for cost in costs) // unit for key, unit in units.items()}
        lines.append(_line(s["stage"], {**s, **counts, "loss": s["losses"]["loss"]}) + f"   {_validation(s)}")
    keys, rows = ["minutes"], list(summaries)
    if beside:
        keys, rows = ["planned_minutes", *keys], [*rows, beside]
        lines.append(_line("beside training", beside))
    return "\n".join([*lines, _line("total", {key: sum(row[key] for row in rows) for key in keys})])


def _line(name: str, values: dict[str, Any]) -> str:
    cells = (f"{format(values[key], form) if key in values else '':>{width}}" for _, width, key, form in COLUMNS)
    return f"{name:<18}{''.join(cells)}".rstrip()


def write_page(out: Path, summaries: Sequence[dict[str, Any]], text: str) -> Path:
    """`out/report.json` and `out/report.html`, which shows the table and every stage's last validation image."""
    write_text(out / "report.json", json.dumps(list(summaries), indent=1))
    parts = ["<!doctype html><meta charset=utf-8><title>Training</title>", f"<pre>{html.escape(text)}</pre>"]
    for summary in summaries:
        images = sorted((out / summary["stage"] / "validation").glob("*.png"))
        if images:
            source = images[-1].relative_to(out).as_posix()
            parts.append(f'<h2>{summary["stage"]}</h2><p>{_validation(summary)}</p><img src="{source}">')
    page = out / "report.html"
    write_text(page, "\n".join(parts))
    return page


def _validation(summary: dict[str, Any]) -> str:
    found = {k.removeprefix("validation/"): v for k, v in summary.items() if k.startswith("validation/")}
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())
