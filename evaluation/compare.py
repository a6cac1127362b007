"""Two weights folders on the same held-out people, even of different resolution: which makes better views?

    python -m evaluation.compare FIRST SECOND --data DIR [--identities 40] [--views 6] [--workers 2]
        [--pose-regressor FILE] [--out runs/evaluation/compare.json] [--doc PAGE]

The data have the larger resolution. Networks of the smaller one are given the same pictures and conditions scaled
down, and their views are scaled up: both are judged at the larger size, by one autoencoder (mini-LPIPS: that of the
larger, or of SECOND), one pose regressor and dlib. Seeds, solver and steps are the same. Printed: means, and SECOND
minus FIRST with paired 95 % bootstrap intervals over identities.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from torch import Tensor

from diffportrait3d.files import write_text

from .metrics.views import QUALITY_METRICS
from .studies.command import run_command
from .studies.study import Study, add_output, add_people, add_sampling, finish_options, test_data
from .studies.system import Miniature
from .studies.view_store import SubjectViews, ViewStore
from .subjects.dataset import Subject, at_size, resize
from .subjects.variants import ARMS
from .tables.report import image_rows, publish, save_png, save_webp, stack_pages
from .tables.results_log import write_json
from .tables.summary import as_dicts, difference_table, differences, face_table, mean_table, means

PAIR = ("first", "second")


class CompareStudy(Study):
    """The full system of two folders."""

    def __init__(self, options: argparse.Namespace):
        folders = [getattr(options, name) for name in PAIR]
        self.pair = {name: Miniature(getattr(options, name), device=options.device) for name in PAIR}
        judge = max(reversed(PAIR), key=lambda name: self.pair[name].resolution)
        options.weights = getattr(options, judge)
        options.pose_regressor = options.pose_regressor or options.weights / "pose_regressor.safetensors"
        super().__init__(options, {}, self.pair[judge])
        names = [folder.name for folder in folders]
        if names[0] == names[1]:
            names = [str(folder) for folder in folders]
        sizes = [system.resolution for system in self.pair.values()]
        first, second = (f"{name} ({size} px)" for name, size in zip(names, sizes, strict=True))
        self.smallest = min(sizes)
        self.titles = {"ground_truth": "ground truth (floor)"}
        if self.smallest < self.system.resolution:
            self.titles["small_truth"] = f"ground truth at {self.smallest} px"
        self.titles |= {
            "first_autoencoder": f"autoencoder of {first}",
            "second_autoencoder": f"autoencoder of {second}",
            "first": first,
            "second": second,
        }

    def conditions(self) -> dict:
        hashes = {f"{name}_sha256": system.hashes for name, system in self.pair.items()}
        return super().conditions() | hashes | {"rows": list(self.titles)}

    def views(self, subject: Subject, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        size, seconds = self.system.resolution, {}
        views = {"ground_truth": subject.images}
        if self.smallest < size:
            views["small_truth"] = resize(resize(subject.images, self.smallest), size)
        for name, system in self.pair.items():
            store = ViewStore(self.options.store, system, self.store.sampling)
            made = SubjectViews(store, at_size(subject, system.resolution), seed)
            views[f"{name}_autoencoder"] = resize(made.autoencoder().images, size)
            stored = made.arm(ARMS["full"])
            views[name], seconds[name] = resize(stored.images, size), stored.seconds
        return views | {"reference_copy": subject.reference[:1].expand_as(subject.images)}, seconds

    def results(self, subject: Subject, views: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        return self.quality(subject, {name: images for name, images in views.items() if name in self.titles})

    def save_pictures(self, index: int, subject: Subject, views: dict[str, Tensor]) -> None:
        rows = [("reference", subject.reference)]
        rows += [(self.titles[name], views[name]) for name in ("ground_truth", *PAIR)]
        save_png(image_rows(rows), self.page_file(index))


def report(records: list[dict], study: CompareStudy) -> str:
    """Means, paired differences and faces, as Markdown."""
    against = differences(records, "second", PAIR, study.with_faces(QUALITY_METRICS))
    table = difference_table(against, study.titles["second"], study.with_faces(QUALITY_METRICS), study.titles)
    return (
        f"{len(records)} held-out identities, {study.options.views} views each, {study.store.sampling}, all judged at "
        f"{study.system.resolution} px by one autoencoder; mean [95 % bootstrap interval over identities]\n\n"
        + mean_table(means(records, study.titles, QUALITY_METRICS), QUALITY_METRICS, study.titles)
        + "\n\nPaired difference (PSNR, SSIM, faces, ID: more is better)\n\n"
        + table
        + "\n\n"
        + face_table(records, study.titles, study.faces is not None)
    )


def run(options: argparse.Namespace) -> dict:
    """Measure what is not measured yet; print and write tables, JSON and pictures; return the results."""
    started, study = time.perf_counter(), CompareStudy(options)
    options.data = test_data(options, study.system.resolution)
    records = study.measure_all()
    if pages := study.pages(len(records)):
        stack_pages(pages, options.out.with_suffix(".png"))
    text = report(records, study)
    print(text)
    write_text(options.out.with_suffix(".md"), text + "\n")
    if options.doc:
        publish(options.doc, "evaluation.compare", text)
        if pages:
            save_webp(pages[0], options.doc.with_suffix("") / "compare.webp")
    metrics = study.with_faces(QUALITY_METRICS)
    results = {
        "conditions": study.conditions(),
        "titles": study.titles,
        "summary": as_dicts(means(records, study.titles, metrics)),
        "second_minus_first": as_dicts(differences(records, "second", PAIR, metrics))["first"],
        "identities": records,
    }
    write_json(options.out, results)
    print(f"\n{time.perf_counter() - started:.0f} s in this run. Results: {options.out}")
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.compare", description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="folder of six networks")
    parser.add_argument("second", type=Path, help="another one, of any resolution")
    parser.add_argument(
        "--pose-regressor", type=Path, help="default: pose_regressor.safetensors in the folder of the larger resolution"
    )
    add_people(parser, views=6)
    add_sampling(parser)
    add_output(parser, "runs/evaluation/compare.json")
    return finish_options(parser, parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
