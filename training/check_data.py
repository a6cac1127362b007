"""Look for everything in a multi-view data set that would spoil a training run or its evaluation.

    python -m training.check_data DIR

One line a problem, then notes, then a summary; the exit status is 1 if there are problems and 2 if there is no data
set. Checked are: files that are missing or cannot be read, their sizes, camera labels (25 finite numbers, a rotation,
EG3D's units, a head in the image), ids and people in more than one split, the same image in two splits, conditions
that show the portrait's own person or, outside train, a person that train's conditions show, and splits that training
needs; of shards, that they hold the people and conditions that the manifest names. Notes are no faults: what an import
left out and why, and what was decided for the user about an image.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffportrait3d.cameras.labels import LABEL_SIZE, PIVOT, validate_labels
from diffportrait3d.cameras.projection import project
from diffportrait3d.command import run_main
from diffportrait3d.files import file_hash
from diffportrait3d.images import ImageError, read_image

from .dataset.images import SPLITS, DataError, read_manifest
from .dataset.records import note_lines, notes_of
from .dataset.shards import read_records, read_tensors
from .sources.reader import read_json

Subject = dict[str, Any]  # a line of the manifest
View = tuple[str, dict[str, Any]]  # "split/id, view 3" and its entry
Note = tuple[str, str]  # and the image that has it
NEEDED_SPLITS = {"train": "data.split", "val": "data.validation_split"}  # by training, and the setting that says so


def problems(root: Path, images: bool = True, progress: bool = False, notes: list[str] | None = None) -> Iterator[str]:
    """One sentence for everything that is wrong with what is there. Without `images` no image is opened, only looked
    for. `notes` gets lines that are worth knowing, but no problems."""
    header, subjects = read_manifest(root)
    resolution = header.get("resolution")
    if not isinstance(resolution, int) or resolution < 1:
        raise DataError(f"'{root / 'manifest.jsonl'}' must give a 'resolution' in its header, not {resolution!r}.")
    notes = [] if notes is None else notes
    views = [view for subject in subjects for view in _views(subject)]
    yield from _structure(subjects)
    for where, view in views:
        yield from _camera(where, view)
    yield from _people(subjects)
    yield from _conditions(subjects)
    of_images: list[Note] = []
    in_files = [view for subject in subjects if "shard" not in subject for view in _views(subject)]
    yield from _files(root, in_files, resolution, images, progress, of_images)
    yield from _shards(root, [subject for subject in subjects if "shard" in subject], resolution, images)
    yield from _left_out(root, notes)
    for subject in subjects:
        of_images += [(f"in the source, {note}", f"{_name(subject)}, {name}") for name, note in notes_of(subject)]
    notes += note_lines(of_images)


def missing_splits(subjects: list[Subject]) -> Iterator[str]:
    """One sentence for every split without which training refuses the data set."""
    there = {subject.get("split") for subject in subjects}
    for split, setting in NEEDED_SPLITS.items():
        if subjects and split not in there:
            yield (
                f"no subjects in split '{split}': training refuses the data set unless {setting} names another split; "
                f"an import fills it by --{split}-groups, --val-share, --test-share or --split-file"
            )


def _left_out(root: Path, notes: list[str]) -> Iterator[str]:
    """What every import of this data set had to leave out goes into `notes`."""
    for path in sorted((root / "left_out").glob("*.json")):
        try:
            left_out = read_json(path, "what an import left out")
            notes += [f"left out of {path.stem}: {what}: {reason}" for what, reason in left_out.items()]
        except (DataError, AttributeError) as error:
            yield f"'{path}' says nothing about what was left out ({error}); import {path.stem} again"


def _structure(subjects: list[Subject]) -> Iterator[str]:
    if not subjects:
        yield "manifest.jsonl: no subjects"
    for name, count in Counter(subject.get("id") for subject in subjects).items():
        if count > 1:
            yield f"{name}: {count} subjects have this id"
    for subject in subjects:
        if subject.get("split") not in SPLITS:
            yield f"{_name(subject)}: split {subject.get('split')!r} is none of {', '.join(SPLITS)}"
        if len(subject.get("views", [])) < 2:
            yield f"{_name(subject)}: {len(subject.get('views', []))} views, but a reference and a target are two"


def _camera(where: str, view: dict[str, Any]) -> Iterator[str]:
    label = view.get("label")
    if not isinstance(label, list) or len(label) != LABEL_SIZE:
        count = len(label) if isinstance(label, list) else label
        yield f"{where}: the label must have {LABEL_SIZE} numbers, not {count}"
        return
    try:
        good = validate_labels(torch.tensor([[float(value) for value in label]]), "camera")[0]
    except (TypeError, ValueError) as error:
        yield f"{where}: the camera {str(error).removeprefix('camera: view 0 ')}"
        return
    x, y, depth = project(torch.tensor([PIVOT]), good, 1)[0].tolist()
    if depth <= 0 or not (0 <= x <= 1 and 0 <= y <= 1):
        yield f"{where}: the camera does not see the head (its pivot is at {x:.2f}, {y:.2f}, depth {depth:.2f})"


def _people(subjects: list[Subject]) -> Iterator[str]:
    """Identities in more than one split."""
    splits: dict[str, set[str]] = {}
    for subject in subjects:
        splits.setdefault(_person(subject), set()).add(str(subject.get("split")))
    for person, there in splits.items():
        if len(there) > 1:
            yield f"{person}: this person is in the splits {', '.join(sorted(there))}"


def _conditions(subjects: list[Subject]) -> Iterator[str]:
    """Conditions that show the portrait's own person, or people of train's conditions outside train."""
    shown = {(s.get("split"), v.get("condition_subject")) for s in subjects for v in s.get("views", [])}
    trained = {person for split, person in shown if split == "train"}
    for subject in subjects:
        for where, view in _views(subject):
            person = view.get("condition_subject")
            if not person:
                yield f"{where}: 'condition_subject' does not say whom the condition shows"
            elif person in (subject.get("id"), _person(subject)):
                yield f"{where}: the condition shows the portrait's own person, {person}"
    for split, person in sorted((str(s), str(p)) for s, p in shown if s != "train" and p and p in trained):
        yield f"{person}: this person is in the conditions of train and of {split}"


def _files(
    root: Path, views: list[View], resolution: int, images: bool, progress: bool, notes: list[Note]
) -> Iterator[str]:
    """What the files themselves say; many threads, because data sets may be on slow disks."""
    digests: dict[str, tuple[str, str]] = {}  # of a portrait: where it was seen first
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda view: _view_files(root, *view, resolution, images), views)
        for (where, view), (wrong, decided, digest) in tqdm(
            zip(views, found, strict=True), total=len(views), unit="view", disable=not progress
        ):
            yield from wrong
            notes += decided
            split = where.split("/")[0]
            if digest and digests.setdefault(digest, (split, where))[0] != split:
                yield f"{where}: '{view['image']}' is the same file as the portrait of {digests[digest][1]}"


def _view_files(
    root: Path, where: str, view: dict[str, Any], resolution: int, images: bool
) -> tuple[list[str], list[Note], str | None]:
    """Problems of a view's files, notes on them, and the portrait's hash if it was read."""
    wrong, notes, digests = [], [], {}
    for kind in ("image", "condition"):
        if kind not in view:
            wrong.append(f"{where}: the manifest names no {kind}")
        elif not (root / view[kind]).is_file():
            wrong.append(f"{where}: {kind} '{view[kind]}' is missing")
        elif images:
            digests[kind] = file_hash(root / view[kind])
            problem, decided = _image(root / view[kind], resolution)
            wrong += [f"{where}: {kind} '{view[kind]}' {problem}"] if problem else []
            notes += [(note, view[kind]) for note in decided]
    if "depth" in view and (problem := _depth(root / view["depth"], resolution)):
        wrong.append(f"{where}: depth '{view['depth']}' {problem}")
    if len(digests) == 2 and digests["image"] == digests["condition"]:
        wrong.append(f"{where}: the condition is the portrait itself ('{view['condition']}')")
    return wrong, notes, digests.get("image")


def _shards(root: Path, subjects: list[Subject], resolution: int, images: bool) -> Iterator[str]:
    """What is wrong with the shards that people are in, and with the bank of their conditions."""
    for name, people in itertools.groupby(subjects, lambda subject: subject["shard"]):
        people = list(people)
        where = [view for subject in people for view, _ in _views(subject)]
        if not (root / name).is_file():
            yield f"{name}: this shard of {len(people)} people is missing"
        elif images:
            yield from _stored(root / name, where, resolution, name)
            if [record["id"] for record in read_records(root / name) or []] != [subject["id"] for subject in people]:
                yield f"{name}: its people are not those that the manifest names, in their order"
    there: set[int] = set()
    for path in sorted((root / "conditions").glob("*.safetensors")):
        try:
            rows = read_tensors(path, "rows")[0].tolist()
        except ValueError as error:
            yield str(error)
            continue
        there.update(rows)
        if images:
            name = path.relative_to(root).as_posix()
            yield from _stored(path, [f"{name}, condition {row}" for row in rows], resolution, name)
    for subject in subjects:
        for where, view in _views(subject):
            if view.get("condition_row") not in there:
                yield f"{where}: no file in 'conditions' holds its condition, {view.get('condition_row')}"


def _stored(path: Path, where: list[str], resolution: int, name: str) -> Iterator[str]:
    """What is wrong with the images of a shard, or of a file of the bank; `where` each is used."""
    try:
        pixels = read_tensors(path, "images")[0]
    except ValueError as error:
        yield str(error)
        return
    wanted = (len(where), 3, resolution, resolution)
    if tuple(pixels.shape) != wanted:
        yield f"{name}: its images are {tuple(pixels.shape)}, the manifest says {wanted}"
        return
    flat = pixels.flatten(1)
    plain = flat.amin(1) == flat.amax(1)
    yield from (f"{view}: the image has a single colour" for view, found in zip(where, plain, strict=True) if found)


def _image(path: Path, resolution: int) -> tuple[str | None, tuple[str, ...]]:
    """What is wrong with an image, and what was decided while it was read."""
    try:
        pixels, notes = read_image(path)
    except ImageError as error:
        return f"cannot be read ({error.reason})", ()
    height, width = pixels.shape[:2]
    if (width, height) != (resolution, resolution):
        return f"is {width}x{height}, the manifest says {resolution}x{resolution}", notes
    return "has a single colour" if np.ptp(pixels) == 0 else None, notes


def _depth(path: Path, resolution: int) -> str | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            shapes = {file["depth"].shape, file["mask"].shape}
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"
    return None if shapes == {(resolution, resolution)} else f"has shape {shapes}, not {resolution}x{resolution}"


def _views(subject: Subject) -> Iterator[View]:
    for number, view in enumerate(subject.get("views", [])):
        yield f"{_name(subject)}, view {number}", view


def _name(subject: Subject) -> str:
    return f"{subject.get('split')}/{subject.get('id')}"


def _person(subject: Subject) -> str:
    return str(subject.get("person", subject.get("id")))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.check_data", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument("--quick", action="store_true", help="look for the images, but do not open them")
    args = parser.parse_args(arguments)
    count, notes = 0, []
    try:
        _, subjects = read_manifest(args.data)
        found = problems(args.data, not args.quick, progress=True, notes=notes)
        for line in itertools.chain(found, missing_splits(subjects)):
            tqdm.write(line, file=sys.stdout)
            count += 1
    except (DataError, KeyError, ValueError) as error:
        parser.error(str(error))
    for note in notes:
        print(f"note: {note}")
    splits = Counter(str(subject.get("split")) for subject in subjects)
    parts = ", ".join(f"{number} {split}" for split, number in splits.items())
    people, views = len({_person(subject) for subject in subjects}), sum(len(s.get("views", [])) for s in subjects)
    more = f", {len(notes)} notes" if notes else ""
    print(f"{len(subjects)} subjects ({parts}), {people} people, {views} views: {count or 'no'} problems{more}")
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
