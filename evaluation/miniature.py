"""What each part of the miniature brings, on held-out identities against exact ground truth.

    python -m evaluation.miniature --weights weights/miniature [--data DIR] [--identities 100] [--workers 2]
        [--solver dpmpp_2m] [--steps 8] [--out FILE.json]

For every held-out subject: the full system and the system less one part (reference, camera, view consistency, S's
start noise) generate the same views from the same noise. Printed with 95 % bootstrap intervals over identities:
camera error by the pose regressor, PSNR, SSIM, foreground and background error, and view consistency by depth
reprojection; then the paired differences to the full system. Whatever comes out is printed as it is. Generated views
are kept in --store, measured identities beside --out: started again, the command goes on where it was.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from torch import Tensor

from .arms import ARMS
from .bootstrap import bootstrap_difference, bootstrap_mean
from .command import run_command
from .faces import FACE_METRICS
from .journal import column, write_json
from .measures import METRICS, measure
from .report import cell, markdown_table, picture_rows, save_png, stack_pages
from .reprojection import reprojection_pairs
from .study import Study, common_parser, face_table, finish_options, test_data
from .subjects import Subject


class MiniatureStudy(Study):
    """The full system and what is left without each of its parts."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options, ARMS)

    def results(self, subject: Subject, views: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        pairs = reprojection_pairs(subject.depth, subject.mask, subject.labels)
        return {name: measure(images, subject, self.regressor, pairs) for name, images in views.items()}

    def save_pictures(self, index: int, subject: Subject, views: dict[str, Tensor]) -> None:
        rows = [("reference", subject.reference), ("condition", subject.conditions)]
        hidden = ("autoencoder", "reference_copy")
        rows += [(title, views[name]) for name, title in self.titles.items() if name not in hidden]
        save_png(picture_rows(rows), self.page_file(index))


def summarise(records: list[dict], study: Study) -> tuple[dict, dict]:
    """Intervals per row and metric, and of the paired differences full - arm for every arm but the full one."""
    metrics = METRICS | (FACE_METRICS if study.faces else {})
    summary = {row: {m: bootstrap_mean(column(records, row, m)) for m in metrics} for row in study.titles}
    differences = {
        row: {m: bootstrap_difference(column(records, "full", m), column(records, row, m)) for m in metrics}
        for row in study.arms
        if row != "full"
    }
    return summary, differences


def tables(summary: dict, differences: dict, count: int, titles: dict[str, str]) -> str:
    """Both tables as Markdown."""
    header = [title for title, _ in METRICS.values()]
    body = [
        [titles[row], *(cell(values[m], digits) for m, (_, digits) in METRICS.items())]
        for row, values in summary.items()
    ]
    against = [
        [f"full - {titles[row]}", *(cell(values[m], digits, True) for m, (_, digits) in METRICS.items())]
        for row, values in differences.items()
    ]
    return (
        f"Mean over {count} held-out identities [95 % bootstrap interval over identities]\n\n"
        + markdown_table(["", *header], body)
        + "\n\nPaired difference, full system minus the arm (PSNR, SSIM: more is better; errors: less is better)"
        + "\n\n"
        + markdown_table(["", *header], against)
    )


def run(options: argparse.Namespace) -> dict:
    """Measure what is not measured yet; print the tables, write JSON and picture, return the results."""
    started, study = time.perf_counter(), MiniatureStudy(options)
    options.data = test_data(options, study.system.resolution)
    records = study.measure_all()
    if pages := study.pages(len(records)):
        stack_pages(pages, options.out.with_suffix(".png"))
    summary, differences = summarise(records, study)
    print(tables(summary, differences, len(records), study.titles))
    print("\n" + face_table(records, study.titles, study.faces))
    seconds = {name: float(np.mean([r["seconds"][name] for r in records])) for name in study.arms}
    print(
        f"\n{study.store.sampling}: {seconds['full']:.1f} s for {options.views} views of an identity with the full "
        f"system, {time.perf_counter() - started:.0f} s in this run. Results: {options.out}"
    )
    results = {
        "conditions": study.conditions(),
        "seconds_per_identity": seconds,
        "summary": {row: {m: i._asdict() for m, i in values.items()} for row, values in summary.items()},
        "full_minus_arm": {row: {m: i._asdict() for m, i in values.items()} for row, values in differences.items()},
        "identities": records,
    }
    write_json(options.out, results)
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    out = "runs/evaluation/miniature.json"
    parser = common_parser("python -m evaluation.miniature", __doc__.splitlines()[0], out)
    return finish_options(parser, parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
