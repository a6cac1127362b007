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

from torch import Tensor

from diffportrait3d.command import run_main
from diffportrait3d.pipeline import SOLVERS, Sampling

from .studies.command import add_guidance, add_weights, parse_study, run_command, study_parser
from .studies.generator import ViewGenerator
from .studies.study import Study
from .studies.view_store import SubjectViews, ViewStore, sampling_facts
from .subjects.dataset import Subject
from .subjects.variants import FULL
from .tables.bootstrap import bootstrap_mean
from .tables.report import cell, markdown_table
from .tables.summary import Intervals

TITLES = {"dpmpp_2m": "DPM++ 2M", "ddim": "DDIM"}


class SolverStudy(Study):
    """The full system under several samplings."""

    command = "solvers"
    hidden = ("condition", "autoencoder")

    def __init__(self, options: argparse.Namespace):
        self.samplings = {
            f"{solver}-{steps}": Sampling(steps, solver, options.eta, options.guidance)
            for solver in options.solvers
            for steps in options.steps
        }
        first = next(iter(self.samplings))
        super().__init__(options, {}, ViewGenerator(options.weights, device=options.device), self.samplings[first])
        names = {name: f"{TITLES[each.solver]}, {each.steps} steps" for name, each in self.samplings.items()}
        self.titles = {"ground_truth": "ground truth (floor)", "autoencoder": "autoencoder of it"} | names
        self.rows, self.baseline, self.baseline_title = tuple(names), first, names[first]

    def conditions(self) -> dict:
        return super().conditions() | {"samplings": [sampling_facts(each) for each in self.samplings.values()]}

    def views(self, subject: Subject, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        views, seconds = {"ground_truth": subject.images}, {}
        for name, sampling in self.samplings.items():
            made = SubjectViews(ViewStore(self.options.store, self.generator, sampling), subject, seed)
            stored = made.variant(FULL)
            views[name], seconds[name] = stored.images, stored.seconds
        views["autoencoder"] = made.autoencoder().images
        return views, seconds

    def setting(self) -> str:
        return f"guidance {self.options.guidance}, DDIM's eta {self.options.eta}"

    def report(self, records: list[dict], summary: Intervals, against: Intervals) -> str:
        seconds = {name: bootstrap_mean([record["seconds"][name] for record in records]) for name in self.samplings}
        rows = [[self.titles[name], cell(interval, 1)] for name, interval in seconds.items()]
        return f"{super().report(records, summary, against)}\n\n{markdown_table(['', 'seconds per person'], rows)}"

    def facts(self, records: list[dict], against: dict) -> dict:
        return {"first_minus_others": against}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser("solvers", __doc__, "runs/evaluation/solvers.json")
    add_weights(parser)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[8, 4, 6, 12, 25], help="default: 8 4 6 12 25")
    add_guidance(parser)
    return parse_study(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda options: SolverStudy(options).run(), parse(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
