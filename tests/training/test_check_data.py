"""The validation command: every kind of damage is found and named, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.subjects.dataset import read_images
from training import check_data
from training.base import BaseConfig, BaseStage
from training.dataset.images import DataError, MultiViewDataset, read_manifest


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
    found = list(check_data.problems(data, images=False))
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
    found = list(check_data.problems(data, images=False))
    assert found[: len(messages)] == messages
    assert len(found) == (9 if kind == "own person as condition" else len(messages))


def test_files(data, capsys):
    """Missing, cut off, of another size, of one colour, copied into another split, the portrait as its condition."""
    train, val = data / "train", data / "val" / "s3"
    (train / "s0" / "00.png").unlink()
    image = (train / "s0" / "01_condition.png").read_bytes()
    (train / "s0" / "01_condition.png").write_bytes(image[: len(image) // 2])
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
    found = list(check_data.problems(data, images=False))
    messages = ["01_depth.npz' has shape", "02_depth.npz' cannot be read", "03_depth.npz' is missing"]
    assert len(found) == 3 and all(message in line for message, line in zip(messages, found, strict=True))


def test_splits_that_training_needs(data, capsys):
    """Training refuses what has no val split; the check said nothing."""
    config = BaseConfig(data={"root": str(data)})
    edit(data, lambda subjects: subjects.pop())
    assert check_data.main([str(data)]) == 1
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith("no subjects in split 'val': training refuses the data set unless data.validation_split")
    assert summary.endswith("27 views: 1 problems")
    with pytest.raises(DataError, match="no subjects in split 'val'"):
        BaseStage.build(config, torch.device("cpu"))
    edit(data, lambda subjects: [subject.update(split="test") for subject in subjects])
    assert check_data.main([str(data), "--quick"]) == 1
    assert [line[:28] for line in capsys.readouterr().out.splitlines()[:2]] == [
        "no subjects in split 'train'",
        "no subjects in split 'val': ",
    ]


def test_a_header_without_resolution(data, capsys):
    lines = (data / "manifest.jsonl").read_text().splitlines()
    header = {key: value for key, value in json.loads(lines[0]).items() if key != "resolution"}
    (data / "manifest.jsonl").write_text("\n".join([json.dumps(header), *lines[1:]]))
    with pytest.raises(SystemExit):
        check_data.main([str(data)])
    assert "manifest.jsonl' must give a 'resolution' in its header, not None" in capsys.readouterr().err


def test_training_evaluation_and_check_read_an_image_alike(data, capsys, caplog):
    """Sideways, of 16 bits, transparent, animated: one reader for all, and the check says what it decided."""
    exif, folder = Image.Exif(), data / "val/s3"
    exif[0x0112] = 6
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    stored = np.stack([ramp] * 3, -1)
    Image.fromarray(stored).save(folder / "00.png", exif=exif)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "01.png")
    clear = Image.fromarray(np.dstack([stored, np.where(ramp < 128, 0, 255).astype(np.uint8)]))
    clear.save(folder / "02.png")
    first, second = Image.fromarray(stored), Image.new("RGB", (64, 64), "red")
    first.save(folder / "03.png", save_all=True, append_images=[second])
    wanted = np.stack([np.rot90(stored, -1), stored, np.where(stored < 128, 255, stored), stored])
    dataset = MultiViewDataset(data, "val")
    assert np.array_equal(dataset.images[:4].permute(0, 2, 3, 1).numpy(), wanted)
    assert np.array_equal(MultiViewDataset(data, "val", in_memory=False).images[0:4], dataset.images[:4])
    views = read_manifest(data)[1][3]["views"][:4]
    evaluated = read_images(data, views, "image")
    assert np.abs(evaluated.permute(0, 2, 3, 1).numpy() * 255 - wanted).max() < 1e-3
    assert "02.png': transparent areas are filled with white" in caplog.text
    assert check_data.main([str(data)]) == 0
    *notes, summary = capsys.readouterr().out.splitlines()
    assert notes == [
        "note: 1 images: it is turned upright by its EXIF orientation 6 (the first is val/s3/00.png)",
        "note: 1 images: transparent areas are filled with white (the first is val/s3/02.png)",
        "note: 1 images: it has 2 frames, the first is read (the first is val/s3/03.png)",
    ]
    assert summary.endswith("no problems, 3 notes")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:40] + b"\xff" + data[41:]])
def test_training_and_evaluation_name_a_damaged_image(data, damage):
    """A broken chunk was a bare SyntaxError."""
    path = data / "val/s3/02.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="02.png' named in the manifest cannot be read"):
        MultiViewDataset(data, "val").images  # noqa: B018
    with pytest.raises(DataError, match="02.png' cannot be read"):
        read_images(data, read_manifest(data)[1][3]["views"], "image")


def test_no_data_set_is_another_exit_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        check_data.main([str(tmp_path)])
    assert stop.value.code == 2 and "No dataset at" in capsys.readouterr().err
