"""Turn multi-view portraits of other data sets into the manifest format that training reads.

    python -m training.import_data nersemble --source DIR --out DIR --landmarks DIR
    python -m training.import_data panohead  --source DIR --out DIR
    python -m training.import_data eg3d      --source DIR --out DIR --conditions EG3D_RENDERS
    python -m training.import_data heads     --source DIR --out DIR

Several sources may go into one --out: their people are added to the manifest. An interrupted import continues where it
stopped; every file appears only when it is complete. `docs/data.md` describes the layouts, `training.check_data` checks
the result.

Layout: OUT/manifest.jsonl, OUT/cameras.json, OUT/sources/NAME.json (settings and plan), OUT/left_out/NAME.json (what
was left out and why), OUT/SPLIT/SUBJECT/NN.png, NN_condition.png, subject.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffportrait3d.command import run_main
from diffportrait3d.files import write_atomically, write_text
from diffportrait3d.images import save_image

from .dataset.images import FORMAT, VERSION, DataError
from .dataset.records import is_finished
from .engine.workers import run_each
from .sources import eg3d, multiview, nersemble
from .sources.alignment import OUTSIDE
from .sources.conditions import GivenConditions, RenderedConditions, camera_list
from .sources.groups import (
    SPLITS,
    DataSource,
    SkippedGroup,
    Splits,
    ViewGroup,
    counts,
    note_lines,
    read_json,
    reason_of,
)

REPORTED = 20  # of what was left out, how much is printed; left_out/NAME.json has the rest


def import_source(
    source: DataSource, out: Path, resolution: int, conditions: RenderedConditions | GivenConditions, workers: int = 1
) -> Path:
    """Import what is missing below `out` and write the manifest; returns its path.

    A group that cannot be imported, whatever the reason, is left out and named in `left_out_path`; the others are
    imported.

    Raises:
        DataError: nothing is left.
    """
    groups, left_out = planned_groups(source, out, resolution)
    todo = [group for group in groups if not is_finished(out, record_path(out, group))]
    if len(todo) < len(groups):
        print(f"{len(groups) - len(todo)} of {len(groups)} groups are there already", file=sys.stderr)
    skipped = _each(_import_group, todo, (source, out, resolution), workers, "portraits")
    done = [group for group in groups if group.id not in skipped]
    if done:
        write_cameras(out)
    todo = [group for group in done if _record(out, group).get("conditions") != conditions.kind]
    skipped |= _each(_add_conditions, todo, (conditions, out, resolution), workers, "conditions")
    write_text(left_out_path(out, source.name), json.dumps({**skipped, **left_out}, indent=1) + "\n")
    _report(skipped, len(groups), left_out_path(out, source.name))
    if len(skipped) == len(groups):
        raise DataError(f"Nothing could be imported: {_first(skipped)}.")
    _report_notes([_record(out, group) for group in groups if group.id not in skipped])
    return write_manifest(out, resolution)


def extract_images(source: nersemble.NeRSemble, out: Path, resolution: int, folder: Path) -> int:
    """Write the planned images as files for a detector of five points; returns how many there are.

    Raises:
        DataError: not one of them can be read.
    """
    count, skipped = 0, {}
    groups, _ = planned_groups(source, out, resolution)
    for group in tqdm(groups, unit="group", desc="extract"):
        try:
            images = dict(source.extracted(group))
        except Exception as error:  # see _import_group
            skipped[group.id] = reason_of(error)
            continue
        for name, image in images.items():
            path = folder / f"{name}.png"
            if not path.is_file():
                save_image(path, image, durable=False)
            count += 1
    _report(skipped, len(groups))
    if not count:
        raise DataError(f"Nothing could be extracted: {_first(skipped)}.")
    return count


def planned_groups(source: DataSource, out: Path, resolution: int) -> tuple[list[ViewGroup], dict[str, str]]:
    """The plan kept in `out`, or a new one, and what it leaves out and why. It is made once: files that arrive later do
    not change it.

    Raises:
        DataError: there is nothing to plan, or the plan in `out` is another one or damaged.
    """
    settings = {"source": source.name, "resolution": resolution, **source.settings()}
    path = out / "sources" / f"{source.name}.json"
    kept = _kept_plan(path) if path.is_file() else None
    if kept is not None:
        before, *planned = kept
        different = [key for key in settings if before.get(key) != json.loads(json.dumps(settings[key]))]
        if different:
            raise DataError(
                f"'{out}' holds an import of {source.name} with other settings ({', '.join(different)}); use those, or "
                "another --out."
            )
        groups, left_out = planned
    else:
        if not path.is_file():
            _check_folder(out, resolution)
        groups = source.groups()
        left_out = dict(source.left_out)
    for what, reason in list(left_out.items())[:REPORTED]:
        print(f"left out of the plan: {what}: {reason}", file=sys.stderr)
    if not groups:
        raise DataError(f"Nothing could be imported: {_first(left_out) if left_out else 'the plan is empty'}.")
    if kept is None:
        content = {"settings": settings, "left_out": left_out, "groups": [asdict(group) for group in groups]}
        write_text(path, json.dumps(content, indent=1))
        print(f"planned {len(groups)} groups of {source.name}: {counts(groups)}", file=sys.stderr)
    return groups, left_out


def _kept_plan(path: Path) -> tuple[dict[str, Any], list[ViewGroup], dict[str, str]] | None:
    """Settings and groups of an earlier import, and what it left out; None, after a message, if its plan is
    damaged."""
    try:
        kept = read_json(path, "the plan of this source")
        return dict(kept["settings"]), [ViewGroup(**group) for group in kept["groups"]], dict(kept.get("left_out", {}))
    except (DataError, LookupError, TypeError, ValueError, AttributeError):
        print(f"'{path}' is damaged; this source is planned again.", file=sys.stderr)
        return None


def write_cameras(out: Path) -> None:
    """`cameras.json`: every imported portrait's camera, for renders of conditions."""
    rows = camera_list(_imported(out))
    write_atomically(out / "cameras.json", lambda file: file.write(rows))


def write_manifest(out: Path, resolution: int) -> Path:
    """The manifest of all imported subjects that have conditions, of every source in `out`."""
    names = [plan.stem for plan in _plans(out)]
    header = {"format": FORMAT, "version": VERSION, "resolution": resolution, "sources": names}
    lines = [header, *(record for record in _imported(out) if "conditions" in record)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = out / "manifest.jsonl"
    write_text(path, text)
    return path


def left_out_path(out: Path, name: str) -> Path:
    """{group or what else was left out of a source: reason}; `training.check_data` repeats it."""
    return out / "left_out" / f"{name}.json"


def record_path(out: Path, group: ViewGroup) -> Path:
    return out / group.split / group.id / "subject.json"


def _plans(out: Path) -> list[Path]:
    return sorted((out / "sources").glob("*.json"))


def _imported(out: Path) -> list[dict[str, Any]]:
    groups = [ViewGroup(**group) for plan in _plans(out) for group in read_json(plan, "a plan")["groups"]]
    return [_record(out, group) for group in groups if record_path(out, group).is_file()]


def _record(out: Path, group: ViewGroup) -> dict[str, Any]:
    return read_json(record_path(out, group), "an imported subject")


def _write_record(out: Path, group: ViewGroup, record: dict[str, Any]) -> None:
    write_text(record_path(out, group), json.dumps(record), durable=False)


def _check_folder(out: Path, resolution: int) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    plans = _plans(out)
    if not plans:
        raise DataError(f"'{out}' is not empty and not an import of this program; choose a new folder for --out.")
    for plan in plans:
        there = read_json(plan, "a plan")["settings"]["resolution"]
        if there != resolution:
            raise DataError(f"'{out}' has images of {there} px from '{plan.stem}', not {resolution}.")


def _import_group(source: DataSource, out: Path, resolution: int, group: ViewGroup) -> tuple[str, str | None]:
    """Write a group's portraits and its record; returns its id and why it was skipped, if it was."""
    try:
        views = source.views(group, resolution)
    except Exception as error:  # readers meet every kind of damage: numpy's, PyAV's, of linear algebra
        return group.id, reason_of(error)
    entries = []
    for number, view in enumerate(views):
        name = f"{group.split}/{group.id}/{number:02d}.png"
        save_image(out / name, view.image, durable=False)
        entries.append({"image": name, "label": view.label.tolist(), "camera": view.name})
    record = {"id": group.id, "split": group.split, "person": group.person, "provider": source.name, "views": entries}
    if notes := {view.name: view.notes for view in views if view.notes}:
        record["notes"] = notes
    _write_record(out, group, record)
    return group.id, None


def _add_conditions(
    conditions: RenderedConditions | GivenConditions, out: Path, resolution: int, group: ViewGroup
) -> tuple[str, str | None]:
    """Write a group's conditions; returns its id and why it was skipped, if it was: then it has none any more."""
    record = _record(out, group)
    kind = record.pop("conditions", None)
    try:
        images = [conditions.image(record, number, resolution) for number in range(len(record["views"]))]
    except Exception as error:  # see _import_group
        if kind is not None:
            _write_record(out, group, record)
        return group.id, reason_of(error)
    for view, (pixels, person) in zip(record["views"], images, strict=True):
        view["condition"] = view["image"].replace(".png", "_condition.png")
        view["condition_subject"] = person
        save_image(out / view["condition"], pixels, durable=False)
    _write_record(out, group, {**record, "conditions": conditions.kind})
    return group.id, None


_job: dict[str, Any] = {}


def _start_worker(work: Callable, shared: tuple) -> None:
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    _job.update(work=work, shared=shared)


def _work(group: ViewGroup) -> Any:
    return _job["work"](*_job["shared"], group)


def _each(work: Callable, groups: list[ViewGroup], shared: tuple, workers: int, what: str) -> dict[str, str]:
    """work(*shared, group) of every group; which were skipped and why."""
    results = run_each(_work, groups, _start_worker, (work, shared), workers, unit="group", desc=what)
    return {group: reason for group, reason in results if reason is not None}


def _report(skipped: dict[str, str], count: int, file: Path | None = None) -> None:
    for group, reason in list(skipped.items())[:REPORTED]:
        print(f"skipped {group}: {reason}", file=sys.stderr)
    if skipped:
        where = f" (all of them in '{file}')" if file is not None and len(skipped) > REPORTED else ""
        print(f"{len(skipped)} of {count} groups skipped{where}; a later run tries them again", file=sys.stderr)


def _report_notes(records: list[dict[str, Any]]) -> None:
    """What the reader had to decide about the source's images, each decision once."""
    places: dict[str, list[str]] = {}
    for record in records:
        for name, notes in record.get("notes", {}).items():
            for note in notes:
                places.setdefault(note, []).append(f"{record['id']}, {name}")
    for line in note_lines(places):
        print(line, file=sys.stderr)


def _first(left_out: dict[str, str]) -> str:
    return ": ".join(next(iter(left_out.items())))


def _nersemble(args: argparse.Namespace) -> nersemble.NeRSemble:
    options = nersemble.Options(
        groups={split: getattr(args, f"{split}_groups") for split in SPLITS},
        views=args.views,
        sequences=tuple(args.sequences),
        colour=args.colour_correction,
        tolerance=args.tolerance,
        least_inside=args.least_inside,
        outside=args.outside,
        seed=args.seed,
    )
    return nersemble.NeRSemble(args.source, _splits(args), options, args.landmarks)


def _export(args: argparse.Namespace) -> eg3d.Export:
    options = eg3d.Options(identity=args.identity, views=args.views, tolerance=args.tolerance, outside=args.outside)
    return eg3d.Export(args.command, args.source, _splits(args), options, args.landmarks)


def _splits(args: argparse.Namespace) -> Splits:
    return Splits(args.val_share, args.test_share, args.split_file)


def _common(parser: argparse.ArgumentParser) -> None:
    """What every source asks."""
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of the data set as it was downloaded or exported")
    add("--out", type=Path, required=True, help="folder of the result; an interrupted import continues")
    add("--resolution", type=int, default=512, help="side of the images in pixels, a multiple of 8 (default 512)")
    add(
        "--conditions",
        default="render",
        help="'render' draws them with our renderer (default); a folder holds renders of the cameras in cameras.json",
    )
    add("--condition-people", type=int, default=64, help="people in rendered conditions, per library (default 64)")
    add("--workers", type=int, default=1, help="processes (default 1)")


def _photographs(parser: argparse.ArgumentParser) -> None:
    """What images need that come without splits and perhaps without alignment."""
    add = parser.add_argument
    add("--landmarks", type=Path, help="folder of five facial points from any detector, see docs/data.md")
    add("--tolerance", type=float, default=0.02, help="disagreement of five points between cameras, in image sizes")
    add("--outside", choices=OUTSIDE, default=OUTSIDE[0], help="what a crop shows where its image has ended")
    add("--split-file", type=Path, help='JSON {"train": [people], "val": [...], "test": [...]} instead of the shares')
    add("--test-share", type=float, default=0.2, help="share of people in split test, by their names' hash")
    add("--val-share", type=float, default=0.02, help="share of people in split val")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.import_data", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("nersemble", help="NeRSemble v1 or v2")
    _common(command)
    _photographs(command)
    for split, count in (("train", 2000), ("val", 50), ("test", 500)):
        command.add_argument(f"--{split}-groups", type=int, default=count, help=f"time steps in {split} ({count})")
    command.add_argument("--views", type=int, default=9, help="cameras a time step: 1 reference and 8 targets (9)")
    command.add_argument("--sequences", nargs="+", default=["*"], help="patterns of sequence names (all)")
    command.add_argument("--no-colour-correction", dest="colour_correction", action="store_false")
    command.add_argument("--least-inside", type=float, default=0.6, help="share of a crop that its image must cover")
    command.add_argument("--seed", type=int, default=0, help="another seed chooses other time steps and cameras")
    command.add_argument("--extract", type=Path, help="only write the chosen images here, for a detector")
    command.set_defaults(make=_nersemble)
    for name in ("panohead", "eg3d"):
        command = commands.add_parser(name, help=f"a folder of {name} images with dataset.json")
        _common(command)
        _photographs(command)
        command.add_argument("--views", type=int, default=0, help="largest number of views a person (0: all)")
        command.add_argument("--identity", default=eg3d.IDENTITY, help="regular expression: whom a file name shows")
        command.set_defaults(make=_export, extract=None)
    command = commands.add_parser("heads", help="a data set of this format, such as training.render writes")
    _common(command)
    command.set_defaults(make=lambda args: multiview.MultiView(args.source), extract=None, landmarks=None)
    return parser


def _problem(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the arguments, or None."""
    if args.resolution < 8 or args.resolution % 8:
        return f"--resolution {args.resolution} must be a positive multiple of 8"
    if not args.source.is_dir():
        return f"--source {args.source}: no such folder"
    if args.landmarks is not None and not args.landmarks.is_dir():
        return f"--landmarks {args.landmarks}: no such folder"
    if args.command == "nersemble" and args.landmarks is None and args.extract is None:
        return (
            "NeRSemble needs five facial points: '--extract DIR' writes the chosen images, any detector adds a .txt "
            "of five lines 'x y' beside each, then '--landmarks DIR' imports them (docs/data.md)"
        )
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if problem := _problem(args):
        parser.error(problem)
    try:
        source = args.make(args)
        if args.extract is not None:
            count = extract_images(source, args.out, args.resolution, args.extract)
            print(f"{count} images below {args.extract}")
            return 0
        rendered = args.conditions == "render"
        conditions = RenderedConditions(args.condition_people) if rendered else GivenConditions(Path(args.conditions))
        print(import_source(source, args.out, args.resolution, conditions, args.workers))
    except (DataError, SkippedGroup) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues below {args.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
