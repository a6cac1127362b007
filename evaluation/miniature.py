"""What each part of the miniature brings, on held-out identities against exact ground truth.

    python -m evaluation.miniature --weights weights/miniature [--data DIR] [--identities 100] [--workers 2]
        [--solver dpmpp_2m] [--steps 8] [--out FILE.json] [--doc PAGE]

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

from diffportrait3d.command import run_main
from diffportrait3d.files import write_text

from .metrics.reprojection import reprojection_pairs
from .metrics.views import METRICS, measure
from .studies.command import run_command
from .studies.study import Study, common_parser, finish_options, test_data
from .studies.system import Miniature
from .subjects.dataset import Subject
from .subjects.variants import ARMS
from .tables.report import image_rows, publish, save_png, save_webp, stack_pages
from .tables.results_log import write_json
from .tables.summary import Intervals, as_dicts, difference_table, differences, face_table, mean_table, means


class MiniatureStudy(Study):
    """The full system and what is left without each of its parts."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options, ARMS, Miniature(options.weights, device=options.device))

    def results(self, subject: Subject, views: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        pairs = reprojection_pairs(subject.depth, subject.mask, subject.labels)
        return {name: measure(images, subject, self.regressor, pairs) for name, images in views.items()}

    def save_pictures(self, index: int, subject: Subject, views: dict[str, Tensor]) -> None:
        rows = [("reference", subject.reference), ("condition", subject.conditions)]
        hidden = ("autoencoder", "reference_copy")
        rows += [(title, views[name]) for name, title in self.titles.items() if name not in hidden]
        save_png(image_rows(rows), self.page_file(index))


def tables(summary: Intervals, against: Intervals, study: Study, count: int) -> str:
    """Means and differences as Markdown."""
    return (
        f"Mean over {count} held-out identities [95 % bootstrap interval over identities]\n\n"
        + mean_table(summary, METRICS, study.titles)
        + "\n\nPaired difference, full system minus the arm (PSNR, SSIM: more is better; errors: less is better)\n\n"
        + difference_table(against, "full", METRICS, study.titles)
    )


def run(options: argparse.Namespace) -> dict:
    """Measure what is not measured yet; print the tables, write JSON and picture, return the results."""
    started, study = time.perf_counter(), MiniatureStudy(options)
    options.data = test_data(options, study.system.resolution)
    records = study.measure_all()
    if pages := study.pages(len(records)):
        stack_pages(pages, options.out.with_suffix(".png"))
    metrics = study.with_faces(METRICS)
    summary = means(records, study.titles, metrics)
    against = differences(records, "full", study.arms, metrics)
    text = tables(summary, against, study, len(records)) + "\n\n"
    text += face_table(records, study.titles, study.faces is not None)
    print(text)
    write_text(options.out.with_suffix(".md"), text + "\n")
    if options.doc:
        publish(options.doc, "evaluation.miniature", text)
        if pages:
            save_webp(pages[0], options.doc.with_suffix("") / "miniature.webp")
    seconds = {name: float(np.mean([r["seconds"][name] for r in records])) for name in study.arms}
    print(
        f"\n{study.store.sampling}: {seconds['full']:.1f} s for {options.views} views of an identity with the full "
        f"system, {time.perf_counter() - started:.0f} s in this run. Results: {options.out}"
    )
    results = {
        "conditions": study.conditions(),
        "seconds_per_identity": seconds,
        "summary": as_dicts(summary),
        "full_minus_arm": as_dicts(against),
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
    raise SystemExit(run_main(main))
