"""What a finished run of several stages shows: a table as text, JSON, and a page with the validation images."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffportrait3d.files import write_text


def table(summaries: Sequence[dict[str, Any]], beside: tuple[float, float] | None = None) -> str:
    """What each stage took, one line each.

    beside: minutes beside the training, planned and taken, of a run in a given time.
    """
    lines = [
        f"{'stage':<18}{'planned':>9}{'minutes':>9}{'steps':>9}{'samples':>10}{'samples/s':>11}{'operators':>11}"
        f"{'MB/step':>9}{'TFLOP/s':>9}{'idle':>7}{'loss':>10}   validation"
    ]
    for s in summaries:
        costs = list(s.get("costs", {}).values())
        operators, moved = (str(max(cost[key] for cost in costs) // unit) if costs else ""
                            for key, unit in (("operators", 1), ("bytes", 10**6)))  # fmt: skip
        planned, rate, idle = (f"{s[key]:{form}}" if key in s else "" for key, form in (
            ("planned_minutes", ".1f"), ("tflops_per_second", ".3g"), ("idle_share", ".0%")))  # fmt: skip
        lines.append(
            f"{s['stage']:<18}{planned:>9}{s['minutes']:>9.1f}{s['steps']:>9}{s['samples']:>10}"
            f"{s['samples_per_second']:>11.1f}{operators:>11}{moved:>9}{rate:>9}{idle:>7}{s['losses']['loss']:>10.4f}"
            f"   {_validation(s)}"
        )
    planned, taken = sum(s.get("planned_minutes", 0.0) for s in summaries), sum(s["minutes"] for s in summaries)
    if beside:
        lines.append(f"{'beside training':<18}{beside[0]:>9.1f}{beside[1]:>9.1f}")
        planned, taken = planned + beside[0], taken + beside[1]
    lines.append(f"{'total':<18}{f'{planned:.1f}' if beside else '':>9}{taken:>9.1f}")
    return "\n".join(lines)


def write_page(out: Path, summaries: Sequence[dict[str, Any]], text: str) -> Path:
    """`out/report.json` and `out/report.html`, which shows the table and every stage's last validation image."""
    write_text(out / "report.json", json.dumps(list(summaries), indent=1))
    parts = [
        "<!doctype html><meta charset=utf-8><title>Training</title>",
        f"<pre>{html.escape(text)}</pre>",
    ]
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
