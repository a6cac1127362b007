"""The validation command: every kind of damage is found and named, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import check_data


@pytest.fixture
def data(dataset, tmp_path) -> Path:
    """A copy of the four blob subjects (s0, s1, s2 in train, s3 in val)."""
    return shutil.copytree(dataset, tmp_path / "set")


def edit(root: Path, change) -> None:
    """Apply `change` to the manifest's subjects."""
    header, *subjects = [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]
    change(subjects)
    (root / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *subjects]))


def edit_label(place: int | slice, value) -> callable:
    def change(subjects):
        label = subjects[1]["views"][2]["label"]
        label[place] = value if isinstance(place, slice) else value(label[place])

    return change


def test_a_good_data_set_has_no_problems(data, capsys):
    assert check_data.main([str(data)]) == 0
    assert capsys.readouterr().out == "4 subjects (3 train, 1 val), 4 people, 36 views: no problems\n"


CAMERA = "train/s1, view 2: the camera "
LABELS = {
    "nan": (edit_label(3, lambda v: float("nan")), CAMERA + "contains NaN or infinity (first in place 4"),
    "stretched": (edit_label(0, lambda v: 2 * v), CAMERA + "has a rotation that is not orthonormal"),
    "mirrored": (edit_label(slice(0, 12, 4), [-1.0, 0.0, 0.0]), CAMERA),
    "last row": (edit_label(15, lambda v: 2.0), CAMERA + "has a last pose row other than 0 0 0 1"),
    "in pixels": (edit_label(16, lambda v: 2183.0), CAMERA + "has intrinsics in pixels"),
    "looks away": (edit_label(slice(3, 12, 4), [0.0, 0.0, -2.7]), CAMERA + "does not see the head"),
    "not numbers": (edit_label(0, lambda v: "a"), CAMERA + "could not convert"),
    "short": (edit_label(slice(20, 25), []), "train/s1, view 2: the label must have 25 numbers, not 20"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_bad_cameras(data, kind):
    change, message = LABELS[kind]
    edit(data, change)
    found = list(check_data.problems(data, pictures=False))
    assert len(found) == 1 and found[0].startswith(message)


def _person(subjects):
    subjects[0]["person"] = subjects[3]["person"] = "anna"


def _same_id(subjects):
    subjects[1]["id"] = "s0"


def _own_condition(subjects):
    subjects[2]["views"][4]["condition_subject"] = "s2"


def _own_person(subjects):
    subjects[2]["person"] = "c2"


def _shared_condition(subjects):
    subjects[3]["views"][0]["condition_subject"] = "c1"


def _nobody(subjects):
    del subjects[0]["views"][0]["condition_subject"]


def _no_condition(subjects):
    del subjects[0]["views"][0]["condition"]


def _split(subjects):
    subjects[0]["split"] = "training"


def _one_view(subjects):
    subjects[0]["views"] = subjects[0]["views"][:1]


PEOPLE = {
    "person in two splits": (_person, ["anna: this person is in the splits train, val"]),
    "id twice": (_same_id, ["s0: 2 subjects have this id"]),
    "own id as condition": (_own_condition, ["train/s2, view 4: the condition shows the portrait's own person, s2"]),
    "own person as condition": (_own_person, ["train/s2, view 0: the condition shows the portrait's own person, c2"]),
    "condition of train": (_shared_condition, ["c1: this person is in the conditions of train and of val"]),
    "condition of nobody": (_nobody, ["train/s0, view 0: 'condition_subject' does not say whom the condition shows"]),
    "no condition": (_no_condition, ["train/s0, view 0: the manifest names no condition"]),
    "unknown split": (_split, ["training/s0: split 'training' is none of train, val, test"]),
    "one view": (_one_view, ["train/s0: 1 views, but a reference and a target are two"]),
}


@pytest.mark.parametrize("kind", PEOPLE)
def test_people_and_splits(data, kind):
    change, messages = PEOPLE[kind]
    edit(data, change)
    found = list(check_data.problems(data, pictures=False))
    assert found[: len(messages)] == messages
    assert len(found) == (9 if kind == "own person as condition" else len(messages))


def test_files(data, capsys):
    """Missing, cut off, of another size, of one colour, copied into another split, the portrait as its condition."""
    train, val = data / "train", data / "val" / "s3"
    (train / "s0" / "00.png").unlink()
    picture = (train / "s0" / "01_condition.png").read_bytes()
    (train / "s0" / "01_condition.png").write_bytes(picture[: len(picture) // 2])
    Image.new("RGB", (32, 64)).save(train / "s1" / "03.png")
    Image.new("RGB", (64, 64), "grey").save(train / "s1" / "04.png")
    shutil.copy(train / "s2" / "05.png", val / "05.png")
    shutil.copy(train / "s2" / "06.png", train / "s2" / "06_condition.png")
    assert check_data.main([str(data)]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    expected = [
        "train/s0, view 0: image 'train/s0/00.png' is missing",
        "train/s0, view 1: condition 'train/s0/01_condition.png' cannot be read",
        "train/s1, view 3: image 'train/s1/03.png' is 32x64, the manifest says 64x64",
        "train/s1, view 4: image 'train/s1/04.png' has a single colour",
        "train/s2, view 6: the condition is the portrait itself ('train/s2/06_condition.png')",
        "val/s3, view 5: 'val/s3/05.png' is the same file as the portrait of train/s2, view 5",
    ]
    assert len(lines) == len(expected) and all(a.startswith(b) for a, b in zip(lines, expected, strict=True))
    assert summary.endswith("36 views: 6 problems")
    assert check_data.main([str(data), "--quick"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2  # the missing one, and the summary


def test_depth(data):
    def change(subjects):
        for number in range(4):
            subjects[3]["views"][number]["depth"] = f"val/s3/{number:02d}_depth.npz"

    edit(data, change)
    size = (64, 64)
    np.savez(data / "val/s3/00_depth.npz", depth=np.zeros(size), mask=np.zeros(size, bool))
    np.savez(data / "val/s3/01_depth.npz", depth=np.zeros((32, 32)), mask=np.zeros((32, 32), bool))
    (data / "val/s3/02_depth.npz").write_bytes(b"PK broken")
    found = list(check_data.problems(data, pictures=False))
    messages = ["01_depth.npz' has shape", "02_depth.npz' cannot be read", "03_depth.npz' is missing"]
    assert len(found) == 3 and all(message in line for message, line in zip(messages, found, strict=True))


def test_no_data_set_is_another_exit_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        check_data.main([str(tmp_path)])
    assert stop.value.code == 2 and "No dataset at" in capsys.readouterr().err
