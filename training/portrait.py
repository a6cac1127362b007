"""Renders one portrait from the front: `python -m training.portrait --seed 2000036 --ict FILE --out face.png`.

Seeds from 2,000,000 on belong to the test split of `training.render`: no network has seen these people.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffportrait3d.cameras.labels import orbit_camera
from diffportrait3d.command import run_main
from diffportrait3d.images import save_image
from diffportrait3d.synthetic_heads import IctHeads, portrait_scene, render

from .engine.command import exit_status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.portrait", description=__doc__)
    parser.add_argument("--seed", type=int, required=True, help="who")
    parser.add_argument("--ict", type=Path, help="ICT face model (.npz); without it the person is analytic")
    parser.add_argument("--resolution", type=int, default=256, help="side in pixels")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args(argv)

    def work() -> None:
        provider = "analytic" if arguments.ict is None else IctHeads(arguments.ict)
        view = render(portrait_scene(arguments.seed, provider), orbit_camera(0.0, 0.0), arguments.resolution)
        save_image(arguments.out, view.image)

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
