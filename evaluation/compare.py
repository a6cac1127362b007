"""Two weights folders on the same held-out people, even of different resolution: which makes better views?

    python -m evaluation.compare FIRST SECOND --data DIR [--identities 40] [--views 6] [--workers 2]
        [--pose-regressor FILE] [--out runs/evaluation/compare.json] [--doc PAGE]

The data have the larger resolution. Networks of the smaller one are given the same images and conditions scaled down,
and their views are scaled up: both are measured at the larger size, by one autoencoder (mini-LPIPS: that of the larger,
or of SECOND), one pose regressor and dlib. Seeds, solver and steps are the same. Printed: means, and SECOND minus FIRST
with paired 95 % bootstrap intervals over identities.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from diffportrait3d.command import run_main

from .studies.command import add_sampling, parse_study, run_command, study_parser
from .studies.generator import ViewGenerator
from .studies.study import Study
from .studies.view_store import SubjectViews, ViewStore
from .subjects.dataset import Subject, at_size, resize
from .subjects.variants import FULL

PAIR = ("first", "second")


class CompareStudy(Study):
    """The full system of two folders."""

    command = "compare"
    hidden = ("condition", "small_truth", "first_autoencoder", "second_autoencoder")

    def __init__(self, options: argparse.Namespace):
        folders = {name: getattr(options, name) for name in PAIR}
        self.pair = {name: ViewGenerator(folder, device=options.device) for name, folder in folders.items()}
        sizes = {name: generator.pipeline.resolution for name, generator in self.pair.items()}
        larger = max(reversed(PAIR), key=sizes.get)
        options.weights = folders[larger]
        super().__init__(options, {}, self.pair[larger])
        self.smallest, self.rows, self.baseline = min(sizes.values()), PAIR, "second"
        same = folders["first"].name == folders["second"].name
        names = {name: f"{folder if same else folder.name} ({sizes[name]} px)" for name, folder in folders.items()}
        self.titles = {"ground_truth": "ground truth (floor)"}
        if self.smallest < sizes[larger]:
            self.titles["small_truth"] = f"ground truth at {self.smallest} px"
        self.titles |= {f"{name}_autoencoder": f"autoencoder of {title}" for name, title in names.items()} | names
        self.baseline_title = names["second"]

    def conditions(self) -> dict:
        hashes = {f"{name}_sha256": generator.hashes for name, generator in self.pair.items()}
        return super().conditions() | hashes | {"rows": list(self.titles)}

    def views(self, subject: Subject, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        size, seconds = subject.images.shape[-1], {}
        views = {"ground_truth": subject.images}
        if "small_truth" in self.titles:
            views["small_truth"] = resize(resize(subject.images, self.smallest), size)
        for name, generator in self.pair.items():
            store = ViewStore(self.options.store, generator, self.store.sampling)
            made = SubjectViews(store, at_size(subject, generator.pipeline.resolution), seed)
            views[f"{name}_autoencoder"] = resize(made.autoencoder().images, size)
            stored = made.variant(FULL)
            views[name], seconds[name] = resize(stored.images, size), stored.seconds
        return views, seconds

    def setting(self) -> str:
        return f"{super().setting()}, all measured at {self.generator.pipeline.resolution} px by one autoencoder"

    def facts(self, records: list[dict], against: dict) -> dict:
        return {"titles": self.titles, "second_minus_first": against["first"]}


def main(arguments: list[str] | None = None) -> int:
    parser = study_parser("compare", __doc__, "runs/evaluation/compare.json")
    parser.add_argument("first", type=Path, help="folder of six networks")
    parser.add_argument("second", type=Path, help="another one, of any resolution")
    parser.add_argument(
        "--pose-regressor", type=Path, help="default: pose_regressor.safetensors in the folder of the larger resolution"
    )
    add_sampling(parser)
    return run_command(lambda options: CompareStudy(options).run(), parse_study(parser, arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
