"""Options that several commands have, and how a command ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffportrait3d.pipeline import SOLVERS, Sampling
from diffportrait3d.portraits.detector import INSTALL

from ..subjects.dataset import IDENTITIES

WEIGHTS = Path("weights/miniature")


def run_command(work: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> int:
    """Do `work(options)` and return the exit status; errors that a user can correct are printed as one line.

    `options.threads`, where a command has it, is the number of CPU threads.
    """
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    try:
        work(options)
    except (ValueError, FileNotFoundError) as error:  # DataError, CheckpointError, ... are ValueErrors
        raise SystemExit(f"{error}") from None
    return 0


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Whose networks are measured."""
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the six networks")
    parser.add_argument("--pose-regressor", type=Path, help="default: pose_regressor.safetensors in --weights")


def add_people(parser: argparse.ArgumentParser) -> None:
    """Whose views are generated, and by how many processes."""
    add = parser.add_argument
    add("--data", type=Path, help="dataset with a test split; rendered into --cache if absent")
    add("--cache", type=Path, default=Path(".cache/evaluation"), help="where test subjects are rendered")
    add("--ict", type=Path, help="ICT Face Model Light, to render test subjects of that kind")
    add("--identities", type=int, help=f"default: {IDENTITIES}, or as many as --data has")
    add("--views", type=int, default=6, help="target views per identity, generated together")
    add("--seed", type=int, default=0, help="identity k uses seed + k in every variant")
    add("--store", type=Path, default=Path("runs/views"), help="where generated views are kept (default %(default)s)")
    add_faces(parser)
    add("--workers", type=int, default=1, help="processes; identities are shared out among them")
    add_device(parser)


def add_faces(parser: argparse.ArgumentParser) -> None:
    """--faces and --no-faces."""
    parser.add_argument(
        "--faces",
        action=argparse.BooleanOptionalAction,
        help=f"measure faces by dlib's networks, on the CPU ({INSTALL}); default: if they are installed",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where networks run."""
    parser.add_argument("--threads", type=int, help="CPU threads, of all processes together")
    parser.add_argument("--device", default="cpu", help="where the networks run, e.g. cuda (default %(default)s)")


def add_batch(parser: argparse.ArgumentParser) -> None:
    """How a GPU makes the views of many people."""
    add = parser.add_argument
    add("--batch", type=int, default=1, help="people whose views the networks make together (default %(default)s)")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of making views (default %(default)s)")


def add_sampling(parser: argparse.ArgumentParser, default: Sampling = Sampling()) -> None:  # noqa: B008
    """How views are sampled."""
    parser.add_argument("--solver", choices=SOLVERS, default=default.solver, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=default.steps, help="of the solver (default %(default)s)")
    add_guidance(parser)


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """What does not depend on the solver and its steps."""
    parser.add_argument("--eta", type=float, default=Sampling.eta, help="DDIM's noise (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance, help="scale (default %(default)s)")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """What --solver, --steps, --guidance and --eta say."""
    return Sampling(options.steps, options.solver, options.eta, options.guidance)


def sampling_text(sampling: Sampling) -> str:
    """In words."""
    eta = f", eta {sampling.eta}" if sampling.solver == "ddim" else ""
    return f"{sampling.steps} steps of {sampling.solver}{eta}, guidance {sampling.guidance}"


def study_parser(
    command: str, doc: str, out: str, *more: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    """The options of every study, and `more`: those about weights and sampling differ."""
    parser = argparse.ArgumentParser(prog=f"python -m evaluation.{command}", description=doc.splitlines()[0])
    add_people(parser)
    parser.add_argument("--out", type=Path, default=Path(out), help="JSON of the results (default %(default)s)")
    parser.add_argument("--pictures", type=int, default=4, help="identities shown in the PNG beside --out")
    parser.add_argument(
        "--doc", type=Path, help="publish: tables between this page's marks, images in the folder named like it"
    )
    for add in more:
        add(parser)
    return parser


def parse_study(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options of a study, checked."""
    return parse_options(parser, arguments, identities=1, views=1, steps=1, workers=1, batch=1)


def parse_options(parser: argparse.ArgumentParser, arguments: list[str] | None, **least: int) -> argparse.Namespace:
    """The options; ends the command if one that it has, or an entry of a list, is below its least value."""
    options = parser.parse_args(arguments)
    for name, limit in least.items():
        value = getattr(options, name, None)
        value = min(value) if isinstance(value, list) else value
        if value is not None and value < limit:
            parser.error(f"--{name} must be at least {limit}, got {value}")
    return options
