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
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffportrait3d.command import run_main
from diffportrait3d.files import WriteError, write_text
from diffportrait3d.images import save_image

from .dataset.images import FORMAT, SPLITS, VERSION, DataError
from .dataset.records import is_finished, note_lines, notes_of
from .engine.workers import run_each
from .sources.conditions import GivenConditions, RenderedConditions
from .sources.eg3d import Export
from .sources.multiview import MultiView
from .sources.nersemble import NeRSemble
from .sources.reader import Reader, ViewGroup, read_json, reason_of

READERS: dict[str, type[Reader]] = {"nersemble": NeRSemble, "panohead": Export, "eg3d": Export, "heads": MultiView}
REPORTED = 20  # of what was left out, how much is printed; left_out/NAME.json has the rest


def import_source(
    source: Reader, out: Path, resolution: int, conditions: RenderedConditions | GivenConditions, workers: int = 1
) -> Path:
    """Import what is missing below `out` and write the manifest; returns its path.

    A group that cannot be imported, whatever the reason, is left out and named in `left_out/NAME.json`; the others are
    imported.

    Raises:
        DataError: nothing is left.
    """
    groups, left_out = _planned(source, out, resolution)
    todo = [group for group in groups if not is_finished(out, _record_path(out, group))]
    if len(todo) < len(groups):
        print(f"{len(groups) - len(todo)} of {len(groups)} groups are there already", file=sys.stderr)
    skipped = _each(_import_group, todo, (source, out, resolution), workers, "portraits")
    done = [group for group in groups if group.id not in skipped]
    if done:  # every imported portrait's camera in the form of EG3D's `dataset.json`, for renders of conditions
        rows = [[view["image"], view["label"]] for record in _imported(out) for view in record["views"]]
        write_text(out / "cameras.json", json.dumps({"labels": rows}))
    todo = [group for group in done if _record(out, group).get("conditions") != conditions.kind]
    skipped |= _each(_add_conditions, todo, (conditions, out, resolution), workers, "conditions")
    reasons = out / "left_out" / f"{source.name}.json"
    write_text(reasons, json.dumps({**skipped, **left_out}, indent=1) + "\n")
    _report(skipped, len(groups), "imported", f" (all of them in '{reasons}')")
    records = [_record(out, group) for group in groups if group.id not in skipped]
    for line in note_lines((note, f"{record['id']}, {name}") for record in records for name, note in notes_of(record)):
        print(line, file=sys.stderr)
    return _write_manifest(out, resolution)


def extract_images(source: NeRSemble, out: Path, resolution: int, folder: Path) -> int:
    """Write the planned images as files for a detector of five points; returns how many there are.

    Raises:
        DataError: not one of them can be read.
    """
    groups, _ = _planned(source, out, resolution)
    skipped = _each(_extract, groups, (source, folder), 1, "extract")
    _report(skipped, len(groups), "extracted")
    return sum(len(group.place["cameras"]) for group in groups if group.id not in skipped)


def _planned(source: Reader, out: Path, resolution: int) -> tuple[list[ViewGroup], dict[str, str]]:
    """The plan kept in `out`, or a new one, and what it leaves out and why. It is made once: files that arrive later do
    not change it.

    Raises:
        DataError: there is nothing to plan, or the plan in `out` is another one or damaged.
    """
    settings = {"source": source.name, "resolution": resolution, **source.settings()}
    path = out / "sources" / f"{source.name}.json"
    kept = _kept_plan(path) if path.is_file() else None
    if kept is not None:
        before, groups, left_out = kept
        different = [key for key in settings if before.get(key) != json.loads(json.dumps(settings[key]))]
        if different:
            raise DataError(
                f"'{out}' holds an import of {source.name} with other settings ({', '.join(different)}); use those, or "
                "another --out."
            )
    else:
        if not path.is_file():
            _check_folder(out, resolution)
        groups, left_out = source.groups(), source.left_out
    for what, reason in list(left_out.items())[:REPORTED]:
        print(f"left out of the plan: {what}: {reason}", file=sys.stderr)
    if not groups:
        raise DataError(f"Nothing could be imported: {_first(left_out) if left_out else 'the plan is empty'}.")
    if kept is None:
        content = {"settings": settings, "left_out": left_out, "groups": [asdict(group) for group in groups]}
        write_text(path, json.dumps(content, indent=1))
        counts = {split: sum(group.split == split for group in groups) for split in SPLITS}
        print(f"planned {len(groups)} groups of {source.name}: {counts}", file=sys.stderr)
    return groups, left_out


def _kept_plan(path: Path) -> tuple[dict[str, Any], list[ViewGroup], dict[str, str]] | None:
    """Settings and groups of an earlier import, and what it left out; None, with a message, if its plan is damaged."""
    try:
        kept = read_json(path, "the plan of this source")
        return dict(kept["settings"]), [ViewGroup(**group) for group in kept["groups"]], dict(kept.get("left_out", {}))
    except (DataError, LookupError, TypeError, ValueError, AttributeError):
        print(f"'{path}' is damaged; this source is planned again.", file=sys.stderr)
        return None


def _check_folder(out: Path, resolution: int) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    plans = _plans(out)
    if not plans:
        raise DataError(f"'{out}' is not empty and not an import of this program; choose a new folder for --out.")
    for name, plan in plans.items():
        there = plan["settings"]["resolution"]
        if there != resolution:
            raise DataError(f"'{out}' has images of {there} px from '{name}', not {resolution}.")


def _plans(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: read_json(path, "a plan") for path in sorted((out / "sources").glob("*.json"))}


def _imported(out: Path) -> list[dict[str, Any]]:
    groups = [ViewGroup(**group) for plan in _plans(out).values() for group in plan["groups"]]
    return [_record(out, group) for group in groups if _record_path(out, group).is_file()]


def _write_manifest(out: Path, resolution: int) -> Path:
    """All imported subjects that have conditions, of every source in `out`."""
    header = {"format": FORMAT, "version": VERSION, "resolution": resolution, "sources": list(_plans(out))}
    lines = [header, *(record for record in _imported(out) if "conditions" in record)]
    path = out / "manifest.jsonl"
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def _record_path(out: Path, group: ViewGroup) -> Path:
    return out / group.split / group.id / "subject.json"


def _record(out: Path, group: ViewGroup) -> dict[str, Any]:
    return read_json(_record_path(out, group), "an imported subject")


def _write_record(out: Path, group: ViewGroup, record: dict[str, Any]) -> None:
    write_text(_record_path(out, group), json.dumps(record), durable=False)


# Work on one group, in this process or in another -----------------------------------------------------------------


def _import_group(source: Reader, out: Path, resolution: int, group: ViewGroup) -> None:
    views, entries = source.views(group, resolution), []
    for number, view in enumerate(views):
        name = f"{group.split}/{group.id}/{number:02d}.png"
        save_image(out / name, view.image, durable=False)
        entries.append({"image": name, "label": view.label.tolist(), "camera": view.name})
    record = {"id": group.id, "split": group.split, "person": group.person, "provider": source.name, "views": entries}
    if notes := {view.name: view.notes for view in views if view.notes}:
        record["notes"] = notes
    _write_record(out, group, record)


def _add_conditions(
    conditions: RenderedConditions | GivenConditions, out: Path, resolution: int, group: ViewGroup
) -> None:
    """Write conditions in place of those that the group may have."""
    record = _record(out, group)
    if record.pop("conditions", None) is not None:
        _write_record(out, group, record)
    images = [conditions.image(record, number, resolution) for number in range(len(record["views"]))]
    for view, (pixels, person) in zip(record["views"], images, strict=True):
        view["condition"] = view["image"].replace(".png", "_condition.png")
        view["condition_subject"] = person
        save_image(out / view["condition"], pixels, durable=False)
    _write_record(out, group, {**record, "conditions": conditions.kind})


def _extract(source: NeRSemble, folder: Path, group: ViewGroup) -> None:
    for name, image in list(source.extracted(group)):  # all or none
        path = folder / f"{name}.png"
        if not path.is_file():
            save_image(path, image, durable=False)


def _each(work: Callable, groups: list[ViewGroup], shared: tuple, workers: int, what: str) -> dict[str, str]:
    """work(*shared, group) of every group; which were skipped and why."""
    results = run_each(functools.partial, (_attempt, work, shared), groups, workers, unit="group", desc=what)
    return {group: reason for group, reason in results if reason is not None}


def _attempt(work: Callable, shared: tuple, group: ViewGroup) -> tuple[str, str | None]:
    """The group's id and why it was skipped, if it was."""
    try:
        work(*shared, group)
    except WriteError:
        raise
    except Exception as error:  # readers meet every kind of damage: numpy's, PyAV's, of linear algebra
        return group.id, reason_of(error)
    return group.id, None


def _report(skipped: dict[str, str], count: int, done: str, where: str = "") -> None:
    """Print what was skipped of `count` groups; DataError if no other is left."""
    for group, reason in list(skipped.items())[:REPORTED]:
        print(f"skipped {group}: {reason}", file=sys.stderr)
    if skipped:
        where = where if len(skipped) > REPORTED else ""
        print(f"{len(skipped)} of {count} groups skipped{where}; a later run tries them again", file=sys.stderr)
    if len(skipped) == count:
        raise DataError(f"Nothing could be {done}: {_first(skipped)}.")


def _first(left_out: dict[str, str]) -> str:
    return ": ".join(next(iter(left_out.items())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.import_data", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, reader in READERS.items():
        command = commands.add_parser(name, help=reader.help)
        add = command.add_argument
        add("--source", type=Path, required=True, help="folder of the data set as it was downloaded or exported")
        add("--out", type=Path, required=True, help="folder of the result; an interrupted import continues")
        add("--resolution", type=int, default=512, help="side of the images in pixels, a multiple of 8 (default 512)")
        ways = "'render' draws them with our renderer (default); a folder has renders of cameras.json's cameras"
        add("--conditions", default="render", help=ways)
        add("--condition-people", type=int, default=64, help="people in rendered conditions, per library (default 64)")
        add("--workers", type=int, default=1, help="processes (default 1)")
        command.set_defaults(extract=None)
        reader.add_options(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution {args.resolution} must be a positive multiple of 8")
    if not args.source.is_dir():
        parser.error(f"--source {args.source}: no such folder")
    try:
        source = READERS[args.command].from_options(args)
        if args.extract is not None:
            count = extract_images(source, args.out, args.resolution, args.extract)
            print(f"{count} images below {args.extract}")
            return 0
        rendered = args.conditions == "render"
        conditions = RenderedConditions(args.condition_people) if rendered else GivenConditions(Path(args.conditions))
        print(import_source(source, args.out, args.resolution, conditions, args.workers))
    except DataError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
