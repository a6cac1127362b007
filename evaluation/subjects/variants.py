"""What is changed about the system in each experiment, one thing at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from diffportrait3d.pipeline import Sampling

from .misalignment import MISALIGNMENTS, SCALE, SHIFT, TURN

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


# By what they are about, in the order of the paper's experiments; each theme is shown beside the full system.
# "No reference" and "no camera" keep S's start noise, which carries a trace of both: one part is removed at a time.
THEMES = {
    "appearance": {
        "no_reference": Variant("no reference", encoder="none"),
        "untrained_reference": Variant("F_ref untrained", encoder="untrained"),
        "unaligned_reference": Variant("reference unaligned", misaligned=MISALIGNMENTS),
        "scaled_reference": Variant("reference scaled", misaligned=(SCALE,)),
        "turned_reference": Variant("reference turned", misaligned=(TURN,)),
        "shifted_reference": Variant("reference shifted", misaligned=(SHIFT,)),
        "swapped_reference": Variant("reference of somebody else", person="another"),
        "two_references": Variant("2 references", references=2),
        "four_references": Variant("4 references", references=4),
    },
    "camera": {
        "no_camera": Variant("no camera", condition="none"),
        "swapped_condition": Variant("condition of somebody else", condition="swapped"),
    },
    # The miniature's view consistency has no positions, so that order is nothing to it: the effect of shuffling shows
    # in a pair of modules that have them.
    "view_consistency": {
        "no_view_consistency": Variant("no view consistency", view_consistency="none"),
        "shuffled_views": Variant("view consistency with positions, shuffled views", view_consistency="shuffled"),
        "ordered_views": Variant("view consistency with positions, ordered views", view_consistency="ordered"),
        "shuffled_views_in_order": Variant(
            "shuffled views, sampled in order", view_consistency="shuffled", in_order=True
        ),
        "ordered_views_in_order": Variant("ordered views, sampled in order", view_consistency="ordered", in_order=True),
    },
    # Random noise in pairs: S's start noise carries so much layout that it hides what the other parts do.
    "start_noise": {
        "random_noise": Variant("random noise", start="random"),
        "shared_noise": Variant("noise shared by the views", start="shared"),
        "reference_noise": Variant("noise from the reference", start="reference"),
        "truth_noise": Variant("noise from the ground truth", start="truth"),
        "random_noise_no_reference": Variant("random noise, no reference", start="random", encoder="none"),
        "random_noise_no_camera": Variant("random noise, no camera", start="random", condition="none"),
        "random_noise_no_view_consistency": Variant(
            "random noise, no view consistency", start="random", view_consistency="none"
        ),
    },
    "sampling": {
        "guidance_1": Variant("guidance 1", guidance=1.0),
        "guidance_2": Variant("guidance 2", guidance=2.0),
        "guidance_5": Variant("guidance 5", guidance=5.0),
        "guidance_8": Variant("guidance 8", guidance=8.0),
        "quarter_steps": Variant("a quarter of the steps", steps_factor=0.25),
        "half_steps": Variant("half of the steps", steps_factor=0.5),
        "double_steps": Variant("twice the steps", steps_factor=2.0),
    },
    # What may spoil faces, one suspect at a time; no claim of the paper's, and not run by default.
    "faces": {
        "guided_early": Variant("guidance at the noisy half only", guided=(500, 1000)),
        "guided_late": Variant("guidance at the clean half only", guided=(0, 500)),
        "ddim_eta_0": Variant("DDIM, eta 0", solver="ddim", eta=0.0),
        "ddim_eta_half": Variant("DDIM, eta 0.5", solver="ddim", eta=0.5),
        "ddim_eta_1": Variant("DDIM, eta 1", solver="ddim", eta=1.0),
        "half_strength": Variant("S's views at half strength", strength=0.5),
        "double_strength": Variant("S's views at double strength", strength=2.0),
    },
}
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
