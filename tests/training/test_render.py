"""The data set renderer: files and manifest, resuming, disjoint identities, clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.labels import camera_angles, validate_labels
from diffportrait3d.files import WriteError
from training import render
from training.dataset.images import read_manifest

COUNTS = {"train": 1, "val": 0, "test": 1}


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "130"], "multiple of 8"),
        (["--views", "0"], "--views"),
        (["--pitch", "90"], "--pitch"),
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
