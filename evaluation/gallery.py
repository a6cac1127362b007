"""Three held-out people turning, an animation and a grid: chosen by seed and attributes before they are looked at.

    python -m evaluation.gallery [--weights weights/miniature] [--ict FILE] [--seed 0] [--views 16] [--out runs/gallery]

Every wish (`WISHES`) takes the first test person from the seed on whose drawn attributes fit it; nothing is rendered to
choose. Nobody wears glasses: the heads have none. Written: gallery.webp (the people side by side, there and back),
gallery.png (a row per person: portrait, then views) and gallery.json (who, and why). Docs show what this command made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffportrait3d.cameras.labels import orbit_camera, trajectory
from diffportrait3d.command import run_main
from diffportrait3d.files import file_hash, write_atomically, write_text
from diffportrait3d.images import as_pixels
from diffportrait3d.pipeline import Pipeline
from diffportrait3d.synthetic_heads import IctHeads, portrait_scene, render_views
from diffportrait3d.synthetic_heads.materials import Look
from training.dataset.images import FIRST_SEED

from .studies.command import WEIGHTS, add_device, add_sampling, parse_options, run_command, sampling_of
from .tables.report import image_rows, save_png

FIRST_INDEX, STRIDE = 100_000, 1_000  # of test people: far behind those that evaluations measure; per seed
FRAME_MILLISECONDS = 120
LIGHT, DARK = 0.65, 0.36  # mean of the skin's sRGB: the lightest and the darkest third or so
WISHES: dict[str, Callable[[Look], bool]] = {
    "light skin, long hair": lambda look: look.skin.mean() > LIGHT and look.hair_style == "long",
    "dark skin": lambda look: look.skin.mean() < DARK and look.hair_style != "bald" and look.beard == "none",
    "beard": lambda look: look.beard == "full" and DARK < look.skin.mean() < LIGHT,
}


class Chosen(NamedTuple):
    """A person: the wish that it fits, its seed, and what fits."""

    wish: str
    seed: int
    skin: float
    hair_style: str
    beard: str


def choose(seed: int) -> list[Chosen]:
    """A person per wish, without rendering anybody."""
    first, people = FIRST_SEED["test"] + FIRST_INDEX + seed * STRIDE, []
    for wish, fits in WISHES.items():
        looks = ((who, Look(torch.Generator().manual_seed(who))) for who in itertools.count(first))
        person, look = next((who, look) for who, look in looks if fits(look))
        people.append(Chosen(wish, person, round(float(look.skin.mean()), 3), look.hair_style, look.beard))
    return people


def turn(pipeline: Pipeline, person: Chosen, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """A person's portrait [1, 3, S, S] and generated views [V, 3, S, S]."""
    scene = portrait_scene(person.seed, IctHeads(options.ict) if options.ict else "analytic")
    front = orbit_camera(0.0, 0.0)
    portrait = render_views(scene, front[None], pipeline.resolution).image
    cameras = trajectory("arc", options.views, (-options.yaw, options.yaw), (0.0, 0.0))
    views = pipeline(portrait, cameras, portrait_camera=front, seed=options.seed, sampling=sampling_of(options))
    return portrait, views


def run(options: argparse.Namespace) -> None:
    started, out = time.perf_counter(), options.out
    pipeline = Pipeline.from_folder(options.weights, options.device)
    people = choose(options.seed)
    made = [turn(pipeline, person, options) for person in people]
    wide = torch.cat([views for _, views in made], dim=3)  # side by side, [V, 3, S, P * S]
    frames = [Image.fromarray(frame) for frame in as_pixels(wide)]
    first, *rest = frames + frames[-2:0:-1]  # there and back
    settings = {"save_all": True, "append_images": rest, "duration": FRAME_MILLISECONDS, "loop": 0}
    write_atomically(out / "gallery.webp", lambda file: first.save(file, format="WEBP", quality=85, **settings))
    rows = [(person.wish, torch.cat(images)) for person, images in zip(people, made, strict=True)]
    save_png(image_rows(rows), out / "gallery.png")
    facts = {
        "people": [person._asdict() for person in people],
        "heads": "ict" if options.ict else "analytic",
        "sampling": asdict(sampling_of(options)),
        "weights_sha256": {path.name: file_hash(path) for path in sorted(options.weights.glob("*.safetensors"))},
    }
    write_text(out / "gallery.json", json.dumps(facts, indent=1) + "\n")
    for person in people:
        print(f"{person.wish}: test person {person.seed}, {person.hair_style} hair, beard {person.beard}")
    print(f"{time.perf_counter() - started:.0f} s. Wrote {out}/gallery.webp, gallery.png and gallery.json")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.gallery", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the six networks")
    parser.add_argument("--ict", type=Path, help="ICT Face Model Light: people of that kind instead of analytic ones")
    parser.add_argument("--seed", type=int, default=0, help="where the search begins, and of the noise")
    parser.add_argument("--views", type=int, default=16, help="of every person (default %(default)s)")
    parser.add_argument("--yaw", type=float, default=45.0, help="degrees to both sides (default %(default)s)")
    add_sampling(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/gallery"), help="folder (default %(default)s)")
    add_device(parser)
    return run_command(run, parse_options(parser, arguments, seed=0, views=2, steps=1))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
