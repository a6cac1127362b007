"""A study: arms of the system on held-out people, one after the other, in one process or several.

Views come from the store (`evaluation.studies.view_store`), which generates what is missing, and everything is measured
on its 8-bit pictures: a metric that is added later needs no new views.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffportrait3d.pipeline import SOLVERS
from training import render
from training.dataset.images import DataError
from training.engine.workers import worker_pool

from ..metrics import faces
from ..metrics.images import mini_lpips
from ..metrics.pose import load_pose_regressor
from ..metrics.reprojection import reprojection_pairs
from ..metrics.views import measure
from ..subjects.dataset import IDENTITIES, Subject, held_out_lines, load_subject, read_pictures
from ..subjects.variants import ABLATION_ARMS, Arm, Sampling
from ..tables.results_log import append_record, read_journal
from .system import Miniature
from .view_store import SubjectViews, ViewStore

CONTEXT = {
    "ground_truth": "ground truth (floor)",
    "autoencoder": "autoencoder of it",
    "proxy": "S alone",
    "reference_copy": "copy of the reference",
}
# Of the test people that are rendered when no dataset is named: the range that the pose regressor was trained for.
YAW, PITCH, CONDITION_PEOPLE = 60.0, 20.0, 64
REFERENCES = max(arm.references for arm in ABLATION_ARMS.values())  # that these have: all arms find theirs


class Study:
    """The networks, judges and options that measure one identity after the other, in this process.

    Args:
        options: of `common_parser`.
        arms: by name, "full" among them.
        system: whose views they are, and whose autoencoder judges.
        sampling: None takes the options'.
    """

    def __init__(
        self, options: argparse.Namespace, arms: dict[str, Arm], system: Miniature, sampling: Sampling | None = None
    ):
        self.options, self.arms, self.system = options, arms, system
        self.store = ViewStore(options.store, self.system, sampling or sampling_of(options))
        self.regressor = load_pose_regressor(options.pose_regressor)
        self.faces = faces.load_face_networks(options.faces, options.store / "faces")
        self.references = max((arm.references for arm in arms.values()), default=1)
        self.titles = CONTEXT | {name: arm.title for name, arm in arms.items()}

    def conditions(self) -> dict:
        """Everything, besides the subjects, that the numbers depend on; only results under equal ones are joined."""
        options, system = self.options, self.system
        return {
            "weights_sha256": system.hashes,
            "pose_regressor_sha256": hashlib.sha256(options.pose_regressor.read_bytes()).hexdigest(),
            "views": options.views,
            **asdict(self.store.sampling),
            "seed": options.seed,
            "faces_sha256": self.faces and self.faces.sha256,
            "linear_end": system.linear_end,
            "resolution": system.resolution,
            "arms": {name: asdict(arm) for name, arm in self.arms.items()},
        }

    def subject(self, index: int) -> Subject:
        """Subject `index`, with a stranger's portraits."""
        options = self.options
        lines = held_out_lines(options.data, options.identities)
        subject = load_subject(options.data, lines[index], options.views, self.references)
        check_resolution(subject, self.system, options)
        if any(arm.person == "another" for arm in self.arms.values()):
            others = held_out_lines(options.data, max(options.identities, 2))
            stranger = others[(index + 1) % len(others)]["views"][:1]
            subject.other_reference = read_pictures(options.data, stranger, "image")
        return subject

    def views(self, subject: Subject, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The pictures [V, 3, H, W] of every row of the table, and the seconds that making each arm's took."""
        made = SubjectViews(self.store, subject, seed)
        views = {
            "ground_truth": subject.images,
            "autoencoder": made.autoencoder().images,
            "proxy": made.proxy().images,
            "reference_copy": subject.reference[:1].expand_as(subject.images),
        }
        stored = {name: made.arm(arm) for name, arm in self.arms.items()}
        views |= {name: arm.images for name, arm in stored.items()}
        return views, {name: arm.seconds for name, arm in stored.items()}

    def measure(self, index: int) -> dict:
        """The record of one identity; also saves its pictures if they are to be shown."""
        subject, seed = self.subject(index), self.options.seed + index
        views, seconds = self.views(subject, seed)
        if index < self.options.pictures:
            self.save_pictures(index, subject, views)
        record = {"id": subject.id, "digest": subject.digest, "seed": seed, "seconds": seconds}
        return record | {"results": self.results(subject, views), "faces": self.judge_faces(subject, views)}

    def judge_faces(self, subject: Subject, views: dict[str, Tensor]) -> dict | None:
        """Embeddings of the portrait and of every row, as text; what they mean takes everybody's."""
        if self.faces is None:
            return None
        portrait = self.faces.embeddings(subject.reference[:1])  # [1, 128]
        rows = {name: self.faces.embeddings(images) for name, images in views.items() if name != "reference_copy"}
        rows["reference_copy"] = portrait.repeat(len(subject.images), axis=0)
        packed = {name: faces.pack(found) for name, found in rows.items()}
        return {"reference": faces.pack(portrait), "yaws": faces.view_yaws(subject.labels), "rows": packed}

    def quality(self, subject: Subject, views: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """QUALITY_METRICS of every row, by this study's judges."""
        pairs = reprojection_pairs(subject.depth, subject.mask, subject.labels)
        results = {}
        for name, images in views.items():
            results[name] = measure(images, subject, self.regressor, pairs)
            distance = mini_lpips(images.to(self.system.device), subject.images.to(self.system.device),
                                  self.system.autoencoder)  # fmt: skip
            results[name]["mini_lpips"] = distance.mean().item()
        return results

    def with_faces(self, metrics: dict) -> dict:
        """These metrics and, if faces are judged, theirs."""
        return metrics | (faces.FACE_METRICS if self.faces else {})

    def results(self, subject: Subject, views: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """The metrics of every row of the table."""
        raise NotImplementedError

    def save_pictures(self, index: int, subject: Subject, views: dict[str, Tensor]) -> None:
        """The page of one identity."""
        raise NotImplementedError

    def page_file(self, index: int) -> Path:
        """Where it goes."""
        return self.options.out.with_suffix(".pages") / f"{index:03d}.png"

    def pages(self, count: int) -> list[Path]:
        """Those of the first `count` identities that are there."""
        pages = [self.page_file(index) for index in range(min(self.options.pictures, count))]
        return [page for page in pages if page.is_file()]

    def measure_all(self) -> list[dict]:
        """The records of all identities asked for; those of an earlier run are reused, new ones written at once."""
        options, journal = self.options, self.options.out.with_suffix(".identities.jsonl")
        held_out_lines(options.data, options.identities)  # too few: known before anything is generated
        records = read_journal(journal, self.conditions(), options.data)[: options.identities]
        remaining = range(len(records), options.identities)
        with self._record_stream(remaining) as stream:
            for record in tqdm(stream, total=options.identities, initial=len(records), desc="identities", unit="id"):
                append_record(journal, record)
                records.append(record)
        if self.faces is not None:
            add_face_metrics(records)
        return records

    @contextlib.contextmanager
    def _record_stream(self, indices: range) -> Iterator[Iterator[dict]]:
        """The records of identities in order, made in this process or by --workers of them."""
        workers = min(self.options.workers, len(indices))
        if workers <= 1:
            yield map(self.measure, indices)
            return
        threads = max(1, torch.get_num_threads() // workers)
        with worker_pool(workers, _start_worker, (type(self), self.options, threads)) as pool:
            yield pool.imap(_measure, indices)


_study: Study  # of a worker process


def _start_worker(study: type[Study], options: argparse.Namespace, threads: int) -> None:
    global _study
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    _study = study(options)


def _measure(index: int) -> dict:
    return _study.measure(index)


def add_face_metrics(records: list[dict]) -> None:
    """Replace the embeddings of records by the metrics that need those of all people."""
    people = []
    for record in records:
        found = record.pop("faces")
        rows = {name: faces.unpack(text) for name, text in found["rows"].items()}
        people.append({"reference": faces.unpack(found["reference"])[0], "yaws": found["yaws"], "rows": rows})
    for record, metrics in zip(records, faces.face_metrics(people), strict=True):
        record["results"] = {
            row: record["results"].get(row, {}) | metrics[row] for row in [*record["results"], faces.OTHERS]
        }


def sampling_of(options: argparse.Namespace) -> Sampling:
    """What --solver, --steps, --guidance and --eta say."""
    return Sampling(options.solver, options.steps, options.guidance, options.eta)


def check_resolution(subject: Subject, system: Miniature, options: argparse.Namespace) -> None:
    """DataError if the subject's pictures are of another size than the weights work at."""
    side = subject.images.shape[-1]
    if side != system.resolution:
        raise DataError(
            f"'{options.data}' has {side} px pictures, the weights in '{options.weights}' work at "
            f"{system.resolution} px; use a dataset of that resolution."
        )


def test_data(options: argparse.Namespace, resolution: int) -> Path:
    """The dataset asked for; if none was named, held-out people are rendered into the cache (what is there stays).

    Settles how many people are measured if nobody said.
    """
    if options.data:
        options.identities = options.identities or len(held_out_lines(options.data, None))
        return options.data
    options.identities = options.identities or IDENTITIES
    kind, views = "ict" if options.ict else "analytic", options.views + REFERENCES
    folder = options.cache / f"{kind}-{resolution}px-{views}views-yaw{YAW:.0f}-pitch{PITCH:.0f}"
    settings = render.dataset_settings(resolution, views, YAW, PITCH, 0.67 if options.ict else 0.0, CONDITION_PEOPLE, 0)
    counts = {"train": 0, "val": 0, "test": options.identities}
    render.render_dataset(folder, settings, counts, options.ict, workers=options.workers)
    return folder


def common_parser(prog: str, description: str, out: str, views: int = 6) -> argparse.ArgumentParser:
    """Options of every command that measures a weights folder on held-out identities."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--weights", type=Path, default=Path("weights/miniature"), help="folder of the six networks")
    parser.add_argument("--pose-regressor", type=Path, help="default: pose_regressor.safetensors in --weights")
    add_people(parser, views)
    add_sampling(parser)
    add_output(parser, out)
    return parser


def add_output(parser: argparse.ArgumentParser, out: str) -> None:
    """Where the results go."""
    parser.add_argument("--out", type=Path, default=Path(out), help="JSON of the results (default %(default)s)")
    parser.add_argument("--pictures", type=int, default=4, help="identities shown in the PNG beside --out")
    parser.add_argument(
        "--doc", type=Path, help="publish: tables between this page's marks, pictures in the folder called like it"
    )


def add_people(parser: argparse.ArgumentParser, views: int) -> None:
    """Who is looked at, and by how many processes."""
    parser.add_argument("--data", type=Path, help="dataset with a test split; rendered into --cache if absent")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/evaluation"), help="where test subjects are rendered"
    )
    parser.add_argument("--ict", type=Path, help="ICT Face Model Light, to render test subjects of that kind")
    parser.add_argument("--identities", type=int, help=f"default: {IDENTITIES}, or as many as --data has")
    parser.add_argument("--views", type=int, default=views, help="target views per identity, generated together")
    parser.add_argument("--seed", type=int, default=0, help="identity k uses seed + k in every arm")
    parser.add_argument(
        "--store", type=Path, default=Path("runs/views"), help="where generated views are kept (default %(default)s)"
    )
    faces.add_faces_option(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes; identities are shared out among them")
    parser.add_argument("--threads", type=int, help="CPU threads, of all processes together")
    parser.add_argument("--device", default="cpu", help="where the networks run, e.g. cuda (default %(default)s)")


def add_sampling(parser: argparse.ArgumentParser, default: Sampling = Sampling()) -> None:  # noqa: B008
    """How views are sampled."""
    parser.add_argument("--solver", choices=SOLVERS, default=default.solver, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=default.steps, help="of the solver (default %(default)s)")
    parser.add_argument("--eta", type=float, default=default.eta, help="DDIM's noise (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=default.guidance, help="scale (default %(default)s)")


def finish_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other options and refuse numbers that make no sense."""
    if hasattr(options, "weights"):
        options.pose_regressor = options.pose_regressor or options.weights / "pose_regressor.safetensors"
    for name in ("identities", "views", "steps", "workers"):
        value = getattr(options, name, None)
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return options
