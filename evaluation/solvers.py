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
import itertools

from diffportrait3d.command import run_main
from diffportrait3d.pipeline import SOLVERS, Sampling

from .studies.command import add_guidance, add_weights, parse_study, run_command, study_parser
from .studies.samplings import SamplingStudy

TITLES = {"dpmpp_2m": "DPM++ 2M", "ddim": "DDIM"}


class SolverStudy(SamplingStudy):
    """Every solver with every number of steps."""

    command = "solvers"

    def __init__(self, options: argparse.Namespace):
        rows = {}
        for solver, steps in itertools.product(options.solvers, options.steps):
            sampling = Sampling(steps, solver, options.eta, options.guidance)
            rows[f"{solver}-{steps}"] = f"{TITLES.get(solver, solver)}, {steps} steps", sampling
        super().__init__(options, rows)

    def setting(self) -> str:
        return f"guidance {self.options.guidance}, DDIM's eta {self.options.eta}"


def main(arguments: list[str] | None = None) -> int:
    parser = study_parser("solvers", __doc__, "runs/evaluation/solvers.json", add_weights)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[8, 4, 6, 12, 25], help="default: 8 4 6 12 25")
    add_guidance(parser)
    return run_command(lambda options: SolverStudy(options).run(), parse_study(parser, arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
