"""What each part of the miniature brings, on held-out identities against exact ground truth.

    python -m evaluation.miniature --weights weights/miniature [--data DIR] [--identities 100] [--out results.json]

For every held-out subject: the full system and the system less one part (reference, camera, view consistency, S's
start noise) generate the same views from the same noise. Printed with 95 % bootstrap intervals over identities:
camera error by the pose regressor, PSNR, SSIM, foreground and background error, and view consistency by depth
reprojection; then the paired differences to the full system. Whatever comes out is printed as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training import render
from training.data import DataError, read_manifest
from training.state import write_atomically

from .bootstrap import bootstrap_difference, bootstrap_mean
from .metrics import angle_between, masked_l1, psnr, ssim, viewing_directions, yaw_pitch
from .pose_regressor import PoseRegressor, load_pose_regressor
from .report import cell, markdown_table, picture_rows, save_png, stack_pages
from .reprojection import reprojection_error, reprojection_pairs
from .subjects import Subject, held_out_subjects, subject_digest
from .system import ARMS, Miniature

# name -> (column title, digits)
METRICS = {
    "pose": ("pose error (deg)", 2),
    "yaw": ("yaw (deg)", 2),
    "pitch": ("pitch (deg)", 2),
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 3),
    "foreground_l1": ("foreground L1", 4),
    "background_l1": ("background L1", 4),
    "reprojection": ("reprojection L1", 4),
}
CONTEXT = {
    "ground_truth": "ground truth (floor)",
    "autoencoder": "autoencoder of it",
    "proxy": "S alone",
    "reference_copy": "copy of the reference",
}
TITLES = CONTEXT | {name: arm.title for name, arm in ARMS.items()}


def measure(images: Tensor, subject: Subject, regressor: PoseRegressor, pairs: list) -> dict[str, float]:
    """Every metric of one subject's views [V, 3, H, W] in [0, 1], averaged over the views; NaN where undefined."""
    truth, asked = subject.images, viewing_directions(subject.labels)
    seen = regressor.predict(images * 2 - 1)
    (yaw, pitch), (asked_yaw, asked_pitch) = yaw_pitch(seen), yaw_pitch(asked)
    return {
        "pose": angle_between(seen, asked).mean().item(),
        "yaw": (yaw - asked_yaw).abs().mean().item(),
        "pitch": (pitch - asked_pitch).abs().mean().item(),
        "psnr": psnr(images, truth).mean().item(),
        "ssim": ssim(images, truth).mean().item(),
        "foreground_l1": masked_l1(images, truth, subject.mask).nanmean().item(),
        "background_l1": masked_l1(images, truth, ~subject.mask).nanmean().item(),
        "reprojection": reprojection_error(images, pairs),
    }


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


def test_data(options: argparse.Namespace, resolution: int) -> Path:
    """The dataset asked for; if none was named, held-out people are rendered into the cache (what is there stays)."""
    if options.data:
        return options.data
    kind = "ict" if options.ict else "analytic"
    folder = options.cache / f"{kind}-{resolution}px-{options.views + 1}views"
    settings = render.dataset_settings(resolution, options.views + 1, 60, 20, 0.67 if options.ict else 0.0, 64, 0)
    counts = {"train": 0, "val": 0, "test": options.identities}
    render.render_dataset(folder, settings, counts, options.ict, workers=options.threads or 2)
    return folder


def read_journal(path: Path, expected: dict, root: Path) -> list[dict]:
    """Finished identities of an earlier run under the same conditions; starts the journal if there is none.

    Raises DataError if conditions or subjects differ.
    """
    if not path.is_file():
        write_atomically(path, lambda p: p.write_text(json.dumps(expected) + "\n", encoding="utf-8"))
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:  # a line cut off by an interruption
        write_atomically(path, lambda p: p.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))
    found, *records = [json.loads(line) for line in lines] or [{}]
    differing = [name for name in expected if found.get(name) != expected[name]]
    test = [s for s in read_manifest(root)[1] if s["split"] == "test"]
    if any(record["digest"] != subject_digest(line) for record, line in zip(records, test, strict=False)):
        differing.append("subjects")
    if differing:
        raise DataError(f"'{path}' holds results with other {', '.join(differing)}; delete it or choose another --out.")
    return records


def summarise(records: list[dict]) -> tuple[dict, dict]:
    """Intervals per row and metric, and of the paired differences full - arm for every arm but the full one."""

    def column(row: str, metric: str) -> np.ndarray:
        return np.array([r["results"][row][metric] for r in records], dtype=np.float64)

    summary = {row: {m: bootstrap_mean(column(row, m)) for m in METRICS} for row in TITLES}
    differences = {
        row: {m: bootstrap_difference(column("full", m), column(row, m)) for m in METRICS}
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


def measure_all(options: argparse.Namespace, system: Miniature, regressor: PoseRegressor, expected: dict) -> list[dict]:
    """The records of all identities asked for; those of an earlier run are reused, new ones written down at once."""
    journal = options.out.with_suffix(".identities.jsonl")
    records = read_journal(journal, expected, options.data)[: options.identities]
    subjects = held_out_subjects(options.data, options.identities, options.views, start=len(records))
    bar = tqdm(subjects, total=options.identities, initial=len(records), desc="identities", unit="id")
    for index, subject in enumerate(bar, start=len(records)):
        if subject.images.shape[-1] != system.resolution:
            raise DataError(
                f"'{options.data}' has {subject.images.shape[-1]} px pictures, the weights in '{options.weights}' "
                f"work at {system.resolution} px; use a dataset of that resolution."
            )
        record, views = evaluate_subject(system, regressor, subject, options.seed + index, options)
        if index < options.pictures:
            save_page(page_file(options, index), subject, views)
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        records.append(record)
    return records


def run(options: argparse.Namespace) -> dict:
    """Measure what is not measured yet; print the tables, write JSON and picture, return the results."""
    started = time.perf_counter()
    system, regressor = Miniature(options.weights), load_pose_regressor(options.pose_regressor)
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
    text = json.dumps(_without_nan(results), indent=1, allow_nan=False)
    write_atomically(options.out, lambda p: p.write_text(text, encoding="utf-8"))
    return results


def _without_nan(value):
    """JSON has no NaN: quantities that do not exist become null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.miniature", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("weights/miniature"), help="folder of the six networks")
    parser.add_argument("--pose-regressor", type=Path, help="default: pose_regressor.safetensors in --weights")
    parser.add_argument("--data", type=Path, help="dataset with a test split; rendered into --cache if absent")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/evaluation"), help="where test subjects are rendered"
    )
    parser.add_argument("--ict", type=Path, help="ICT Face Model Light, to render test subjects of that kind")
    parser.add_argument("--identities", type=int, default=100)
    parser.add_argument("--views", type=int, default=8, help="target views per identity, generated together")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--eta", type=float, default=0.5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="identity k uses seed + k in every arm")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--pictures", type=int, default=4, help="identities shown in the PNG beside --out")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    options.pose_regressor = options.pose_regressor or options.weights / "pose_regressor.safetensors"
    for name in ("identities", "views", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    try:
        run(options)
    except (ValueError, FileNotFoundError) as error:  # DataError and CheckpointError are ValueErrors
        raise SystemExit(f"{error}") from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
