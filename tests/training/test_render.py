"""The data set renderer: files and manifest, resuming, disjoint identities, clear errors."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d import synthetic_heads as heads
from diffportrait3d.cameras.labels import camera_angles, validate_labels
from diffportrait3d.files import WriteError
from training import check_data, render
from training.dataset.images import MultiViewDataset, read_manifest
from training.dataset.shards import read_records, read_tensors, write_shard

COUNTS = {"train": 1, "val": 0, "test": 1}
SHARDED = {"train": 5, "val": 1, "test": 1}
SHARDS = {"people_per_shard": 2, "cameras": 16, "conditions": 32}


def _settings(**changes) -> dict:
    values = {
        "resolution": 32,
        "views": 2,
        "yaw": 50.0,
        "pitch": 15.0,
        "ict_fraction": 0.0,
        "condition_subjects": 1,
        "seed": 0,
    }
    return render.dataset_settings(**{**values, **changes})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    render.render_dataset(out, _settings(), COUNTS, None, workers=1)
    return out


def test_manifest_describes_every_file(dataset):
    header, subjects = read_manifest(dataset)
    assert header["format"] == "diffportrait3d-multiview" and header["version"] == 1 and header["resolution"] == 32
    assert [(subject["split"], subject["provider"]) for subject in subjects] == [
        ("train", "analytic"),
        ("test", "analytic"),
    ]
    for subject in subjects:
        validate_labels(torch.tensor([view["label"] for view in subject["views"]]))
        for view in subject["views"]:
            for key in ("image", "condition"):
                image = np.asarray(Image.open(dataset / view[key]))
                assert image.shape == (32, 32, 3) and image.std() > 10
            assert view["condition_subject"] != subject["id"]
            assert ("depth" in view) == (subject["split"] == "test")
    stored = np.load(dataset / subjects[1]["views"][0]["depth"])
    assert stored["depth"].dtype == np.float16 and stored["mask"].dtype == bool
    assert np.array_equal(stored["mask"], stored["depth"] > 0) and stored["mask"].mean() > 0.2
    assert 2.2 < stored["depth"][stored["mask"]].mean() < 3.2


def test_resuming_renders_only_what_is_missing(dataset):
    _, subjects = read_manifest(dataset)
    before = (dataset / "manifest.jsonl").read_bytes()
    folders = [dataset / subject["split"] / subject["id"] for subject in subjects]
    images = [(folder / "01.png").read_bytes() for folder in folders]
    kept = (folders[0] / "01.png").stat().st_mtime_ns
    (folders[1] / "subject.json").unlink()
    (folders[1] / "01.png").write_bytes(b"half an image")
    (dataset / "manifest.jsonl").unlink()
    render.render_dataset(dataset, _settings(), COUNTS, None, workers=1)
    assert (dataset / "manifest.jsonl").read_bytes() == before
    assert [(folder / "01.png").read_bytes() for folder in folders] == images
    assert (folders[0] / "01.png").stat().st_mtime_ns == kept
    assert not list(dataset.rglob(".*"))


def test_other_settings_or_a_strange_folder_are_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="views 2 there, 3 asked"):
        render.render_dataset(dataset, _settings(views=3), COUNTS, None, workers=1)
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(ValueError, match="not a data set"):
        render.render_dataset(tmp_path, _settings(), COUNTS, None, workers=1)


def test_people_are_disjoint_between_splits_and_from_condition_people():
    settings = _settings(views=12, condition_subjects=50, ict_fraction=0.5)
    people = {split: [render.person(settings, split, index) for index in range(40)] for split in render.SPLITS}
    seeds = {split: {who["seed"] for who in group} for split, group in people.items()}
    conditions = {split: {seed for who in group for seed in who["conditions"]} for split, group in people.items()}
    assert not seeds["train"] & seeds["test"] and not seeds["train"] & seeds["val"] and not seeds["val"] & seeds["test"]
    assert not conditions["train"] & conditions["test"]
    assert not set.union(*seeds.values()) & set.union(*conditions.values())
    assert {who["provider"] for who in people["train"]} == {"ict", "analytic"}
    other = render.person(_settings(seed=1), "train", 0)
    assert other["seed"] not in set.union(*seeds.values())


def test_cameras_fill_their_range_and_the_first_is_easy():
    settings = _settings(views=10, yaw=60.0, pitch=20.0)
    angles = [camera_angles(render.person(settings, "train", index)["labels"]) for index in range(60)]
    yaw, pitch = torch.stack([angle.yaw for angle in angles]), torch.stack([angle.pitch for angle in angles])
    assert yaw[:, 0].abs().max() <= 15 and pitch[:, 0].abs().max() <= 8
    assert 55 < yaw.abs().max() <= 60.01 and 18 < pitch.abs().max() <= 20.01
    assert abs(float(yaw.mean())) < 5 and len(yaw.unique()) == yaw.numel()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "shards"
    render.render_dataset(out, _settings(views=3, condition_subjects=2, shards=SHARDS), SHARDED, None, workers=1)
    return out


def test_shards_hold_what_their_people_and_cameras_say(sharded):
    header, subjects = read_manifest(sharded)
    assert header["version"] == 2
    assert [s["split"] for s in subjects].count("train") == 5 and len(list((sharded / "train").iterdir())) == 3
    data, validation = MultiViewDataset(sharded, "train"), MultiViewDataset(sharded, "val")
    assert data.images.shape == (15, 3, 32, 32) and validation.images.shape == (3, 3, 32, 32)
    angles = camera_angles(data.labels)
    assert all(angles.yaw[rows[0]].abs() <= 15 and angles.pitch[rows[0]].abs() <= 8 for rows in data.subjects)
    assert len(data.labels.unique(dim=0)) <= 16
    people = [subject for subject in subjects if subject["split"] == "train"]
    for row in (0, 4, 14):
        person, view = people[row // 3], people[row // 3]["views"][row % 3]
        label = torch.tensor(view["label"])
        for shown, seed in ((data.images, person["seed"]), (data.conditions, int(view["condition_subject"][-7:]))):
            image = heads.render_views(heads.portrait_scene(seed), label, 32).image[0]
            assert (shown[torch.tensor([row])][0] / 255 - image).abs().max() < 0.51 / 255


def test_shards_resume_where_they_were_stopped(sharded, tmp_path, monkeypatch):
    """The manifest describes what is finished, at any moment; the end is the same, to the bit."""
    settings = _settings(views=3, condition_subjects=2, shards=SHARDS)
    write = render.write_shard

    def stopped(path, images, records):
        if path.stem == "0000002":
            raise KeyboardInterrupt
        write(path, images, records)

    monkeypatch.setattr(render, "write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        render.render_dataset(tmp_path, settings, SHARDED, None, workers=1)
    assert len(MultiViewDataset(tmp_path, "train")) == 6  # the first shard
    assert read_manifest(tmp_path)[0]["complete"] is False and "complete" not in read_manifest(sharded)[0]
    monkeypatch.undo()
    (tmp_path / "train/0000000.safetensors").write_bytes(b"half a file")
    render.render_dataset(tmp_path, settings, SHARDED, None, workers=1)
    files = {path.relative_to(sharded): path.read_bytes() for path in sharded.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_damaged_bank_is_named(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "set")
    path = tmp_path / "set/conditions/0001.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="0001.safetensors' cannot be read"):
        _ = MultiViewDataset(tmp_path / "set", "train").conditions
    path.unlink()
    with pytest.raises(ValueError, match="Camera condition .* run training.render again"):
        _ = MultiViewDataset(tmp_path / "set", "train").conditions


def test_shards_are_checked(sharded, tmp_path, capsys):
    """A missing and a damaged shard, exchanged people, an image of one colour, and a condition that is nowhere."""
    assert check_data.main([str(sharded)]) == 0 and "no problems" in capsys.readouterr().out
    root = shutil.copytree(sharded, tmp_path / "set")
    first, second, third = sorted((root / "train").glob("*.safetensors"))
    bank = min((root / "conditions").glob("*.safetensors"))
    images, records = read_tensors(first, "images")[0], read_records(first)
    images[1] = 7
    write_shard(first, images, records[::-1])
    second.write_bytes(second.read_bytes()[:5000])
    third.unlink()
    rows = set(read_tensors(bank, "rows")[0].tolist())
    bank.unlink()
    assert check_data.main([str(root)]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    views = [view for subject in read_manifest(root)[1] if "shard" in subject for view in subject["views"]]
    lost = sum(view["condition_row"] in rows for view in views)
    assert sum("no file in 'conditions' holds its condition" in line for line in lines) == lost > 0
    found = "\n".join(lines)
    assert f"train/{records[0]['id']}, view 1: the image has a single colour" in found
    assert f"train/{first.name}: its people are not those" in found
    assert (
        f"{second.name}' cannot be read" in found and f"train/{third.name}: this shard of 1 people is missing" in found
    )


def test_the_bank_covers_the_range_evenly():
    settings = _settings(yaw=70.0, pitch=20.0, shards={"people_per_shard": 1, "cameras": 512, "conditions": 2048})
    yaw, pitch = render.camera_bank(settings)
    cells = torch.histogramdd(torch.stack([yaw, pitch], 1), [8, 4], range=[-70.0, 70.0, -20.0, 20.0]).hist
    assert cells.min() >= 12 and cells.max() <= 20 and cells.sum() == 512
    shown = torch.bincount(
        render.bank_person(_settings(**{"condition_subjects": 64, "shards": SHARDS}), torch.arange(12))
    )
    assert shown.max() <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "130"], "multiple of 8"),
        (["--views", "0"], "--views"),
        (["--pitch", "90"], "--pitch"),
        (["--shard", "5", "--cameras", "8"], "--cameras 8 must be at least --views 10"),
        (["--ict", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--train", "0", "--val", "0", "--test", "0"], "nothing to render"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        render.main(["--out", str(tmp_path / "set"), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("subject.json", b""),
        ("subject.json", b"[]"),
        ("subject.json", bytes(300)),
        ("01.png", b""),
        ("01.png", bytes(900)),
        ("00_condition.png", None),
        ("00_depth.npz", bytes(range(256))),
        ("settings.json", b"{"),
        ("settings.json", bytes(range(128, 200))),
        ("manifest.jsonl", bytes(50)),
    ],
)
def test_what_is_damaged_is_named_and_made_again(dataset, capsys, name, content):
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    path = next(path for path in before if path.name == name and "train" not in path.parts)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    if name == "settings.json":
        with pytest.raises(ValueError, match="yaw 50.0 there, 40.0 asked"):
            render.render_dataset(dataset, _settings(yaw=40.0), COUNTS, None, workers=1)
    render.render_dataset(dataset, _settings(), COUNTS, None, workers=1)
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before
    assert f"{name}' is damaged" in capsys.readouterr().err or name == "manifest.jsonl"


def test_goes_on_when_there_is_room_again(dataset, tmp_path, room):
    with room(1500), pytest.raises(WriteError, match="cannot be written: .* make room"):
        render.render_dataset(tmp_path / "set", _settings(), COUNTS, None, workers=1)
    assert not list(tmp_path.rglob("*.tmp"))
    render.render_dataset(tmp_path / "set", _settings(), COUNTS, None, workers=1)
    assert (tmp_path / "set/manifest.jsonl").read_bytes() == (dataset / "manifest.jsonl").read_bytes()
