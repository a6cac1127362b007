"""The orders that the paper reports, written down before they were looked for, and the verdict on each.

Nothing here may be changed after results were seen, except by adding a line that says so. Changed after a trial with
two people and three steps, before any result that counts: the variants with other numbers of steps became relative to
the command's (they were 5 and 50), and fewer than FEWEST people decide nothing. Changed before it was ever run: ordered
views are compared with shuffled ones of a module that has positions, not with the full system's, which has none. Added
after 34 people had shown that training on ordered views does no harm here: the line that asks whether such a module
heeds the order at all. Added before any generated view was measured by dlib: the paper's ID column, by cosine to the
portrait and to the truth and by the rank of the right person; where the paper's ID is equal, by distance, as dlib's
cosines of different people already lie within 5 % of one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..metrics.faces import FACE_METRICS
from ..metrics.views import ABLATION_METRICS
from .bootstrap import Interval, bootstrap_difference, bootstrap_mean
from .results_log import column

BETTER, EQUAL, SMALL = "better than", "equal to", "below"


@dataclass(frozen=True)
class Expectation:
    """One order.

    Attributes:
        source: the place in the paper, or why it follows.
        first, second: names of variants; `second` is empty if `relation` is SMALL.
        metrics: each has its own verdict; the first one is the paper's nearest.
        relation: BETTER: the paired difference has the right sign. EQUAL: it lies within +-margin of the second
            variant's mean. SMALL: the first variant's number itself lies within +-margin.
        margin: a part of the mean for EQUAL, in the metric's unit for SMALL.
    """

    source: str
    first: str
    relation: str
    second: str
    metrics: tuple[str, ...]
    margin: float = 0.0

    @property
    def variants(self) -> set[str]:
        return {self.first, self.second} - {""}


QUALITY = ("mini_lpips", "ssim", "foreground_l1")
FEWEST = 10  # identities that a verdict takes; the bootstrap of fewer is far too narrow
ID = ("dlib_id_reference", "dlib_id_truth", "dlib_first")
FAR = ("far_mini_lpips", "far_psnr")
EXPECTATIONS = (
    # Appearance reference: Table 1b, figure 7, figure 11.
    Expectation("Table 1b: LPIPS .27 < .55, SSIM .68 > .47", "full", BETTER, "untrained_reference", QUALITY),
    Expectation("Table 1b: LPIPS .27 ~ .28, SSIM .68 = .68", "unaligned_reference", EQUAL, "full", QUALITY, 0.05),
    Expectation("Table 1b: ID .70 > .21", "full", BETTER, "untrained_reference", ID),
    Expectation(
        "Table 1b: ID .70 = .70", "unaligned_reference", EQUAL, "full", ("dlib_distance_reference",), 0.05
    ),
    Expectation("Section 3.2: appearance comes from F_ref", "full", BETTER, "no_reference", QUALITY),
    Expectation(
        "Section 3.2, without S's help", "random_noise", BETTER, "random_noise_no_reference", ("mini_lpips", "ssim")
    ),
    # View control: section 3.3.
    Expectation("Section 3.3: the view comes from F_cam", "full", BETTER, "no_camera", ("pose",)),
    Expectation("Section 3.3, without S's help", "random_noise", BETTER, "random_noise_no_camera", ("pose",)),
    Expectation(
        "Section 3.3: F_cam reads the pose, not the person", "swapped_condition", BETTER, "swapped_reference",
        ("change",),
    ),
    Expectation("Section 3.3: no appearance leaks from I_cam", "swapped_condition", SMALL, "", ("leak",), 0.05),
    Expectation(
        "Section 3.3: any person shows the view", "swapped_condition", EQUAL, "full", ("pose", "mini_lpips"), 0.05
    ),
    # Start noise: Table 2, figures 5 and 10.
    Expectation(
        "Table 2: LPIPS .27 < .32, SSIM .68 > .65", "full", BETTER, "random_noise", ("mini_lpips", "ssim", "pose")
    ),
    Expectation("Table 2: ID .70 = .70", "random_noise", EQUAL, "full", ("dlib_distance_reference",), 0.05),
    Expectation("Figure 5: coherence from 3D-aware noise", "full", BETTER, "random_noise", ("reprojection",)),
    Expectation(
        "Section 3.4, not in a table: 3D-aware, not just shared", "full", BETTER, "shared_noise", ("mini_lpips", "pose")
    ),
    Expectation(
        "Not in the paper (the release's fallback): the wrong view misleads", "full", BETTER, "reference_noise",
        ("mini_lpips", "pose"),
    ),
    Expectation("Not in the paper: S's blur is what is left to gain", "truth_noise", BETTER, "full", ("mini_lpips",)),
    # View consistency: figure 5.
    Expectation(
        "Figure 5: background and shading vary without it", "full", BETTER, "no_view_consistency",
        ("reprojection", "background_variation"),
    ),
    Expectation(
        "Figure 5, without S's help", "random_noise", BETTER, "random_noise_no_view_consistency",
        ("reprojection", "background_variation"),
    ),
    Expectation("Section 3.4: shuffled views", "shuffled_views", BETTER, "ordered_views", ("reprojection", "pose")),
    Expectation(
        "Why that would be: it leans on the order", "ordered_views_in_order", BETTER, "ordered_views", ("reprojection",)
    ),
    # More references: figure 8.
    Expectation("Figure 8: 2 better than 1", "two_references", BETTER, "full", FAR),
    Expectation("Section 4, figure 8: more of the person in 2 than in 1", "two_references", BETTER, "full", ID),
    Expectation("Figure 8: 4 better than 2", "four_references", BETTER, "two_references", FAR),
    # Sampling: section 4 calls guidance 3 and 100 steps a good balance.
    Expectation("Section 4: guidance 3, not none", "full", BETTER, "guidance_1", ("mini_lpips", "pose")),
    Expectation("Section 4: guidance 3, not more", "full", BETTER, "guidance_8", ("mini_lpips", "ssim")),
    Expectation("Section 4: more steps, better", "full", BETTER, "quarter_steps", ("mini_lpips",)),
    Expectation("Section 4: few steps lose little", "full", EQUAL, "double_steps", ("mini_lpips", "pose"), 0.05),
)  # fmt: skip


class Verdict(NamedTuple):
    """`interval` is the paired difference, turned so that positive is what was expected (EQUAL and SMALL: as it is),
    `allowed` the margin in the metric's unit, `word` one of holds, does not, undecided."""

    expectation: Expectation
    metric: str
    interval: Interval
    allowed: float
    word: str


def verdict(expectation: Expectation, metric: str, records: list[dict]) -> Verdict:
    """The verdict by the 95 % paired bootstrap interval over identities."""
    first = column(records, expectation.first, metric)
    if expectation.relation == SMALL:
        return _within(expectation, metric, bootstrap_mean(first), expectation.margin)
    second = column(records, expectation.second, metric)
    if expectation.relation == EQUAL:
        allowed = expectation.margin * abs(bootstrap_mean(second).mean)
        return _within(expectation, metric, bootstrap_difference(first, second), allowed)
    pair = (first, second) if (ABLATION_METRICS | FACE_METRICS)[metric].more_is_better else (second, first)
    interval = bootstrap_difference(*pair)
    word = "holds" if interval.low > 0 else "does not" if interval.high < 0 else "undecided"
    return _verdict(expectation, metric, interval, 0.0, word)


def _within(expectation: Expectation, metric: str, interval: Interval, allowed: float) -> Verdict:
    inside = -allowed <= interval.low and interval.high <= allowed
    outside = interval.high < -allowed or interval.low > allowed
    word = "holds" if inside else "does not" if outside else "undecided"
    return _verdict(expectation, metric, interval, allowed, word)


def _verdict(expectation: Expectation, metric: str, interval: Interval, allowed: float, word: str) -> Verdict:
    return Verdict(expectation, metric, interval, allowed, word if interval.count >= FEWEST else "undecided")


def verdicts(records: list[dict], variants: set[str]) -> list[Verdict]:
    """Every expectation whose variants were all run, metric by metric; without metrics that were not measured."""
    chosen = [expectation for expectation in EXPECTATIONS if expectation.variants <= variants]
    measured = set(records[0]["results"]["full"])
    return [verdict(e, metric, records) for e in chosen for metric in e.metrics if metric in measured]
