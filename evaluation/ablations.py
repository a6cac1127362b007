"""The paper's ablations on held-out identities: which of its orders hold for the weights at hand?

    python -m evaluation.ablations --weights weights/miniature [--data DIR] [--identities 100] [--workers 2]
        [--arms full untrained_reference ...] [--out runs/ablations.json] [--doc docs/ablations.md]

Tables, results and pictures go to --out and files beside it; only --doc also puts them into a page.

Every arm (`evaluation.arms`) changes one thing about the full system and generates the same views of the same people
from the same noise. The orders to be expected stand in `evaluation.expectations`, with their source in the paper; for
each one the command prints "holds", "does not" or "undecided" by the paired bootstrap interval over identities.
Finished identities are written down at once: started again, the command goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffportrait3d.files import write_text
from diffportrait3d.heads import render_condition_images
from training.data import DataError
from training.render import FIRST_CONDITION

from .arms import ABLATION_ARMS, ORDER_ARMS, ORDER_WEIGHTS, THEMES, Arm
from .bootstrap import bootstrap_mean
from .command import run_command
from .expectations import SMALL, Verdict, verdicts
from .journal import append_record, column, read_journal, write_json
from .measures import ABLATION_METRICS, measure_arm
from .miniature import check_resolution, common_parser, conditions, finish_options, test_data
from .pose_regressor import load_pose_regressor
from .report import cell, markdown_table, picture_rows, save_png, save_webp, stack_pages
from .reprojection import reprojection_pairs
from .subjects import Subject, held_out_lines, load_subject, read_pictures
from .system import Miniature

CONTEXT = {"ground_truth": "ground truth (floor)", "autoencoder": "autoencoder of it", "proxy": "S alone"}
SHOWN = ("pose", "psnr", "ssim", "mini_lpips", "far_mini_lpips", "reprojection", "background_variation", "change")
JUDGED_TRUTH = ("pose", "reprojection")  # of the truth itself: the judges' own errors; the others compare with it
SWAPPED_PEOPLE = FIRST_CONDITION["test"] + 500_000  # analytic people that no dataset shows as conditions
BEGIN, END = "<!-- made by evaluation.ablations: begin -->", "<!-- made by evaluation.ablations: end -->"


def chosen_arms(options: argparse.Namespace) -> dict[str, Arm]:
    """The arms asked for, the full system always among them; all that the given weights allow if none are named."""
    if options.arms is None:
        names = [name for name in ABLATION_ARMS if name not in ORDER_ARMS or options.order_weights]
    else:
        names = [name for name in ABLATION_ARMS if name == "full" or name in options.arms]
    return {name: ABLATION_ARMS[name] for name in names}


class Study:
    """The networks, judges and options that measure one identity after the other, in this process."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.arms = options, chosen_arms(options)
        others = dict(zip(ORDER_WEIGHTS, options.order_weights or (), strict=False))
        self.system = Miniature(options.weights, others, options.device)
        self.regressor = load_pose_regressor(options.pose_regressor)
        self.references = max(arm.references for arm in self.arms.values())

    def conditions(self) -> dict:
        """Everything, besides the subjects, that the numbers depend on."""
        arms = {name: asdict(arm) for name, arm in self.arms.items()}
        return conditions(self.options, self.system) | {"references": self.references, "arms": arms}

    def subject(self, index: int) -> Subject:
        """Subject `index` with a stranger's portraits and with yet another person at its cameras."""
        options = self.options
        lines = held_out_lines(options.data, max(options.identities, 2))
        subject = load_subject(options.data, lines[index], options.views, self.references)
        check_resolution(subject, self.system, options)
        stranger = lines[(index + 1) % len(lines)]["views"][:1]
        subject.other_reference = read_pictures(options.data, stranger, "image")
        if any(arm.condition == "swapped" for arm in self.arms.values()):
            person = SWAPPED_PEOPLE + index
            subject.other_conditions = render_condition_images(subject.labels, self.system.resolution, person)
        return subject

    def views(self, subject: Subject, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The pictures [V, 3, H, W] of every row of the table, and the seconds that each arm took."""
        options, system = self.options, self.system
        proxies = system.proxies(subject)
        views = {
            "ground_truth": subject.images,
            "autoencoder": system.reconstruct(subject.images),
            "proxy": proxies,
        }
        seconds = {}
        for name, arm in self.arms.items():
            start = time.perf_counter()
            views[name] = system.generate(arm, subject, proxies, seed, options.steps, options.guidance, options.eta)
            seconds[name] = round(time.perf_counter() - start, 3)
        return views, seconds

    def measure(self, index: int) -> dict:
        """The record of one identity; also saves its page of pictures if it is to be shown."""
        subject, seed = self.subject(index), self.options.seed + index
        views, seconds = self.views(subject, seed)
        pairs = reprojection_pairs(subject.depth, subject.mask, subject.labels)
        results = {name: measure_arm(views, name, subject, self.system, self.regressor, pairs) for name in views}
        if index < self.options.pictures:
            save_pictures(page_file(self.options, index), subject, views, self.arms)
        return {"id": subject.id, "digest": subject.digest, "seed": seed, "seconds": seconds, "results": results}


def page_file(options: argparse.Namespace, index: int) -> Path:
    """Pictures of one identity: a row per arm."""
    return options.out.with_suffix(".pages") / f"{index:03d}.png"


def theme_file(page: Path, theme: str) -> Path:
    """The rows of one theme (`evaluation.arms.THEMES`), beside the page of all."""
    return page.with_name(f"{page.stem}_{theme}.png")


def save_pictures(page: Path, subject: Subject, views: dict[str, Tensor], arms: dict[str, Arm]) -> None:
    """References, conditions and ground truth on top, the arms below; all of them, and theme by theme."""
    given = [(f"references (1 to {len(subject.reference)})", subject.reference), ("condition", subject.conditions)]
    if subject.other_conditions is not None:
        given.append(("condition, swapped", subject.other_conditions))
    given += [("ground truth", views["ground_truth"]), ("S alone", views["proxy"])]
    rows = {name: (arm.title, views[name]) for name, arm in arms.items()}
    save_png(picture_rows([*given, *rows.values()]), page)
    for theme, names in THEMES.items():
        shown = [rows[name] for name in names if name in rows]
        if shown:
            save_png(picture_rows([*given, rows["full"], *shown]), theme_file(page, theme))


_study: Study  # of a worker process


def _start_worker(options: argparse.Namespace, threads: int) -> None:
    global _study
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    _study = Study(options)


def _measure(index: int) -> dict:
    return _study.measure(index)


@contextlib.contextmanager
def record_stream(study: Study, indices: range) -> Iterator[Iterator[dict]]:
    """The records of identities in order, made in this process or by --workers of them."""
    workers = min(study.options.workers, len(indices))
    if workers <= 1:
        yield map(study.measure, indices)
        return
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (study.options, threads)) as pool:
        yield pool.imap(_measure, indices)


def measure_all(study: Study, expected: dict) -> list[dict]:
    """The records of all identities asked for; those of an earlier run are reused, new ones written down at once."""
    options, journal = study.options, study.options.out.with_suffix(".identities.jsonl")
    held_out_lines(options.data, max(options.identities, 2))  # too few: known before anything is generated
    records = read_journal(journal, expected, options.data)[: options.identities]
    remaining = range(len(records), options.identities)
    with record_stream(study, remaining) as stream:
        bar = tqdm(stream, total=options.identities, initial=len(records), desc="identities", unit="id")
        for record in bar:
            append_record(journal, record)
            records.append(record)
    return records


def arms_table(records: list[dict], arms: dict[str, Arm]) -> str:
    """Means with intervals, a row per arm."""
    titles = CONTEXT | {name: arm.title for name, arm in arms.items()}
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
        title, digits = ABLATION_METRICS[metric]
        second = f"{allowed:.{digits}f}" if expectation.relation == SMALL else arms[expectation.second].title
        order = f"{arms[expectation.first].title} {expectation.relation} {second}"
        limit = f" (allowed: +-{allowed:.{digits}f})" if allowed else ""
        rows.append([expectation.source, order, title, cell(interval, digits, True) + limit, f"**{word}**"])
    return markdown_table(["source", "expected", "by", "difference (+ is as expected)", "verdict"], rows)


def report(records: list[dict], found: list[Verdict], study: Study) -> str:
    """Both tables and the counts, as Markdown."""
    options = study.options
    counts = {word: sum(v.word == word for v in found) for word in ("holds", "does not", "undecided")}
    return (
        f"{len(records)} held-out identities, {options.views} views each, {options.steps} DDIM steps, eta "
        f"{options.eta}, guidance {options.guidance}, {study.system.resolution} px; mean [95 % bootstrap interval over "
        "identities].\n\n"
        + verdict_table(found, study.arms)
        + "\n\n"
        + ", ".join(f"{word}: {count}" for word, count in counts.items())
        + f" (of {len(found)}).\n\n"
        + arms_table(records, study.arms)
    )


def publish_pictures(options: argparse.Namespace) -> None:
    """The first identity's pictures, theme by theme, as WebP in the folder that is called like the document."""
    for theme in THEMES:
        source = theme_file(page_file(options, 0), theme)
        if source.is_file():
            save_webp(source, options.doc.with_suffix("") / f"{theme}.webp")


def update_document(path: Path, text: str) -> None:
    """Replace what stands between the marks in a Markdown file; DataError if it has none."""
    old = path.read_text(encoding="utf-8") if path.is_file() else f"# Ablations\n\n{BEGIN}\n{END}\n"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"'{path}' lacks the lines '{BEGIN}' and '{END}', between which the results go; add them.")
    new = f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
    write_text(path, new)


def run(options: argparse.Namespace) -> dict:
    """Measure what is not measured yet; print the tables, write them, JSON and pictures, return the results."""
    started, study = time.perf_counter(), Study(options)
    options.data = test_data(options, study.system.resolution, study.references)
    expected = study.conditions()
    records = measure_all(study, expected)
    pages = [page_file(options, index) for index in range(min(options.pictures, len(records)))]
    if pages := [page for page in pages if page.is_file()]:
        stack_pages(pages, options.out.with_suffix(".png"))
    found = verdicts(records, set(study.arms))
    text = report(records, found, study)
    print(text)
    write_text(options.out.with_suffix(".md"), text + "\n")
    if options.doc:
        update_document(options.doc, text)
        publish_pictures(options)
    rows = [*CONTEXT, *study.arms]
    results = {
        "conditions": expected,
        "verdicts": [
            asdict(v.expectation) | {"metric": v.metric, "allowed": v.allowed, "verdict": v.word} | v.interval._asdict()
            for v in found
        ],
        "summary": {
            row: {m: bootstrap_mean(column(records, row, m))._asdict() for m in ABLATION_METRICS} for row in rows
        },
        "identities": records,
    }
    write_json(options.out, results)
    print(f"\n{time.perf_counter() - started:.0f} s in this run. Results: {options.out}")
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser("python -m evaluation.ablations", __doc__.splitlines()[0], "runs/ablations.json", views=6)
    parser.add_argument("--arms", nargs="+", choices=ABLATION_ARMS, metavar="ARM", help=", ".join(ABLATION_ARMS))
    parser.add_argument(
        "--order-weights",
        type=Path,
        nargs=2,
        metavar=("SHUFFLED", "ORDERED"),
        help="view-consistency weights with positions, trained on shuffled and on ordered views",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; identities are shared out among them")
    parser.add_argument(
        "--doc", type=Path, help="publish: tables between this page's marks, pictures beside it, e.g. docs/ablations.md"
    )
    options = finish_options(parser, parser.parse_args(arguments))
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if options.arms and set(ORDER_ARMS) & set(options.arms) and not options.order_weights:
        parser.error(f"the arms {' and '.join(ORDER_ARMS)} need --order-weights SHUFFLED ORDERED")
    return options


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
