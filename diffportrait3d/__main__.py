"""Makes a turntable of a portrait, without any ComfyUI.

    python -m diffportrait3d portrait.png --out views

Writes view_00.png, view_01.png, ... from the left to the right of the person.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .cameras.labels import trajectory
from .command import INTERRUPTED, run_main
from .files import files_with, write_folder
from .images import SUFFIXES, read_image, save_image
from .pipeline import PRESETS, SOLVERS, Pipeline, Sampling

WEIGHTS = Path(__file__).resolve().parents[1] / "weights/miniature"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m diffportrait3d", description="Makes a turntable of a portrait, without any ComfyUI."
    )
    add = parser.add_argument
    add("portrait", type=Path, help="an image of a head; its central square is taken")
    add("--out", type=Path, required=True, help="folder for the views; it must be new or empty")
    add("--weights", type=Path, default=WEIGHTS, help="folder of the six networks (default: %(default)s)")
    add("--views", type=int, default=16, help="number of cameras (default %(default)s)")
    add("--yaw", type=float, nargs=2, default=(-45.0, 45.0), metavar=("FIRST", "LAST"), help="degrees (default -45 45)")
    add("--pitch", type=float, default=0.0, help="degrees; positive looks from above (default 0)")
    add("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    add("--preset", choices=PRESETS, default="fast", help="steps, solver and guided part of the steps (default fast)")
    add("--steps", type=int, help="of the solver (default: the preset's)")
    add("--solver", choices=SOLVERS, help="default: the preset's")
    add("--guidance", type=float, default=Sampling.guidance, help="default %(default)s; 1 is none")
    add("--camera-images", type=Path, help="folder of somebody else's images, one per camera in order")
    add("--device", default="cpu", help="e.g. cuda (default %(default)s)")
    return parser.parse_args(arguments)


def read(path: Path) -> Tensor:
    """An image file as [3, H, W] in [0, 1]; prints what was decided about it."""
    image = read_image(path)
    for note in image.notes:
        print(f"{path.name}: {note}")
    return image.as_tensor()


def chosen_sampling(options: argparse.Namespace) -> Sampling:
    """The preset with what is said otherwise."""
    given = {name: getattr(options, name) for name in ("steps", "solver", "guidance")}
    return replace(PRESETS[options.preset], **{name: value for name, value in given.items() if value is not None})


def generate(options: argparse.Namespace) -> None:
    """Makes and writes the views."""
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"{options.out} exists and is not an empty folder; choose another --out.")
    sampling = chosen_sampling(options)
    cameras = trajectory("arc", options.views, options.yaw, (options.pitch, options.pitch))
    portrait = read(options.portrait)[None]
    pipeline = Pipeline.from_folder(options.weights, options.device)
    camera_images = None
    if options.camera_images:
        files = files_with(options.camera_images, SUFFIXES)
        if len(files) != options.views:
            raise ValueError(f"{options.camera_images} has {len(files)} images for {options.views} cameras (--views).")
        camera_images = torch.cat([pipeline.fit(read(file)[None]) for file in files])
    with tqdm(total=sampling.steps, desc="denoising", unit="step") as bar:
        views = pipeline(
            portrait,
            cameras,
            camera_images=camera_images,
            seed=options.seed,
            sampling=sampling,
            progress=lambda *_: bar.update(),
        )
    names = [f"view_{number:02d}.png" for number in range(len(views))]

    def fill(folder: Path) -> None:
        for name, view in zip(names, views, strict=True):
            save_image(folder / name, view)

    if options.out.exists():
        options.out.rmdir()
    write_folder(options.out, fill)
    print(f"{options.out}: {names[0]} to {names[-1]}, {pipeline.resolution} px")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        generate(options)
    except (ValueError, NotADirectoryError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
