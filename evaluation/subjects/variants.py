"""What is changed about the system in each experiment (`variants.yaml`), one thing at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from diffportrait3d.pipeline import Sampling

SAMPLING_FIELDS = ("guidance", "eta", "guided", "solver")  # of a variant that a sampling has, too
NOT_INPUTS = ("title", "steps_factor", *SAMPLING_FIELDS)


@dataclass(frozen=True)
class Variant:
    """A way to generate the views of a subject; the defaults are the full system.

    The names of the fields are stored beside results and views.

    Attributes:
        title: its name in tables and images.
        encoder: F_ref as "trained", the "untrained" copy of F that its training began with, or "none".
        references: how many portraits F_ref reads; S always reads the first one alone.
        person: whose portraits F_ref reads, the subject's "own" or those of "another" person. S reads the subject's.
        misaligned: what is done to F_ref's portraits, of "scale", "turn" and "shift" (`.misalignment`).
        condition: what F_cam is shown: the "given" images, the "swapped" ones (somebody else at the same cameras),
            or "none".
        view_consistency: "trained", as published; one of a pair of modules with positions that the user names, trained
            alike but on "shuffled" and on "ordered" views; or "none".
        in_order: the networks are given the views sorted by yaw, as of a camera that moves around the head; else as
            they come.
        start: what is diffused to the terminal step for the start noise: S's "proxy" views, the "reference" in every
            view (the release's fallback), the "truth" (the best there could be); or pure noise, "random" in every
            view or the "shared" one.
        strength: factor of S's views before they are diffused.
        steps_factor: of the command's number of steps.
        guidance, eta, guided, solver: None takes the command's.
    """

    title: str
    encoder: str = "trained"
    references: int = 1
    person: str = "own"
    misaligned: tuple[str, ...] = ()
    condition: str = "given"
    view_consistency: str = "trained"
    in_order: bool = False
    start: str = "proxy"
    strength: float = 1.0
    steps_factor: float = 1.0
    guidance: float | None = None
    eta: float | None = None
    guided: tuple[int, int] | None = None
    solver: str | None = None

    def sampling(self, command: Sampling) -> Sampling:
        """The command's, with what this variant changes about it."""
        own = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        own = {name: value for name, value in own.items() if value is not None}
        return replace(command, steps=max(1, round(command.steps * self.steps_factor)), **own)

    def changes(self) -> dict:
        """What differs from the full system, but for title and sampling: a field that is added later changes none."""
        here, full = asdict(self), asdict(Variant(""))
        return {name: value for name, value in here.items() if name not in NOT_INPUTS and value != full[name]}


def _read() -> dict[str, dict[str, Variant]]:
    """The variants by theme and name."""
    themes = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for variants in themes.values():
        for name, changes in variants.items():
            lists = {field: tuple(value) for field, value in changes.items() if isinstance(value, list)}
            variants[name] = Variant(**changes | lists)
    return themes


THEMES = _read()
FULL = Variant("full system")
ALL_VARIANTS = {"full": FULL} | {name: variant for theme in THEMES.values() for name, variant in theme.items()}
ABLATION_VARIANTS = {name: variant for name, variant in ALL_VARIANTS.items() if name not in THEMES["faces"]}
PARTS = ("full", "no_reference", "no_camera", "no_view_consistency", "random_noise")
PART_VARIANTS = {name: ALL_VARIANTS[name] for name in PARTS}

# Sets of variants that the command knows by one word; "full" is in each of them.
GROUPS = {
    "all": tuple(ABLATION_VARIANTS),
    "main": (  # Table 1b, Table 2 and figure 5, figure 8
        "untrained_reference", "unaligned_reference", "two_references", "four_references", "no_view_consistency",
        "random_noise", "random_noise_no_view_consistency",
    ),
    "faces": (
        "two_references", "four_references", "no_view_consistency", "truth_noise", "guidance_1", "guidance_2",
        "guidance_5", "half_steps", "double_steps", *THEMES["faces"],
    ),
}  # fmt: skip

# View consistency whose weights the user names, in the order of the option, and the variants that need them.
ORDER_WEIGHTS = ("shuffled", "ordered")
ORDER_VARIANTS = tuple(name for name, variant in ALL_VARIANTS.items() if variant.view_consistency in ORDER_WEIGHTS)
