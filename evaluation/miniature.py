"""What each part of the miniature brings, on held-out identities against exact ground truth.

    python -m evaluation.miniature --weights weights/miniature [--data DIR] [--identities 100] [--out FILE.json]

For every held-out subject: the full system and the system less one part (reference, camera, view consistency, S's
start noise) generate the same views from the same noise. Printed with 95 % bootstrap intervals over identities:
camera error by the pose regressor, PSNR, SSIM, foreground and background error, and view consistency by depth
reprojection; then the paired differences to the full system. Whatever comes out is printed as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from training import render
from training.data import DataError

from .arms import ARMS
from .bootstrap import bootstrap_difference, bootstrap_mean
from .command import run_command
from .journal import append_record, column, read_journal, write_json
from .measures import METRICS, measure
from .pose_regressor import PoseRegressor, load_pose_regressor
from .report import cell, markdown_table, picture_rows, save_png, stack_pages
from .reprojection import reprojection_pairs
from .subjects import IDENTITIES, Subject, held_out_lines, held_out_subjects
from .system import Miniature

CONTEXT = {
    "ground_truth": "ground truth (floor)",
    "autoencoder": "autoencoder of it",
    "proxy": "S alone",
    "reference_copy": "copy of the reference",
}
TITLES = CONTEXT | {name: arm.title for name, arm in ARMS.items()}


def evaluate_subject(
    system: Miniature, regressor: PoseRegressor, subject: Subject, seed: int, options: argparse.Namespace
) -> tuple[dict, dict[str, Tensor]]:
    """The record of one identity and the views of every arm."""
    pairs = reprojection_pairs(subject.depth, subject.mask, subject.labels)
    proxies = system.proxies(subject)
    views = {
        "ground_truth": subject.images,
        "autoencoder": system.reconstruct(subject.images),
        "proxy": proxies,
        "reference_copy": subject.reference.expand_as(subject.images),
    }
    seconds = {}
    for name, arm in ARMS.items():
        start = time.perf_counter()
        views[name] = system.generate(arm, subject, proxies, seed, options.steps, options.guidance, options.eta)
        seconds[name] = round(time.perf_counter() - start, 3)
    results = {name: measure(images, subject, regressor, pairs) for name, images in views.items()}
    record = {
        "id": subject.id,
        "digest": subject.digest,
        "seed": seed,
        "pairs": len(pairs),
        "seconds": seconds,
        "results": results,
    }
    return record, views


def conditions(options: argparse.Namespace, system: Miniature) -> dict:
    """Everything, besides the subjects, that the numbers depend on; only results under equal ones are joined."""
    return {
        "weights_sha256": system.hashes,
        "pose_regressor_sha256": hashlib.sha256(options.pose_regressor.read_bytes()).hexdigest(),
        "views": options.views,
        "steps": options.steps,
        "eta": options.eta,
        "guidance": options.guidance,
        "seed": options.seed,
        "linear_end": system.linear_end,
        "resolution": system.resolution,
    }


def test_data(options: argparse.Namespace, resolution: int, references: int = 1) -> Path:
    """The dataset asked for; if none was named, held-out people are rendered into the cache (what is there stays).

    Settles how many people are measured if nobody said.
    """
    if options.data:
        options.identities = options.identities or len(held_out_lines(options.data, None))
        return options.data
    options.identities = options.identities or IDENTITIES
    kind, views = "ict" if options.ict else "analytic", options.views + references
    folder = options.cache / f"{kind}-{resolution}px-{views}views"
    settings = render.dataset_settings(resolution, views, 60, 20, 0.67 if options.ict else 0.0, 64, 0)
    counts = {"train": 0, "val": 0, "test": options.identities}
    render.render_dataset(folder, settings, counts, options.ict, workers=options.threads or 2)
    return folder


def summarise(records: list[dict]) -> tuple[dict, dict]:
    """Intervals per row and metric, and of the paired differences full - arm for every arm but the full one."""
    summary = {row: {m: bootstrap_mean(column(records, row, m)) for m in METRICS} for row in TITLES}
    differences = {
        row: {m: bootstrap_difference(column(records, "full", m), column(records, row, m)) for m in METRICS}
        for row in ARMS
        if row != "full"
    }
    return summary, differences


def tables(summary: dict, differences: dict, count: int) -> str:
    """Both tables as Markdown."""
    header = [title for title, _ in METRICS.values()]
    body = [
        [TITLES[row], *(cell(values[m], digits) for m, (_, digits) in METRICS.items())]
        for row, values in summary.items()
    ]
    against = [
        [f"full - {TITLES[row]}", *(cell(values[m], digits, True) for m, (_, digits) in METRICS.items())]
        for row, values in differences.items()
    ]
    return (
        f"Mean over {count} held-out identities [95 % bootstrap interval over identities]\n\n"
        + markdown_table(["", *header], body)
        + "\n\nPaired difference, full system minus the arm (PSNR, SSIM: more is better; errors: less is better)"
        + "\n\n"
        + markdown_table(["", *header], against)
    )


def page_file(options: argparse.Namespace, index: int) -> Path:
    """The picture of one identity: reference, conditions, ground truth, S and every arm."""
    return options.out.with_suffix(".pages") / f"{index:03d}.png"


def save_page(path: Path, subject: Subject, views: dict[str, Tensor]) -> None:
    """Rows of views below one another."""
    rows = [("reference", subject.reference), ("condition", subject.conditions)]
    rows += [(title, views[name]) for name, title in TITLES.items() if name not in ("autoencoder", "reference_copy")]
    save_png(picture_rows(rows), path)


def check_resolution(subject: Subject, system: Miniature, options: argparse.Namespace) -> None:
    """DataError if the subject's pictures are of another size than the weights work at."""
    side = subject.images.shape[-1]
    if side != system.resolution:
        raise DataError(
            f"'{options.data}' has {side} px pictures, the weights in '{options.weights}' work at "
            f"{system.resolution} px; use a dataset of that resolution."
        )


def measure_all(options: argparse.Namespace, system: Miniature, regressor: PoseRegressor, expected: dict) -> list[dict]:
    """The records of all identities asked for; those of an earlier run are reused, new ones written down at once."""
    journal = options.out.with_suffix(".identities.jsonl")
    records = read_journal(journal, expected, options.data)[: options.identities]
    subjects = held_out_subjects(options.data, options.identities, options.views, start=len(records))
    bar = tqdm(subjects, total=options.identities, initial=len(records), desc="identities", unit="id")
    for index, subject in enumerate(bar, start=len(records)):
        check_resolution(subject, system, options)
        record, views = evaluate_subject(system, regressor, subject, options.seed + index, options)
        if index < options.pictures:
            save_page(page_file(options, index), subject, views)
        append_record(journal, record)
        records.append(record)
    return records


def run(options: argparse.Namespace) -> dict:
    """Measure what is not measured yet; print the tables, write JSON and picture, return the results."""
    started = time.perf_counter()
    system, regressor = Miniature(options.weights, device=options.device), load_pose_regressor(options.pose_regressor)
    options.data = test_data(options, system.resolution)
    expected = conditions(options, system)
    records = measure_all(options, system, regressor, expected)
    shown = [page_file(options, index) for index in range(min(options.pictures, len(records)))]
    if shown := [page for page in shown if page.is_file()]:
        stack_pages(shown, options.out.with_suffix(".png"))
    summary, differences = summarise(records)
    print(tables(summary, differences, len(records)))
    seconds = {name: float(np.mean([r["seconds"][name] for r in records])) for name in ARMS}
    print(
        f"\n{seconds['full']:.1f} s for {options.views} views of an identity with the full system, "
        f"{time.perf_counter() - started:.0f} s in this run. Results: {options.out}"
    )
    results = {
        "conditions": expected,
        "seconds_per_identity": seconds,
        "summary": {row: {m: i._asdict() for m, i in values.items()} for row, values in summary.items()},
        "full_minus_arm": {row: {m: i._asdict() for m, i in values.items()} for row, values in differences.items()},
        "identities": records,
    }
    write_json(options.out, results)
    return results


def common_parser(prog: str, description: str, out: str, views: int) -> argparse.ArgumentParser:
    """Options of every command that measures a weights folder on held-out identities."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--weights", type=Path, default=Path("weights/miniature"), help="folder of the six networks")
    parser.add_argument("--pose-regressor", type=Path, help="default: pose_regressor.safetensors in --weights")
    parser.add_argument("--data", type=Path, help="dataset with a test split; rendered into --cache if absent")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/evaluation"), help="where test subjects are rendered"
    )
    parser.add_argument("--ict", type=Path, help="ICT Face Model Light, to render test subjects of that kind")
    parser.add_argument("--identities", type=int, help=f"default: {IDENTITIES}, or as many as --data has")
    parser.add_argument("--views", type=int, default=views, help="target views per identity, generated together")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--eta", type=float, default=0.5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="identity k uses seed + k in every arm")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--pictures", type=int, default=4, help="identities shown in the PNG beside --out")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="where the networks run, e.g. cuda (default %(default)s)")
    return parser


def finish_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other options and refuse numbers that make no sense."""
    options.pose_regressor = options.pose_regressor or options.weights / "pose_regressor.safetensors"
    for name in ("identities", "views", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    out = "runs/evaluation/miniature.json"
    parser = common_parser("python -m evaluation.miniature", __doc__.splitlines()[0], out, views=8)
    return finish_options(parser, parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
