"""Generate the views that `evaluation.paper` measures, from a weights folder of any width and a dataset's test split.

    python -m evaluation.generate --weights DIR --data DIR --out VIEWS [--task novel] [--reference aligned]
        [--arm full] [--identities 100] [--views 8] [--steps 100] [--device cuda]

novel: the identity's other views, at once. reconstruction: the reference itself from its own camera, in a group with
other views, which are thrown away: the networks are made for groups. unaligned: what F_ref reads is scaled, turned and
shifted; S keeps the aligned portrait, whose camera it must know. Existing people are kept, so that an interrupted run
resumes. The layout is described in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from diffportrait3d.command import run_main
from diffportrait3d.pipeline import Sampling

from .studies.command import add_sampling, parse_options, run_command, sampling_of
from .studies.generator import ViewGenerator
from .studies.study import check_resolution
from .subjects.dataset import IDENTITIES, held_out_lines, load_subject
from .subjects.misalignment import MISALIGNMENTS
from .subjects.variants import ABLATION_VARIANTS, ORDER_VARIANTS
from .subjects.view_folders import REFERENCES, TASKS, Views, write_header, write_views

PAPER = Sampling(100, "ddim")  # section 4
VARIANTS = [
    name
    for name, variant in ABLATION_VARIANTS.items()
    if (variant.references, variant.person) == (1, "own") and variant.condition != "swapped"
    if name not in ORDER_VARIANTS and not variant.misaligned  # that is --reference
]


def generate(options: argparse.Namespace) -> None:
    generator = ViewGenerator(options.weights, device=options.device)
    misaligned = () if options.reference == "aligned" else MISALIGNMENTS
    variant = replace(ABLATION_VARIANTS[options.arm], misaligned=misaligned)
    lines = held_out_lines(options.data, options.identities)
    facts = {name: getattr(options, name) for name in ("views", "arm", "solver", "steps", "eta", "guidance", "seed")}
    facts |= {"weights_sha256": generator.hashes, "resolution": generator.pipeline.resolution}
    write_header(options.out, options.task, options.reference, **facts)
    kept = 1 if options.task == "reconstruction" else options.views
    for index, line in enumerate(tqdm(lines, desc=f"{options.task}, {options.reference}", unit="id")):
        if (options.out / line["id"]).is_dir():
            continue
        exact = all("depth" in view for view in line["views"][: options.views + 1])
        if options.task == "reconstruction":  # the reference is the first target, too
            line = line | {"views": [line["views"][0], *line["views"][: options.views]]}
        subject = load_subject(options.data, line, options.views, depth=exact)  # masks where there is exact depth
        check_resolution(subject, generator, options)
        person = subject, generator.proxies(subject), options.seed + index
        made = generator.generate(variant, [person], sampling_of(options))[0][:kept]
        mask = None if subject.mask is None else subject.mask[:kept, None].float()
        write_views(options.out, Views(line["id"], subject.reference, made, subject.images[:kept], mask))
    print(f"wrote {options.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the six networks, of any width")
    parser.add_argument("--data", type=Path, required=True, help="dataset with a test split")
    parser.add_argument("--out", type=Path, required=True, help="folder of the views")
    parser.add_argument("--task", choices=TASKS, default="novel")
    parser.add_argument("--reference", choices=REFERENCES, default="aligned")
    parser.add_argument("--arm", choices=VARIANTS, default="full", help="the full system or one that lacks a part")
    parser.add_argument("--identities", type=int, help=f"default: up to {IDENTITIES}, as many as there are")
    parser.add_argument("--views", type=int, default=8, help="views generated together (default %(default)s)")
    add_sampling(parser, PAPER)
    parser.add_argument("--seed", type=int, default=0, help="identity k uses seed + k")
    parser.add_argument("--device", default="cpu")
    return run_command(generate, parse_options(parser, arguments, identities=1, views=1, steps=1))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
