"""Steps and solver: what do fewer steps cost, and what do they save?

    python -m evaluation.solvers --weights weights/miniature [--data DIR] [--identities 16] [--views 6]
        [--solvers dpmpp_2m ddim] [--steps 8 4 6 12 25] [--out runs/evaluation/solvers.json] [--doc PAGE]

The full system, every solver with every number of steps, the same people from the same start noise. Printed: pose,
mini-LPIPS, reprojection, faces and the seconds of generating a person's views (of the machine they were generated on
and its load: time one process alone, on a fresh --store), and the paired difference of the first solver and number of
steps to the others.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from torch import Tensor

from diffportrait3d.files import write_text
from diffportrait3d.pipeline import SOLVERS

from .metrics.metric import Metric
from .metrics.views import QUALITY_METRICS
from .studies.command import run_command
from .studies.study import Study, add_output, add_people, finish_options, test_data
from .studies.system import Miniature
from .studies.view_store import SubjectViews, ViewStore
from .subjects.dataset import Subject
from .subjects.variants import ARMS, Sampling
from .tables.bootstrap import bootstrap_mean
from .tables.report import image_rows, publish, save_png, save_webp, stack_pages
from .tables.results_log import write_json
from .tables.summary import as_dicts, difference_table, differences, face_table, mean_table, means

TITLES = {"dpmpp_2m": "DPM++ 2M", "ddim": "DDIM"}
SECONDS = Metric("seconds per person", 1)


class SolverStudy(Study):
    """The full system under several samplings."""

    def __init__(self, options: argparse.Namespace):
        self.samplings = {
            f"{solver}-{steps}": Sampling(solver, steps, options.guidance, options.eta)
            for solver in options.solvers
            for steps in options.steps
        }
        self.baseline = next(iter(self.samplings))
        system = Miniature(options.weights, device=options.device)
        super().__init__(options, {}, system, self.samplings[self.baseline])
        self.titles = {"ground_truth": "ground truth (floor)", "autoencoder": "autoencoder of it"} | {
            name: f"{TITLES[sampling.solver]}, {sampling.steps} steps" for name, sampling in self.samplings.items()
        }

    def conditions(self) -> dict:
        return super().conditions() | {"samplings": [sampling.facts() for sampling in self.samplings.values()]}

    def views(self, subject: Subject, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        views, seconds = {"ground_truth": subject.images}, {}
        for name, sampling in self.samplings.items():
            made = SubjectViews(ViewStore(self.options.store, self.system, sampling), subject, seed)
            stored = made.arm(ARMS["full"])
            views[name], seconds[name] = stored.images, stored.seconds
        views["autoencoder"] = made.autoencoder().images
        return views | {"reference_copy": subject.reference[:1].expand_as(subject.images)}, seconds

    def results(self, subject: Subject, views: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        return self.quality(subject, {name: views[name] for name in self.titles})

    def save_pictures(self, index: int, subject: Subject, views: dict[str, Tensor]) -> None:
        rows = [("reference", subject.reference)]
        rows += [(title, views[name]) for name, title in self.titles.items() if name != "autoencoder"]
        save_png(image_rows(rows), self.page_file(index))


def report(records: list[dict], study: SolverStudy) -> str:
    """Means with seconds, paired differences and faces, as Markdown."""
    metrics, found = QUALITY_METRICS, means(records, study.titles, QUALITY_METRICS)
    for name, values in found.items():
        seconds = [record["seconds"][name] for record in records] if name in study.samplings else []
        values["seconds"] = bootstrap_mean(seconds)
    compared = study.with_faces(metrics)
    against = differences(records, study.baseline, study.samplings, compared)
    return (
        f"{len(records)} held-out identities, {study.options.views} views each, guidance {study.options.guidance}, "
        f"DDIM's eta {study.options.eta}; mean [95 % bootstrap interval over identities]\n\n"
        + mean_table(found, metrics | {"seconds": SECONDS}, study.titles)
        + "\n\nPaired difference (PSNR, SSIM, faces, ID: more is better)\n\n"
        + difference_table(against, study.titles[study.baseline], compared, study.titles)
        + "\n\n"
        + face_table(records, study.titles, study.faces is not None)
    )


def run(options: argparse.Namespace) -> dict:
    """Measure what is not measured yet; print and write tables, JSON and pictures; return the results."""
    started, study = time.perf_counter(), SolverStudy(options)
    options.data = test_data(options, study.system.resolution)
    records = study.measure_all()
    if pages := study.pages(len(records)):
        stack_pages(pages, options.out.with_suffix(".png"))
    text = report(records, study)
    print(text)
    write_text(options.out.with_suffix(".md"), text + "\n")
    if options.doc:
        publish(options.doc, "evaluation.solvers", text)
        if pages:
            save_webp(pages[0], options.doc.with_suffix("") / "solvers.webp")
    metrics = study.with_faces(QUALITY_METRICS)
    results = {
        "conditions": study.conditions(),
        "summary": as_dicts(means(records, study.titles, metrics)),
        "first_minus_others": as_dicts(differences(records, study.baseline, study.samplings, metrics)),
        "identities": records,
    }
    write_json(options.out, results)
    print(f"\n{time.perf_counter() - started:.0f} s in this run. Results: {options.out}")
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.solvers", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=Path("weights/miniature"), help="folder of the six networks")
    parser.add_argument("--pose-regressor", type=Path, help="default: pose_regressor.safetensors in --weights")
    add_people(parser, views=6)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[8, 4, 6, 12, 25], help="default: 8 4 6 12 25")
    parser.add_argument("--eta", type=float, default=Sampling.eta, help="DDIM's noise (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance, help="scale (default %(default)s)")
    add_output(parser, "runs/evaluation/solvers.json")
    options = parser.parse_args(arguments)
    if min(options.steps) < 1:
        parser.error(f"--steps must be at least 1, got {min(options.steps)}")
    return finish_options(parser, options)


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
