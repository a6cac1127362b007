"""Render a multi-view portrait data set: many people, each from several exact cameras, with condition
images.

    python -m training.render --out DIR [--ict ict_model.npz] --resolution 128 --train 900 --val 20 --test 100
    --views 10

Every portrait view comes with a condition image: another, analytic person at the same camera. Identities of
the splits and the condition people come from disjoint seed ranges; validation and test use condition people
never seen in training.
An interrupted run continues where it stopped: people whose `subject.json` and files are there and whole are skipped.
Layout: DIR/manifest.jsonl (a header line, then one line per subject), DIR/SPLIT/SUBJECT/NN.png,
NN_condition.png and, for the test split, NN_depth.npz with `depth` float16 [H, W] (camera z, 0 = background)
and `mask` bool [H, W].

`--shard PEOPLE` is for many training people: so many of them are one file, they stand before a fixed set of cameras
(`--cameras`), and their conditions are rendered once, into a bank (`--conditions`). The manifest then always describes
what is finished, so that training can begin before the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffportrait3d.cameras.labels import orbit_camera
from diffportrait3d.command import run_main
from diffportrait3d.files import json_object, write_atomically, write_text
from diffportrait3d.images import save_image
from diffportrait3d.synthetic_heads import IctHeads, View, portrait_scene, render_views
from diffportrait3d.weights.safetensors_writer import write_tensors

from .dataset.images import FIRST_CONDITION, FIRST_SEED, FORMAT, SHARDED, SPLITS, VERSION, DataError, read_manifest
from .dataset.records import is_finished
from .dataset.shards import read_records, write_shard
from .engine.workers import run_each

SEED_STRIDE = 10_000_000  # one data-set seed's worth of person seeds
LARGEST_SPLIT = 1_000_000
EASY_YAW, EASY_PITCH = 15.0, 8.0  # the first view of every person, a natural reference
Job = tuple[str, int]  # (split, number of the person), ("shard", first person) or ("conditions", number of the person)


def render_dataset(
    out: Path, settings: dict, counts: dict[str, int], ict: Path | None, workers: int = 2, device: str = "cpu"
) -> Path:
    """Render what is missing below `out` and write the manifest; returns its path. `settings`: see
    `dataset_settings`."""
    _check_folder(out, settings)
    write_text(out / "settings.json", json.dumps(settings, indent=1))
    jobs, sharded = _jobs(settings, counts), settings["version"] == SHARDED
    unit = "file" if sharded else "person"
    done = {job for job in jobs if _is_there(out, settings, job)}
    if done:
        print(f"{len(done)} of {len(jobs)} {'files' if sharded else 'people'} are there already", file=sys.stderr)
    todo = [job for job in jobs if job not in done]
    for job in run_each(Renderer, (out, settings, counts, ict, device), todo, workers, unit=unit):
        done.add(job)
        if sharded:
            write_manifest(out, {**settings, "complete": False}, [job for job in jobs if job in done])
    return write_manifest(out, settings, jobs)


def _jobs(settings: dict, counts: dict[str, int]) -> list[Job]:
    """What is made, in order: of shards first what validation and the first stages need."""
    if settings["version"] != SHARDED:
        return [(split, index) for split in SPLITS for index in range(counts[split])]
    shards = [("shard", first) for first in range(0, counts["train"], settings["people_per_shard"])]
    conditions = [("conditions", index) for index in range(settings["condition_subjects"])]
    return [*(("val", index) for index in range(counts["val"])), *conditions, *shards,
            *(("test", index) for index in range(counts["test"]))]  # fmt: skip


def _is_there(out: Path, settings: dict, job: Job) -> bool:
    path = _path(out, settings, job)
    return read_records(path) is not None if path.suffix == ".safetensors" else is_finished(out, path)


def dataset_settings(
    resolution: int,
    views: int,
    yaw: float,
    pitch: float,
    ict_fraction: float,
    condition_subjects: int,
    seed: int,
    shards: dict[str, int] | None = None,
) -> dict:
    """Everything that decides what an image looks like; two runs into one folder must agree on it.

    shards: people_per_shard, cameras and conditions of a data set in shards.
    """
    cameras = {"resolution": resolution, "views": views, "yaw": yaw, "pitch": pitch}
    people = {"ict_fraction": ict_fraction, "condition_subjects": condition_subjects, "seed": seed}
    return {"format": FORMAT, "version": SHARDED if shards else VERSION, **cameras, **people, **(shards or {})}


def person(settings: dict, split: str, index: int) -> dict:
    """Who subject `index` of a split is: id, provider, seed, camera labels [views, 25], condition seeds. No
    rendering."""
    seed = settings["seed"] * SEED_STRIDE + FIRST_SEED[split] + index
    generator = torch.Generator().manual_seed(seed + 7_000_000_000)
    ict = float(torch.rand(1, generator=generator)) < settings["ict_fraction"]
    wide = torch.rand(2, settings["views"], generator=generator) * 2 - 1
    limits = torch.tensor([[settings["yaw"]], [settings["pitch"]]]).expand(2, settings["views"]).clone()
    limits[:, 0] = torch.minimum(limits[:, 0], torch.tensor([EASY_YAW, EASY_PITCH]))
    yaw, pitch = wide * limits
    first = settings["seed"] * SEED_STRIDE + FIRST_CONDITION[split]
    chosen = torch.randint(settings["condition_subjects"], (settings["views"],), generator=generator)
    provider = "ict" if ict else "analytic"
    who = {"id": f"{provider}-{seed:07d}", "split": split, "provider": provider, "seed": seed}
    if settings["version"] == SHARDED and split == "train":
        return who | _banked_views(settings, generator)
    return who | {"labels": orbit_camera(yaw, pitch), "conditions": [first + int(k) for k in chosen]}


def camera_bank(settings: dict) -> Tensor:
    """Yaw and pitch in degrees of the fixed cameras, evenly over their range: [2, cameras].

    A sequence of low discrepancy: the fractions of multiples of two powers of the plastic number.
    """
    steps = torch.tensor([[0.7548776662466927], [0.5698402909980532]], dtype=torch.float64)
    even = (0.5 + steps * torch.arange(1, settings["cameras"] + 1)) % 1  # [2, cameras]
    limits = torch.tensor([[settings["yaw"]], [settings["pitch"]]], dtype=torch.float64)
    return ((2 * even - 1) * limits).float()


def bank_person(settings: dict, row: Tensor) -> Tensor:
    """Which condition person a row of the bank shows; its camera is the row modulo their number."""
    cameras = settings["cameras"]
    return (row % cameras + row // cameras) % settings["condition_subjects"]


def _banked_views(settings: dict, generator: torch.Generator) -> dict:
    """A training person's views by the bank: different cameras, the first one easy, a condition of each."""
    bank, cameras = camera_bank(settings), settings["cameras"]
    order = torch.randperm(cameras, generator=generator)
    yaw, pitch = bank[:, order].abs()
    easy = order[(yaw / EASY_YAW).maximum(pitch / EASY_PITCH).clamp(min=1).argmin()]
    chosen = torch.cat([easy[None], order[order != easy]])[: settings["views"]]
    shown = torch.randint(settings["conditions"] // cameras, (len(chosen),), generator=generator)
    rows = chosen + cameras * shown
    first = settings["seed"] * SEED_STRIDE + FIRST_CONDITION["train"]
    conditions = [first + int(k) for k in bank_person(settings, rows)]
    return {"labels": orbit_camera(*bank[:, chosen]), "conditions": conditions, "rows": rows.tolist()}


def write_manifest(out: Path, settings: dict, jobs: list[Job]) -> Path:
    """Collect the subjects' records, in order, below the header line, which is `settings`."""
    records = []
    for job in jobs:
        path = _path(out, settings, job)
        in_shards = path.suffix == ".safetensors"
        records += map(json.dumps, read_records(path) or []) if in_shards else [path.read_text("utf-8")]
    path = out / "manifest.jsonl"
    write_text(path, "\n".join([json.dumps(settings), *records, ""]))
    return path


def _check_folder(out: Path, settings: dict) -> None:
    path = out / "settings.json"
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(
                f"{out}: exists and is not a data set of this program; choose an empty or new folder for --out"
            )
        return
    there = json_object(path.read_bytes())
    if there is None:
        print(f"'{path}' is damaged; the manifest's settings are taken, else those asked for.", file=sys.stderr)
        try:
            there = read_manifest(out)[0]
        except DataError:
            there = settings
    pairs = ((key, there.get(key), value) for key, value in settings.items())
    if different := [f"{key} {old!r} there, {new!r} asked" for key, old, new in pairs if old != new]:
        raise ValueError(
            f"{out}: holds a data set with other settings ({'; '.join(different)}); use them, or another --out"
        )


def _path(out: Path, settings: dict, job: Job) -> Path:
    """What is there when a job is done: a person's record, or its one file."""
    kind, index = job
    if kind == "conditions":
        return out / "conditions" / f"{index:04d}.safetensors"
    if kind == "shard":
        return out / "train" / f"{index:07d}.safetensors"
    return out / kind / person(settings, kind, index)["id"] / "subject.json"


class Renderer:
    """Makes one job after the other, in this process or in one of several."""

    def __init__(self, out: Path, settings: dict, counts: dict[str, int], ict: Path | None, device: str):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        self.out, self.settings, self.counts = out, settings, counts
        self.ict = None if ict is None else IctHeads(ict)
        self.scene = functools.partial(portrait_scene, device=device)
        self.condition = functools.lru_cache(maxsize=settings["condition_subjects"])(self.scene)

    def __call__(self, job: Job) -> Job:
        (kind, index), path = job, _path(self.out, self.settings, job)
        if kind == "shard":
            self.make_shard(path, index)
        elif kind == "conditions":
            self.make_conditions(path, index)
        else:
            self.make_person(path, kind, index)
        return job

    def portrait(self, who: dict) -> View:
        scene = self.scene(who["seed"], self.ict if who["provider"] == "ict" else "analytic")
        return render_views(scene, who["labels"], self.settings["resolution"])

    def make_shard(self, path: Path, first: int) -> None:
        """Training people from number `first` on."""
        images, records = [], []
        for index in range(first, min(first + self.settings["people_per_shard"], self.counts["train"])):
            who = person(self.settings, "train", index)
            images.append(_bytes(self.portrait(who).image))
            views = [{"condition_row": row, **shown} for row, shown in zip(who["rows"], _shown(who), strict=True)]
            records.append({**_record(who), "shard": str(path.relative_to(self.out)), "views": views})
        write_shard(path, torch.cat(images), records)

    def make_conditions(self, path: Path, index: int) -> None:
        """One condition person of the bank at all of its cameras."""
        settings = self.settings
        rows = torch.arange(settings["conditions"])
        rows = rows[bank_person(settings, rows) == index]
        labels = orbit_camera(*camera_bank(settings)[:, rows % settings["cameras"]])
        seed = settings["seed"] * SEED_STRIDE + FIRST_CONDITION["train"] + index
        images = _bytes(render_views(self.scene(seed), labels, settings["resolution"]).image)
        write_tensors(path, {"images": images, "rows": rows}, {"records": "[]"})

    def make_person(self, record: Path, split: str, index: int) -> None:
        who = person(self.settings, split, index)
        portrait, views = self.portrait(who), []
        for k, (condition, shown) in enumerate(zip(who["conditions"], _shown(who), strict=True)):
            scene, label = self.condition(condition), who["labels"][k]
            image = render_views(scene, label[None], self.settings["resolution"]).image[0]
            names = {"image": f"{k:02d}.png", "condition": f"{k:02d}_condition.png"}
            save_image(record.parent / names["image"], portrait.image[k], durable=False)
            save_image(record.parent / names["condition"], image, durable=False)
            if split == "test":
                names["depth"] = f"{k:02d}_depth.npz"
                depth, mask = portrait.depth[k].cpu().numpy().astype(np.float16), portrait.mask[k].cpu().numpy()
                save = functools.partial(np.savez_compressed, depth=depth, mask=mask)
                write_atomically(record.parent / names["depth"], save, durable=False)
            views.append({key: f"{split}/{who['id']}/{name}" for key, name in names.items()} | shown)
        write_text(record, json.dumps({**_record(who), "views": views}), durable=False)


def _record(who: dict) -> dict:
    return {key: who[key] for key in ("id", "split", "provider", "seed")}


def _shown(who: dict) -> list[dict]:
    """Of every view: who is in its condition, and its camera."""
    return [
        {"condition_subject": f"analytic-{condition:07d}", "label": label.tolist()}
        for condition, label in zip(who["conditions"], who["labels"], strict=True)
    ]


def _bytes(images: Tensor) -> Tensor:
    """uint8 of images in [0, 1]."""
    return (images.clamp(0, 1) * 255).round().byte().cpu()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.render", description="Render a multi-view portrait data set."
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the data set; a run that was interrupted continues")
    add("--ict", type=Path, help="quantised ICT face model (.npz); without it every person is analytic")
    add("--ict-fraction", type=float, default=0.67, help="share of people from the ICT model (default 0.67)")
    add("--resolution", type=int, default=128, help="side of the images in pixels, a multiple of 8")
    for split, count in (("train", 900), ("val", 20), ("test", 100)):
        add(f"--{split}", type=int, default=count, help=f"number of people in the {split} split")
    add("--views", type=int, default=10, help="views per person; the first one is nearly frontal")
    add("--yaw", type=float, default=60.0, help="largest yaw in degrees, to both sides")
    add("--pitch", type=float, default=20.0, help="largest pitch in degrees, up and down")
    add("--condition-subjects", type=int, default=64, help="number of people in the condition images, per library")
    add("--shard", type=int, default=0, metavar="PEOPLE", help="training people per file (default: PNG)")
    add("--cameras", type=int, default=512, help="with --shard: number of fixed cameras")
    add("--conditions", type=int, default=2048, help="with --shard: images in the bank, a multiple of --cameras")
    add("--workers", type=int, default=2, help="processes (default 2)")
    add("--device", default="cpu", help="where the light is baked and the views are drawn: cpu (default) or cuda")
    add("--seed", type=int, default=0, help="another seed gives other people and other cameras")
    return parser


def _problem(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the arguments, or None."""
    counts = (args.train, args.val, args.test)
    banked = args.conditions >= args.cameras >= max(1, args.views) and args.conditions % args.cameras == 0
    no_device = args.device.startswith("cuda") and not torch.cuda.is_available()
    checks = {
        f"--resolution {args.resolution} must be a positive multiple of 8": args.resolution < 8 or args.resolution % 8,
        "--train, --val and --test must not be negative": min(counts) < 0,
        f"a split holds at most {LARGEST_SPLIT} people": max(counts) > LARGEST_SPLIT,
        "nothing to render: --train, --val and --test are all 0": sum(counts) == 0,
        f"--views {args.views} must be at least 1": args.views < 1,
        f"--yaw {args.yaw} must lie in 0..180 degrees": not 0 <= args.yaw <= 180,
        f"--pitch {args.pitch} must lie in 0..90 degrees": not 0 <= args.pitch < 90,
        f"--ict-fraction {args.ict_fraction} must lie in 0..1": not 0 <= args.ict_fraction <= 1,
        "--condition-subjects must be at least 1": args.condition_subjects < 1,
        "--seed must not be negative": args.seed < 0,
        "--shard must not be negative": args.shard < 0,
        f"--cameras {args.cameras} must be at least --views {args.views}, and --conditions {args.conditions} a "
        "multiple of it": args.shard > 0 and not banked,
        f"--device {args.device}: torch sees no CUDA device here": no_device,
        f"--ict {args.ict}: no such file": args.ict is not None and not args.ict.is_file(),
    }
    return next((message for message, wrong in checks.items() if wrong), None)


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if problem := _problem(args):
        parser.error(problem)
    shards = {"people_per_shard": args.shard, "cameras": args.cameras, "conditions": args.conditions}
    look = args.resolution, args.views, args.yaw, args.pitch, args.ict_fraction if args.ict else 0.0
    settings = dataset_settings(*look, args.condition_subjects, args.seed, shards if args.shard else None)
    counts = {split: getattr(args, split) for split in SPLITS}
    try:
        print(render_dataset(args.out, settings, counts, args.ict, args.workers, args.device))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
