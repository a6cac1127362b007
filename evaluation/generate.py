"""Generate the views that `evaluation.paper` measures, from a weights folder of any width and a dataset's test split.

    python -m evaluation.generate --weights DIR --data DIR --out VIEWS [--task novel] [--reference aligned]
        [--arm full] [--identities 100] [--views 8] [--steps 100] [--device cuda]

novel: the identity's other views, at once. reconstruction: the reference itself from its own camera, in a group with
other views, which are thrown away: the networks are made for groups. unaligned: what F_ref reads is scaled, turned and
shifted; S keeps the aligned portrait, whose camera it must know. People that are there already stay, so that an
interrupted run goes on. The layout is described in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from diffportrait3d.command import run_main
from training.dataset.images import DataError

from .studies.command import run_command
from .studies.study import add_sampling, sampling_of
from .studies.system import Miniature
from .subjects.dataset import IDENTITIES, Subject, held_out_lines, load_subject
from .subjects.misalignment import MISALIGNMENTS
from .subjects.variants import ABLATION_ARMS, ORDER_ARMS, Sampling
from .subjects.view_folders import REFERENCES, TASKS, Views, write_header, write_views

PAPER = Sampling("ddim", 100)  # section 4
ARMS = [
    name
    for name, arm in ABLATION_ARMS.items()
    if arm.references == 1
    and arm.person == "own"
    and arm.condition != "swapped"
    and name not in ORDER_ARMS
    and not arm.misaligned  # that is --reference
]


def task_subject(root: Path, line: dict, task: str, views: int) -> Subject:
    """The subject whose targets are what the task asks for; masks where the dataset has exact depth."""
    with_depth = all("depth" in view for view in line["views"][: views + 1])
    if task == "reconstruction":  # the reference is the first target, too
        line = line | {"views": [line["views"][0], *line["views"][:views]]}
    return load_subject(root, line, views, depth=with_depth)


def generate(options: argparse.Namespace) -> None:
    """Every identity that is not there yet."""
    system = Miniature(options.weights, device=options.device)
    arm = replace(ABLATION_ARMS[options.arm], misaligned=() if options.reference == "aligned" else MISALIGNMENTS)
    lines = held_out_lines(options.data, options.identities)
    facts = {name: getattr(options, name) for name in ("arm", "solver", "steps", "eta", "guidance", "seed")}
    kept = 1 if options.task == "reconstruction" else options.views
    write_header(
        options.out, options.task, options.reference, views=options.views, weights_sha256=system.hashes,
        resolution=system.resolution, **facts,
    )  # fmt: skip
    for index, line in enumerate(tqdm(lines, desc=f"{options.task}, {options.reference}", unit="id")):
        if (options.out / line["id"]).is_dir():
            continue
        subject = task_subject(options.data, line, options.task, options.views)
        side = subject.images.shape[-1]
        if side != system.resolution:
            raise DataError(
                f"'{options.data}' has {side} px pictures, the weights in '{options.weights}' work at "
                f"{system.resolution} px; use a dataset of that resolution."
            )
        made = system.generate(arm, subject, system.proxies(subject), options.seed + index, sampling_of(options))
        mask = None if subject.mask is None else subject.mask[:kept, None].float()
        write_views(options.out, Views(line["id"], subject.reference, made[:kept], subject.images[:kept], mask))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the six networks, of any width")
    parser.add_argument("--data", type=Path, required=True, help="dataset with a test split")
    parser.add_argument("--out", type=Path, required=True, help="folder of the views")
    parser.add_argument("--task", choices=TASKS, default="novel")
    parser.add_argument("--reference", choices=REFERENCES, default="aligned")
    parser.add_argument("--arm", choices=ARMS, default="full", help="the full system or one that lacks a part")
    parser.add_argument("--identities", type=int, help=f"default: up to {IDENTITIES}, as many as there are")
    parser.add_argument("--views", type=int, default=8, help="views generated together (default %(default)s)")
    add_sampling(parser, PAPER)
    parser.add_argument("--seed", type=int, default=0, help="identity k uses seed + k")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    for name in ("identities", "views", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    status = run_command(generate, options)
    if status == 0:
        print(f"wrote {options.out}")
    return status


if __name__ == "__main__":
    raise SystemExit(run_main(main))
