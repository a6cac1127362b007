"""The paper's ablations on held-out identities: which of its orders hold for the weights at hand?

    python -m evaluation.ablations --weights weights/miniature [--data DIR] [--identities 100] [--workers 2]
        [--group all|main|faces] [--arms full untrained_reference ...] [--out runs/ablations.json]
        [--doc docs/ablations.md]

Tables, results and pictures go to --out and files beside it; only --doc also puts them into a page.

Every arm (`evaluation.subjects.variants`) changes one thing about the full system and generates the same views of the
same people from the same noise. The orders to be expected stand in `evaluation.tables.expectations`, with their source
in the paper; for each one the command prints "holds", "does not" or "undecided" by the paired bootstrap interval over
identities.
Generated views are kept in --store, measured identities beside --out: started again, the command goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from diffportrait3d.command import run_main
from diffportrait3d.files import write_text
from diffportrait3d.synthetic_heads import render_camera_images
from training.render import FIRST_CONDITION

from .metrics.faces import FACE_METRICS
from .metrics.images import mini_lpips
from .metrics.reprojection import reprojection_pairs
from .metrics.views import ABLATION_METRICS, measure, measure_variant
from .studies.command import run_command
from .studies.study import Study, common_parser, finish_options, test_data
from .studies.system import Miniature
from .subjects.dataset import Subject
from .subjects.variants import ALL_ARMS, GROUPS, ORDER_ARMS, ORDER_WEIGHTS, THEMES, Arm
from .tables.bootstrap import bootstrap_mean
from .tables.expectations import SMALL, Verdict, verdicts
from .tables.report import cell, image_rows, markdown_table, publish, save_png, save_webp, stack_pages
from .tables.results_log import column, write_json
from .tables.summary import as_dicts, difference_table, differences, face_table, means

SHOWN = ("pose", "psnr", "ssim", "mini_lpips", "far_mini_lpips", "reprojection", "background_variation", "change")
COMPARED = ("pose", "mini_lpips", "reprojection", "dlib_found_near", "dlib_distance_truth", "dlib_first")
JUDGED_TRUTH = ("pose", "reprojection")  # of the truth itself: the judges' own errors; the others compare with it
SWAPPED_PEOPLE = FIRST_CONDITION["test"] + 500_000  # analytic people that no dataset shows as conditions


def chosen_arms(options: argparse.Namespace) -> dict[str, Arm]:
    """The arms or the group asked for, the full system always among them; of a group, those that the given weights
    allow."""
    wanted = options.arms
    if wanted is None:
        wanted = [name for name in GROUPS[options.group] if name not in ORDER_ARMS or options.order_weights]
    return {name: arm for name, arm in ALL_ARMS.items() if name == "full" or name in wanted}


class AblationStudy(Study):
    """The arms asked for, with what of the paper's claims can be measured about them."""

    def __init__(self, options: argparse.Namespace):
        others = dict(zip(ORDER_WEIGHTS, options.order_weights or (), strict=False))
        super().__init__(options, chosen_arms(options), Miniature(options.weights, others, options.device))

    def subject(self, index: int) -> Subject:
        """Also with yet another person at its cameras."""
        subject = super().subject(index)
        if any(arm.condition == "swapped" for arm in self.arms.values()):
            person = SWAPPED_PEOPLE + index
            subject.other_conditions = render_camera_images(subject.labels, self.system.resolution, person)
        return subject

    def results(self, subject: Subject, views: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        pairs = reprojection_pairs(subject.depth, subject.mask, subject.labels)
        results = {}
        for name, images in views.items():
            pair = images.to(self.system.device), subject.images.to(self.system.device)
            distances = mini_lpips(*pair, self.system.autoencoder).cpu()
            results[name] = measure(images, subject, self.regressor, pairs) | {"mini_lpips": distances.mean().item()}
            results[name] |= measure_variant(name, views, subject, distances)
        return results

    def save_pictures(self, index: int, subject: Subject, views: dict[str, Tensor]) -> None:
        """References, conditions and ground truth on top, the arms below; all of them, and theme by theme."""
        given = [(f"references (1 to {len(subject.reference)})", subject.reference), ("condition", subject.conditions)]
        if subject.other_conditions is not None:
            given.append(("condition, swapped", subject.other_conditions))
        given += [("ground truth", views["ground_truth"]), ("S alone", views["proxy"])]
        rows, page = {name: (arm.title, views[name]) for name, arm in self.arms.items()}, self.page_file(index)
        save_png(image_rows([*given, *rows.values()]), page)
        for theme, names in THEMES.items():
            shown = [rows[name] for name in names if name in rows]
            if shown:
                save_png(image_rows([*given, rows["full"], *shown]), theme_file(page, theme))


def theme_file(page: Path, theme: str) -> Path:
    """The rows of one theme (`evaluation.subjects.variants.THEMES`), beside the page of all."""
    return page.with_name(f"{page.stem}_{theme}.png")


def arms_table(records: list[dict], titles: dict[str, str]) -> str:
    """Means with intervals, a row per arm."""
    rows = []
    for name, title in titles.items():
        shown = JUDGED_TRUTH if name == "ground_truth" else SHOWN
        intervals = {m: bootstrap_mean(column(records, name, m)) for m in shown}
        rows.append([title, *(cell(intervals[m], ABLATION_METRICS[m][1]) if m in shown else "" for m in SHOWN)])
    return markdown_table(["", *(ABLATION_METRICS[m][0] for m in SHOWN)], rows)


def verdict_table(found: list[Verdict], arms: dict[str, Arm]) -> str:
    """A row per expectation and metric."""
    rows = []
    for expectation, metric, interval, allowed, word in found:
        title, digits = (ABLATION_METRICS | FACE_METRICS)[metric]
        second = f"{allowed:.{digits}f}" if expectation.relation == SMALL else arms[expectation.second].title
        order = f"{arms[expectation.first].title} {expectation.relation} {second}"
        limit = f" (allowed: +-{allowed:.{digits}f})" if allowed else ""
        rows.append([expectation.source, order, title, cell(interval, digits, True) + limit, f"**{word}**"])
    return markdown_table(["source", "expected", "by", "difference (+ is as expected)", "verdict"], rows)


def report(records: list[dict], found: list[Verdict], study: Study) -> str:
    """Both tables and the counts, as Markdown."""
    options = study.options
    compared = {name: title for name, title in study.with_faces(ABLATION_METRICS).items() if name in COMPARED}
    counts = {word: sum(v.word == word for v in found) for word in ("holds", "does not", "undecided")}
    return (
        f"{len(records)} held-out identities, {options.views} views each, {study.store.sampling}, "
        f"{study.system.resolution} px; mean [95 % bootstrap interval over identities].\n\n"
        + verdict_table(found, study.arms)
        + "\n\n"
        + ", ".join(f"{word}: {count}" for word, count in counts.items())
        + f" (of {len(found)}).\n\n"
        + arms_table(records, study.titles)
        + "\n\nPaired difference, full system minus the arm (PSNR, SSIM, faces, ID: more is better)\n\n"
        + difference_table(differences(records, "full", study.arms, compared), "full", compared, study.titles)
        + "\n\n"
        + face_table(records, study.titles, study.faces is not None)
    )


def publish_pictures(study: Study) -> None:
    """The first identity's pictures, theme by theme, as WebP in the folder that is called like the document."""
    options = study.options
    for theme in THEMES:
        source = theme_file(study.page_file(0), theme)
        if source.is_file():
            save_webp(source, options.doc.with_suffix("") / f"{theme}.webp")


def run(options: argparse.Namespace) -> dict:
    """Measure what is not measured yet; print the tables, write them, JSON and pictures, return the results."""
    started, study = time.perf_counter(), AblationStudy(options)
    options.data = test_data(options, study.system.resolution)
    records = study.measure_all()
    if pages := study.pages(len(records)):
        stack_pages(pages, options.out.with_suffix(".png"))
    found = verdicts(records, set(study.arms))
    text = report(records, found, study)
    print(text)
    write_text(options.out.with_suffix(".md"), text + "\n")
    if options.doc:
        name = "evaluation.ablations" if options.group == "all" else f"evaluation.ablations --group {options.group}"
        publish(options.doc, name, text)
        publish_pictures(study)
    metrics = study.with_faces(ABLATION_METRICS)
    results = {
        "conditions": study.conditions(),
        "verdicts": [
            asdict(v.expectation) | {"metric": v.metric, "allowed": v.allowed, "verdict": v.word} | v.interval._asdict()
            for v in found
        ],
        "summary": as_dicts(means(records, study.titles, metrics)),
        "full_minus_arm": as_dicts(differences(records, "full", study.arms, metrics)),
        "identities": records,
    }
    write_json(options.out, results)
    print(f"\n{time.perf_counter() - started:.0f} s in this run. Results: {options.out}")
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser("python -m evaluation.ablations", __doc__.splitlines()[0], "runs/ablations.json")
    parser.add_argument(
        "--group",
        choices=GROUPS,
        default="all",
        help="arms: all of the paper's, those of its main orders, or those that may spoil faces (default %(default)s)",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=ALL_ARMS, metavar="ARM", help=f"instead of a group: {', '.join(ALL_ARMS)}"
    )
    parser.add_argument(
        "--order-weights",
        type=Path,
        nargs=2,
        metavar=("SHUFFLED", "ORDERED"),
        help="view-consistency weights with positions, trained on shuffled and on ordered views",
    )
    options = finish_options(parser, parser.parse_args(arguments))
    if options.arms and set(ORDER_ARMS) & set(options.arms) and not options.order_weights:
        parser.error(f"the arms {' and '.join(ORDER_ARMS)} need --order-weights SHUFFLED ORDERED")
    return options


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
