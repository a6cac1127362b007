"""How well landmarks of a face tell the portrait's camera, on rendered people whose cameras are known.

    python -m evaluation.landmark_cameras --data DIR [DIR ...] --ict FILE [--identities N] [--views V]

What Align Portrait does, with the framing of rendered heads, so that the right crop is the image itself: its label
against the true one, its corners against the image's. Landmarks are the heads' own (all 68, the five, those that
MediaPipe's mesh has), projected, and, where dlib is installed, those that it finds in the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffportrait3d.cameras.labels import camera_angles, orbit_camera, validate_labels
from diffportrait3d.cameras.projection import project
from diffportrait3d.command import run_main
from diffportrait3d.images import read_image
from diffportrait3d.portraits.alignment import EG3D, RENDERED, AlignmentError, framed_labels, photograph_crop
from diffportrait3d.portraits.detector import INSTALL, FaceDetector, model_folder
from diffportrait3d.portraits.face import FIVE_POINTS, five_of
from diffportrait3d.portraits.landmarks import ALL, MEDIAPIPE, Landmarks
from diffportrait3d.portraits.warping import corners
from diffportrait3d.synthetic_heads import IctHeads, portrait_landmarks

from .studies.command import run_command
from .subjects.dataset import held_out_lines
from .tables.report import markdown_table

NEAR = 30.0  # degrees of yaw
CONDITION_PEOPLE = 20
ROWS = ("68 landmarks", "five points", "points of MediaPipe's mesh", "dlib's five, found", "nothing: from the front")
HEADER = ["landmarks", "views", "found", "yaw", "90 %", "pitch", "90 %", "roll", "crop off"]


def measure(data: Path, line: dict, views: int, heads: IctHeads | None, detector: FaceDetector | None) -> list[dict]:
    """For the first views of a person, by row: errors of yaw, pitch and roll (degrees) and of the crop's corners (parts
    of its side), NaN where no face was found; and the true yaw."""
    if line["provider"] != "analytic" and heads is None:
        raise ValueError("these people were rendered with the ICT model; give its file by --ict")
    points, records = portrait_landmarks(line["seed"], "analytic" if line["provider"] == "analytic" else heads), []
    for view in line["views"][:views]:
        label = validate_labels(view["label"])[0]
        pixels = read_image(data / view["image"]).as_bytes()
        seen = project(points, label, len(pixels))[:, :2].double()
        faces = (Landmarks(seen, tuple(range(ALL))), Landmarks(five_of(seen), None),
                 Landmarks(seen[list(MEDIAPIPE)], tuple(MEDIAPIPE)))  # fmt: skip
        found = dict(zip(ROWS[:3], faces, strict=True))
        if detector is not None:
            found[ROWS[3]] = next(iter(detector.faces(pixels, pixels)), None)
        errors = {name: _errors(face, len(pixels), label) for name, face in found.items()}
        straight = camera_angles(label)
        errors[ROWS[4]] = np.array([*map(float, straight), np.nan])
        records.append({"yaw": float(straight.yaw), "errors": errors})
    return records


def _errors(face: Landmarks | None, side: int, label: Tensor) -> np.ndarray:
    """[4]: yaw, pitch, roll, corners; NaN without a face."""
    try:
        crop = None if face is None else photograph_crop(face, (side, side), RENDERED, upright=False)
    except AlignmentError:
        crop = None
    if crop is None:
        return np.full(4, np.nan)
    angles = [float(ours - true) for ours, true in zip(camera_angles(crop.label), camera_angles(label), strict=True)]
    off = (corners(crop.homography) - corners(torch.eye(3, dtype=torch.float64))).norm(dim=1).mean()
    return np.array([*angles, float(off)])


def table(records: list[dict]) -> str:
    """Means and 90th percentiles of absolute errors, for nearly frontal views and for all."""
    near = [record for record in records if abs(record["yaw"]) <= NEAR]
    rows = []
    for title, chosen in ((f"up to {NEAR:.0f} deg of yaw", near), ("all", records)):
        for name in ROWS:
            errors = np.abs([record["errors"][name] for record in chosen if name in record["errors"]])
            if len(errors):
                rows.append(_row(f"{name}, {title}", errors))
    return markdown_table(HEADER, rows)


def _row(name: str, errors: np.ndarray) -> list[str]:
    found = errors[~np.isnan(errors[:, 0])]
    if not len(found):
        return [name, str(len(errors)), "0%", *[""] * (len(HEADER) - 3)]
    mean, most = found.mean(0), np.quantile(found, 0.9, axis=0)
    numbers = [mean[0], most[0], mean[1], most[1], mean[2]]
    off = "" if np.isnan(mean[3]) else f"{mean[3]:.1%}"
    return [name, str(len(errors)), f"{len(found) / len(errors):.0%}", *(f"{value:.1f}" for value in numbers), off]


def condition_offsets() -> str:
    """How far the five points of Render Camera Conditions are from where EG3D's crops have them, by framing."""
    label = orbit_camera(0.0, 0.0)
    wanted = project(FIVE_POINTS.float(), label, 1)[:, :2]
    heads = [five_of(portrait_landmarks(seed)) for seed in range(CONDITION_PEOPLE)]
    found = []
    for framing in (RENDERED, EG3D):
        [seen] = framed_labels(label[None], framing)
        off = [(project(five, seen, 1)[:, :2] - wanted).norm(dim=1).mean() for five in heads]
        found.append(f"{framing} {float(torch.stack(off).mean()):.1%}")
    return (
        f"Camera conditions of {CONDITION_PEOPLE} people, five points off EG3D's crops: {', '.join(found)} of the side."
    )


def run(args: argparse.Namespace) -> None:
    heads = None if args.ict is None else IctHeads(args.ict)
    detector = None if model_folder() is None else FaceDetector()
    people = [(data, line) for data in args.data for line in held_out_lines(data, args.identities)]
    bar = tqdm(people, unit="person")
    records = [record for data, line in bar for record in measure(data, line, args.views, heads, detector)]
    print(f"{len(people)} people, {len(records)} views; degrees\n\n{table(records)}")
    print(f"\n{condition_offsets()}")
    if detector is None:
        print(f"\nFaces were not looked for in the images: {INSTALL}.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.landmark_cameras", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="rendered data sets; split test is taken")
    parser.add_argument("--ict", type=Path, help="the ICT model of the people that were rendered with it")
    parser.add_argument("--identities", type=int, help="people of each data set (default: all, at most 100)")
    parser.add_argument("--views", type=int, default=3, help="views of each person (default 3)")
    return run_command(run, parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
