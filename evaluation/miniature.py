"""What each part of the miniature brings, on held-out identities against exact ground truth.

    python -m evaluation.miniature --weights weights/miniature [--data DIR] [--identities 100] [--workers 2]
        [--device cuda --batch 16 --precision bfloat16] [--solver dpmpp_2m] [--steps 8] [--out FILE.json] [--doc PAGE]

For every held-out subject: the full system and the system less one part (reference, camera, view consistency, S's
start noise) generate the same views from the same noise. Printed with 95 % bootstrap intervals over identities:
camera error by the pose regressor, PSNR, SSIM, foreground and background error, and view consistency by depth
reprojection; then the paired differences to the full system. Generated views are kept in --store, measured identities
beside --out, so that an interrupted command resumes.
"""

from __future__ import annotations

import argparse

from diffportrait3d.command import run_main

from .metrics.views import METRICS
from .studies.command import add_batch, add_sampling, add_weights, parse_study, run_command, study_parser
from .studies.generator import ViewGenerator
from .studies.study import Study
from .subjects.variants import PART_VARIANTS


class MiniatureStudy(Study):
    """The full system and what is left without each of its parts."""

    command, metrics, compared = "miniature", METRICS, tuple(METRICS)

    def __init__(self, options: argparse.Namespace):
        super().__init__(
            options, PART_VARIANTS, ViewGenerator(options.weights, None, options.device, options.precision)
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    out = "runs/evaluation/miniature.json"
    return parse_study(study_parser("miniature", __doc__, out, add_weights, add_sampling, add_batch), arguments)


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda options: MiniatureStudy(options).run(), parse(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
