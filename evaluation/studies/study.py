"""A study: variants of the system on held-out people, one person after the other, in one process or several.

Views come from the store (`evaluation.studies.view_store`), which generates missing ones, and everything is measured
on its 8-bit images: a metric that is added later needs no new views.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffportrait3d.cameras.labels import viewing_directions, yaw_pitch
from diffportrait3d.files import append_line, file_hash, write_text
from diffportrait3d.pipeline import Sampling
from diffportrait3d.synthetic_heads import render_camera_images
from training import render
from training.dataset.images import FIRST_CONDITION, DataError
from training.engine.workers import call, worker_pool

from ..metrics import faces
from ..metrics.images import feature_distance, unit_features
from ..metrics.pose import load_pose_regressor
from ..metrics.reprojection import reprojection_pairs
from ..metrics.views import QUALITY_METRICS, measure, measure_variant
from ..subjects.dataset import IDENTITIES, Subject, held_out_lines, load_subject, read_images
from ..subjects.variants import ABLATION_VARIANTS, Variant
from ..tables.report import image_rows, publish, save_png, save_webp, stack_pages
from ..tables.results_log import read_log, write_json
from ..tables.summary import Intervals, as_dicts, difference_table, differences, face_table, mean_table, means
from .command import sampling_of, sampling_text
from .generator import ViewGenerator
from .view_store import SubjectViews, ViewStore, variant_views

CONTEXT = {
    "ground_truth": "ground truth (floor)",
    "autoencoder": "autoencoder of it",
    "proxy": "S alone",
    "reference_copy": "copy of the reference",
}
# Of the test people that are rendered when no dataset is named: the range that the pose regressor was trained for.
YAW, PITCH, CONDITION_PEOPLE = 60.0, 20.0, 64
SWAPPED_PEOPLE = FIRST_CONDITION["test"] + 500_000  # analytic people that no dataset shows as conditions
REFERENCES = max(variant.references for variant in ABLATION_VARIANTS.values())  # that these have: enough for all


class Study:
    """Networks, metrics and options that measure one identity after the other, in this process.

    Attributes:
        command: whose results are published under its name.
        metrics: that are measured of every row.
        shown: those in the table of means; None is all.
        compared: those in the table of differences; None is all, with those of faces.
        hidden: rows that the pages of images leave out.
        difference: name of the differences in the JSON.

    Args:
        options: of the command.
        variants: by name.
        generator: whose views they are, and whose autoencoder measures mini-LPIPS.
        sampling: None takes the options'.
    """

    command = ""
    metrics = QUALITY_METRICS
    shown: tuple[str, ...] | None = None
    compared: tuple[str, ...] | None = None
    hidden = ("autoencoder", "reference_copy")
    difference = "full_minus_arm"

    def __init__(
        self,
        options: argparse.Namespace,
        variants: dict[str, Variant],
        generator: ViewGenerator,
        sampling: Sampling | None = None,
    ):
        self.options, self.variants, self.generator = options, variants, generator
        self.store = ViewStore(options.store, generator, sampling or sampling_of(options))
        regressor = options.pose_regressor or options.weights / "pose_regressor.safetensors"
        self.pipeline = generator.pipeline
        self.regressor = load_pose_regressor(regressor).to(self.pipeline.device)
        self.regressor_hash = file_hash(regressor)
        self.faces = faces.load_face_networks(options.faces, options.store / "faces")
        self.references = max((variant.references for variant in variants.values()), default=1)
        self.titles = CONTEXT | {name: variant.title for name, variant in variants.items()}
        self.rows, self.baseline, self.baseline_title = tuple(variants), "full", "full"  # of the differences

    def conditions(self) -> dict:
        """Everything, besides the subjects, that the numbers depend on; only results under equal ones are joined."""
        options, sampling, precision = self.options, self.store.sampling, self.generator.precision
        return ({} if precision == "float32" else {"precision": precision}) | {
            "weights_sha256": self.generator.hashes,
            "pose_regressor_sha256": self.regressor_hash,
            "views": options.views,
            **{name: getattr(sampling, name) for name in ("solver", "steps", "guidance", "eta", "guided")},
            "seed": options.seed,
            "faces_sha256": self.faces and self.faces.sha256,
            "linear_end": self.pipeline.schedule.linear_end,
            "resolution": self.pipeline.resolution,
            "arms": {name: asdict(variant) for name, variant in self.variants.items()},
        }

    def subject(self, index: int) -> Subject:
        """Subject `index`, with another person's portraits, and yet another one at its cameras, where a variant needs
        them."""
        options = self.options
        lines = held_out_lines(options.data, options.identities)
        subject = load_subject(options.data, lines[index], options.views, self.references)
        check_resolution(subject, self.generator, options)
        if any(variant.person == "another" for variant in self.variants.values()):
            others = held_out_lines(options.data, max(options.identities, 2))
            view = others[(index + 1) % len(others)]["views"][:1]
            subject.other_reference = read_images(options.data, view, "image")
        if any(variant.condition == "swapped" for variant in self.variants.values()):
            size, person = subject.images.shape[-1], SWAPPED_PEOPLE + index
            subject.other_conditions = render_camera_images(subject.labels, size, person)
        return subject

    def views(self, subject: Subject, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The images [V, 3, H, W] of every row but the copied reference, and the seconds that generating took."""
        made = SubjectViews(self.store, subject, seed)
        stored = {name: made.variant(variant) for name, variant in self.variants.items()}
        views = {
            "ground_truth": subject.images,
            "autoencoder": made.autoencoder().images,
            "proxy": made.proxy().images,
        } | {name: found.images for name, found in stored.items()}
        return views, {name: found.seconds for name, found in stored.items()}

    def measure(self, index: int) -> dict:
        """The record of one identity; also saves its page of images if it is to be shown."""
        subject, seed = self.subject(index), self.options.seed + index
        views, seconds = self.views(subject, seed)
        views["reference_copy"] = subject.reference[:1].expand_as(subject.images)
        if index < self.options.pictures:
            self.save_page(index, subject, views)
        record = {"id": subject.id, "digest": subject.digest, "seed": seed, "seconds": seconds}
        return record | {"results": self.results(subject, views), "faces": self.face_embeddings(subject, views)}

    def results(self, subject: Subject, views: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """The metrics of every row of the table."""
        pairs, autoencoder = reprojection_pairs(subject.depth, subject.mask, subject.labels), self.pipeline.autoencoder
        rows = {name: images for name, images in views.items() if name in self.titles}
        seen = self.by_network(rows, lambda images: self.regressor.predict(images * 2 - 1))
        found = {name: measure(images, subject, seen[name], pairs) for name, images in rows.items()}
        if "mini_lpips" in self.metrics:
            truth = unit_features(subject.images.to(self.pipeline.device), autoencoder)
            far = self.by_network(rows, lambda images: feature_distance(unit_features(images, autoencoder), truth))
            for name, distances in far.items():
                found[name]["mini_lpips"] = distances.mean().item()
                if "change" in self.metrics:
                    found[name] |= measure_variant(name, views, subject, distances)
        return found

    def by_network(self, rows: dict[str, Tensor], network: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What a network says of the images [V, 3, H, W] of every row, [V, ...] each; on its device, in float32, the
        images of --batch rows at once."""
        count, batch = len(next(iter(rows.values()))), getattr(self.options, "batch", 1)
        chunks = torch.cat(list(rows.values())).split(batch * count)
        said = torch.cat([network(images.to(self.pipeline.device)).cpu() for images in chunks])
        return dict(zip(rows, said.split(count), strict=True))

    def face_embeddings(self, subject: Subject, views: dict[str, Tensor]) -> dict | None:
        """Of the portrait and of every row, as text; their metrics need those of everybody."""
        if self.faces is None:
            return None
        portrait = self.faces.embeddings(subject.reference[:1])  # [1, 128]
        rows = {name: self.faces.embeddings(images) for name, images in views.items() if name != "reference_copy"}
        rows["reference_copy"] = portrait.repeat(len(subject.images), axis=0)
        packed = {name: faces.pack(found) for name, found in rows.items()}
        yaws = yaw_pitch(viewing_directions(subject.labels))[0].tolist()
        return {"reference": faces.pack(portrait), "yaws": yaws, "rows": packed}

    def with_faces(self, metrics: dict) -> dict:
        """These metrics and, if faces are measured, theirs."""
        return metrics | (faces.FACE_METRICS if self.faces else {})

    def save_page(self, index: int, subject: Subject, views: dict[str, Tensor]) -> None:
        """The images of one identity."""
        titles = {"reference": "reference", "condition": "condition"} | self.titles
        images = {"reference": subject.reference, "condition": subject.conditions} | views
        rows = [(title, images[name]) for name, title in titles.items() if name not in self.hidden]
        save_png(image_rows(rows), self.page_file(index))

    def page_file(self, index: int) -> Path:
        return self.options.out.with_suffix(".pages") / f"{index:03d}.png"

    def measure_all(self) -> list[dict]:
        """The records of all identities asked for; those of an earlier run are reused, new ones written at once."""
        options, log = self.options, self.options.out.with_suffix(".identities.jsonl")
        held_out_lines(options.data, options.identities)  # too few: known before anything is generated
        records = read_log(log, self.conditions(), options.data)[: options.identities]
        remaining = range(len(records), options.identities)
        with self._record_stream(remaining) as stream:
            for record in tqdm(stream, total=options.identities, initial=len(records), desc="identities", unit="id"):
                append_line(log, json.dumps(record))
                records.append(record)
        if self.faces is not None:
            faces.add_face_metrics(records)
        return records

    def made_together(self, indices: range) -> Iterator[int]:
        """The identities, each when its views are in the store, if several are to be made at once: by this process, on
        its device, while those of --workers measure."""
        batch = getattr(self.options, "batch", 1)
        for first in range(0, len(indices), batch):
            chunk = indices[first : first + batch]
            if batch > 1:
                people = [SubjectViews(self.store, self.subject(k), self.options.seed + k) for k in chunk]
                for variant in self.variants.values():
                    variant_views(people, variant)
            yield from chunk

    @contextlib.contextmanager
    def _record_stream(self, indices: range) -> Iterator[Iterator[dict]]:
        """The records of identities in order, made in this process or by --workers of them."""
        workers, made = min(self.options.workers, len(indices)), self.made_together(indices)
        if workers <= 1:
            yield map(self.measure, made)
            return
        threads = max(1, torch.get_num_threads() // workers)
        with worker_pool(workers, _measurer, (type(self), self.options), threads) as pool:
            yield pool.imap(call, made)

    def run(self) -> dict:
        """Measure what is not measured yet; print and write tables, JSON and images; return the results."""
        started, options = time.perf_counter(), self.options
        options.data = test_data(options, self.pipeline.resolution)
        records, metrics = self.measure_all(), self.with_faces(self.metrics)
        summary = means(records, self.titles, metrics)
        against = differences(records, self.baseline, self.rows, metrics)
        text = self.report(records, summary, against)
        print(text)
        write_text(options.out.with_suffix(".md"), text + "\n")
        pages = [self.page_file(index) for index in range(min(options.pictures, len(records)))]
        if pages := [page for page in pages if page.is_file()]:
            stack_pages(pages, options.out.with_suffix(".png"))
        if options.doc:
            publish(options.doc, f"evaluation.{self.command}", text)
            for name, image in self.published().items():
                if image.is_file():
                    save_webp(image, options.doc.with_suffix("") / f"{name}.webp")
        seconds = {name: float(np.mean([r["seconds"][name] for r in records])) for name in records[0]["seconds"]}
        results = {"conditions": self.conditions(), "seconds_per_identity": seconds, "summary": as_dicts(summary)}
        results |= self.facts(records, as_dicts(against)) | {"identities": records}
        write_json(options.out, results)
        print(
            f"\n{seconds[self.baseline]:.1f} s for {options.views} views of an identity ({self.baseline_title}), "
            f"{time.perf_counter() - started:.0f} s in this run. Results: {options.out}"
        )
        return results

    def facts(self, records: list[dict], against: dict) -> dict:
        """What the JSON holds besides."""
        return {self.difference: against}

    def published(self) -> dict[str, Path]:
        """The images of a page, by name."""
        return {self.command: self.page_file(0)}

    def setting(self) -> str:
        """How views are made, for the first line of the report."""
        return sampling_text(self.store.sampling)

    def report(self, records: list[dict], summary: Intervals, against: Intervals) -> str:
        """Means, paired differences and faces, as Markdown."""
        shown = {name: self.metrics[name] for name in self.shown or self.metrics}
        compared = self.with_faces(self.metrics)
        compared = {name: compared[name] for name in self.compared or compared if name in compared}
        return "\n\n".join(
            (
                f"{len(records)} held-out identities, {self.options.views} views each, {self.setting()}; "
                "mean [95 % bootstrap interval over identities]",
                mean_table(summary, shown, self.titles),
                "Paired difference (PSNR, SSIM, faces, ID: more is better; errors: less is better)",
                difference_table(against, self.baseline_title, compared, self.titles),
                face_table(records, self.titles, self.faces is not None),
            )
        )


def _measurer(study: type[Study], options: argparse.Namespace) -> Callable[[int], dict]:
    torch.set_flush_denormal(True)
    return study(options).measure


def check_resolution(subject: Subject, generator: ViewGenerator, options: argparse.Namespace) -> None:
    """Raises DataError if the subject's images are of another size than the weights work at."""
    side, resolution = subject.images.shape[-1], generator.pipeline.resolution
    if side != resolution:
        raise DataError(
            f"'{options.data}' has {side} px images, the weights in '{options.weights}' work at {resolution} px; "
            "use a dataset of that resolution."
        )


def test_data(options: argparse.Namespace, resolution: int) -> Path:
    """The dataset asked for; if none was named, held-out people are rendered into the cache (existing ones are kept).

    Also sets `options.identities`, where it is not given.
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
