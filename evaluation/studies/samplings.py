"""The full system under several samplings, on the same people from the same start noise."""

from __future__ import annotations

import argparse

from torch import Tensor

from diffportrait3d.pipeline import Sampling

from ..subjects.dataset import Subject
from ..subjects.variants import FULL
from ..tables.bootstrap import bootstrap_mean
from ..tables.report import cell, markdown_table
from ..tables.summary import Intervals
from .generator import ViewGenerator
from .study import CONTEXT, Study
from .view_store import SubjectViews, ViewStore, sampling_facts


class SamplingStudy(Study):
    """A row per sampling; differences are those of the first one to the others.

    Args:
        options: of the command.
        rows: title and sampling by name.
    """

    hidden = ("condition", "autoencoder")
    difference = "first_minus_others"

    def __init__(self, options: argparse.Namespace, rows: dict[str, tuple[str, Sampling]]):
        self.samplings, first = {name: sampling for name, (_, sampling) in rows.items()}, next(iter(rows))
        super().__init__(options, {}, ViewGenerator(options.weights, device=options.device), self.samplings[first])
        titles = {name: title for name, (title, _) in rows.items()}
        self.titles = {name: CONTEXT[name] for name in ("ground_truth", "autoencoder")} | titles
        self.rows, self.baseline, self.baseline_title = tuple(rows), first, titles[first]

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

    def report(self, records: list[dict], summary: Intervals, against: Intervals) -> str:
        return f"{super().report(records, summary, against)}\n\n{self.cost_table(records)}"

    def cost_table(self, records: list[dict]) -> str:
        """What each row costs."""
        seconds = {name: bootstrap_mean([record["seconds"][name] for record in records]) for name in self.samplings}
        rows = [[self.titles[name], cell(interval, 1)] for name, interval in seconds.items()]
        return markdown_table(["", "seconds per person"], rows)
