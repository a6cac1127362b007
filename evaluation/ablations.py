"""The paper's ablations on held-out identities: which of its orders hold for these weights?

    python -m evaluation.ablations --weights weights/miniature [--data DIR] [--identities 100] [--workers 2]
        [--group all|main|faces] [--arms full untrained_reference ...] [--out runs/ablations.json]
        [--doc docs/ablations.md]

Tables, results and images go to --out and files beside it; only --doc also puts them into a page.

Every variant (`evaluation.subjects.variants`) changes one thing about the full system and generates the same views of
the same people from the same noise. The expected orders are in `evaluation.tables.expectations`, with their source in
the paper; for each one the command prints "holds", "does not" or "undecided" by the paired bootstrap interval over
identities. Generated views are kept in --store, measured identities beside --out, so that an interrupted command
resumes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from diffportrait3d.command import run_main

from .metrics.faces import FACE_METRICS
from .metrics.views import ABLATION_METRICS
from .studies.command import add_batch, add_sampling, add_weights, parse_study, run_command, study_parser
from .studies.generator import ViewGenerator
from .studies.study import Study
from .subjects.dataset import Subject
from .subjects.variants import ALL_VARIANTS, GROUPS, ORDER_VARIANTS, ORDER_WEIGHTS, THEMES, Variant
from .tables.expectations import SMALL, Verdict, verdicts
from .tables.report import cell, image_rows, markdown_table, save_png
from .tables.summary import Intervals


def chosen_variants(options: argparse.Namespace) -> dict[str, Variant]:
    """The variants or the group asked for, the full system always among them; of a group, those that the given weights
    allow."""
    wanted = options.arms or [n for n in GROUPS[options.group] if n not in ORDER_VARIANTS or options.order_weights]
    return {name: variant for name, variant in ALL_VARIANTS.items() if name == "full" or name in wanted}


class AblationStudy(Study):
    """The variants asked for, with all about them that the paper's claims need."""

    metrics = ABLATION_METRICS
    shown = ("pose", "psnr", "ssim", "mini_lpips", "far_mini_lpips", "reprojection", "background_variation", "change")
    compared = ("pose", "mini_lpips", "reprojection", "dlib_found_near", "dlib_distance_truth", "dlib_first")

    def __init__(self, options: argparse.Namespace):
        others = dict(zip(ORDER_WEIGHTS, options.order_weights or (), strict=False))
        super().__init__(
            options, chosen_variants(options), ViewGenerator(options.weights, others, options.device, options.precision)
        )
        self.command = "ablations" if options.group == "all" else f"ablations --group {options.group}"

    def save_page(self, index: int, subject: Subject, views: dict[str, Tensor]) -> None:
        """References, conditions and ground truth on top, the variants below; all of them, and theme by theme."""
        given = [(f"references (1 to {len(subject.reference)})", subject.reference), ("condition", subject.conditions)]
        if subject.other_conditions is not None:
            given.append(("condition, swapped", subject.other_conditions))
        given += [("ground truth", views["ground_truth"]), ("S alone", views["proxy"])]
        rows = {name: (variant.title, views[name]) for name, variant in self.variants.items()}
        save_png(image_rows([*given, *rows.values()]), self.page_file(index))
        for theme, names in THEMES.items():
            if shown := [rows[name] for name in names if name in rows]:
                save_png(image_rows([*given, rows["full"], *shown]), self.theme_file(index, theme))

    def theme_file(self, index: int, theme: str) -> Path:
        return self.page_file(index).with_name(f"{index:03d}_{theme}.png")

    def published(self) -> dict[str, Path]:
        themes = ("faces", "sampling") if self.options.group == "faces" else THEMES  # the others' pages have more rows
        return {theme: self.theme_file(0, theme) for theme in themes}

    def report(self, records: list[dict], summary: Intervals, against: Intervals) -> str:
        found = verdicts(records, set(self.variants))
        words = [verdict.word for verdict in found]
        counted = ", ".join(f"{word}: {words.count(word)}" for word in ("holds", "does not", "undecided"))
        tables = super().report(records, summary, against)
        return f"{verdict_table(found, self.variants)}\n\n{counted} (of {len(found)}).\n\n{tables}"

    def facts(self, records: list[dict], against: dict) -> dict:
        found = [
            asdict(v.expectation) | {"metric": v.metric, "allowed": v.allowed, "verdict": v.word} | v.interval._asdict()
            for v in verdicts(records, set(self.variants))
        ]
        return {"verdicts": found} | super().facts(records, against)


def verdict_table(found: list[Verdict], variants: dict[str, Variant]) -> str:
    """A row per expectation and metric."""
    rows = []
    for expectation, name, interval, allowed, word in found:
        metric = (ABLATION_METRICS | FACE_METRICS)[name]
        small = expectation.relation == SMALL
        second = f"{allowed:.{metric.digits}f}" if small else variants[expectation.second].title
        order = f"{variants[expectation.first].title} {expectation.relation} {second}"
        limit = f" (allowed: +-{allowed:.{metric.digits}f})" if allowed else ""
        difference = cell(interval, metric.digits, signed=True) + limit
        rows.append([expectation.source, order, metric.title, difference, f"**{word}**"])
    return markdown_table(["source", "expected", "by", "difference (+ is as expected)", "verdict"], rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser("ablations", __doc__, "runs/ablations.json", add_weights, add_sampling, add_batch)
    add = parser.add_argument
    add(
        "--group",
        choices=GROUPS,
        default="all",
        help="variants: all of the paper's, those of its main orders, or those that may spoil faces (default all)",
    )
    add("--arms", nargs="+", choices=ALL_VARIANTS, metavar="ARM", help=f"instead of a group: {', '.join(ALL_VARIANTS)}")
    add(
        "--order-weights",
        type=Path,
        nargs=2,
        metavar=("SHUFFLED", "ORDERED"),
        help="view-consistency weights with positions, trained on shuffled and on ordered views",
    )
    options = parse_study(parser, arguments)
    if options.arms and set(ORDER_VARIANTS) & set(options.arms) and not options.order_weights:
        parser.error(f"the variants {' and '.join(ORDER_VARIANTS)} need --order-weights SHUFFLED ORDERED")
    return options


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda options: AblationStudy(options).run(), parse(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
