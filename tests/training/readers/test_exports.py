"""Importing exports of EG3D and PanoHead, also beside other sources."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.labels import orbit_camera
from diffportrait3d.cameras.projection import project
from diffportrait3d.files import WriteError
from diffportrait3d.portraits.face import FIVE_POINTS
from training import import_data
from training.check_data import problems
from training.dataset.images import DataError, MultiViewDataset, read_manifest
from training.sources import eg3d
from training.sources.reader import SkippedGroup, Splits

from .conftest import CONDITIONS, POINTS, blobs, centre_of_blob, write_five, write_json


def write_export(root: Path, people: int = 3, views: int = 3, shift=(0.0, 0.0, 0.0), size: int = 40) -> Path:
    """seedNNNN/VV.png and dataset.json; blobs at POINTS, of a head that lies `shift` beside where EG3D's lies."""
    labels, offset = [], torch.tensor(shift)
    for person in range(people):
        for view, yaw in enumerate(np.linspace(-30, 30, views)):
            label = orbit_camera(float(yaw), 3.0 * person, pivot=shift)
            name = f"seed{person:04d}/{view:02d}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            places = project(POINTS.float() + offset, label, size)[:, :2].numpy() - 0.5
            Image.fromarray(blobs(places, (size, size), (1.0, 0.67 + 0.1 * person, 0.53))).save(root / name)
            labels.append([name, label.tolist()])
    write_json(root / "dataset.json", {"labels": labels})
    return root


def export(root: Path, name: str = "panohead", landmarks: Path | None = None, **changes) -> eg3d.Export:
    return eg3d.Export(name, root, Splits(0.0, 0.4), eg3d.Options(**changes), landmarks)


def test_an_export_keeps_images_and_labels(tmp_path):
    root = write_export(tmp_path / "data")
    out = tmp_path / "set"
    command = ["panohead", "--source", str(root), "--out", str(out), "--resolution", "40", "--condition-people", "1"]
    assert import_data.main([*command, "--val-share", "0", "--test-share", "0"]) == 0
    header, subjects = read_manifest(out)
    assert header["sources"] == ["panohead"] and [s["id"] for s in subjects] == [
        f"panohead-seed000{k}" for k in range(3)
    ]
    labels = dict(json.loads((root / "dataset.json").read_text())["labels"])
    for subject in subjects:
        for view in subject["views"]:
            assert view["label"] == pytest.approx(labels[view["camera"]])
            assert np.array_equal(Image.open(out / view["image"]), Image.open(root / view["camera"]))
    assert list(problems(out)) == [] and len(MultiViewDataset(out, "train")) == 9
    cameras = json.loads((out / "cameras.json").read_text())["labels"]
    assert [name for name, _ in cameras] == [v["image"] for s in subjects for v in s["views"]]


def test_an_export_of_another_world_is_aligned_by_five_points(tmp_path):
    """PanoHead's head does not lie where EG3D's does; five points move its cameras and crop its images again."""
    root = write_export(tmp_path / "data", people=1, size=256, shift=(0.02, -0.05, -0.1))
    for name, label in json.loads((root / "dataset.json").read_text())["labels"][:2]:  # the third has no face
        points = FIVE_POINTS.float() + torch.tensor([0.02, -0.05, -0.1])
        places = project(points, torch.tensor(label), 256)[:, :2].numpy() - 0.5
        write_five((tmp_path / "points" / name).with_suffix(".txt"), places)
    source = export(root, landmarks=tmp_path / "points")
    for view in source.views(source.groups()[0], 256):
        for place in project(POINTS.float(), view.label, 256)[:, :2].numpy():
            assert np.abs(centre_of_blob(view.image, place, radius=12) - place).max() < 1e-2


def test_renders_given_for_the_conditions(tmp_path, capsys):
    root, out, renders = write_export(tmp_path / "data", people=2), tmp_path / "set", tmp_path / "eg3d"
    renders.mkdir()
    command = ["eg3d", "--source", str(root), "--out", str(out), "--resolution", "40", "--conditions", str(renders)]
    with pytest.raises(SystemExit):
        import_data.main(command)
    assert "Render every camera of 'cameras.json'" in capsys.readouterr().err
    assert not (out / "manifest.jsonl").exists()
    cameras = json.loads((out / "cameras.json").read_text())["labels"]
    for k, (name, _) in enumerate(cameras):
        (renders / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(renders / name)
    write_json(renders / "dataset.json", {"labels": cameras})
    write_json(renders / "people.json", {cameras[0][0]: "eg3d-seed0009"})
    assert import_data.main(command) == 0 and list(problems(out)) == []
    _, subjects = read_manifest(out)
    assert subjects[0]["views"][0]["condition_subject"] == "eg3d-seed0009"
    assert Image.open(out / subjects[0]["views"][0]["condition"]).size == (40, 40)
    cameras[1][1][3] += 0.1
    write_json(renders / "dataset.json", {"labels": cameras})
    record = json.loads((out / subjects[0]["views"][0]["image"]).with_name("subject.json").read_text())
    from training.sources.conditions import GivenConditions

    with pytest.raises(DataError, match="rendered at another camera"):
        GivenConditions(renders).image(record, 1, 40)


def test_two_sources_share_a_data_set_and_other_settings_do_not(tmp_path):
    out = tmp_path / "set"
    for name in ("panohead", "eg3d"):
        root = write_export(tmp_path / name, people=1)
        import_data.import_source(export(root, name), out, 32, CONDITIONS)
    header, subjects = read_manifest(out)
    assert header["sources"] == ["eg3d", "panohead"] and {s["provider"] for s in subjects} == {"eg3d", "panohead"}
    with pytest.raises(DataError, match="other settings \\(views\\)"):
        import_data.import_source(export(root, "eg3d", views=2), out, 32, CONDITIONS)
    with pytest.raises(DataError, match="images of 32 px"):
        import_data.import_source(export(root, "other"), out, 40, CONDITIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(DataError, match="choose a new folder"):
        import_data.import_source(export(root), tmp_path / "mine", 32, CONDITIONS)


@pytest.mark.parametrize(
    "name", ["sources/panohead.json", "subject.json", "00.png", "00_condition.png", "manifest.jsonl"]
)
@pytest.mark.parametrize(
    "content", [b"", bytes(500), b"[1]", bytes(range(128, 250))], ids=["empty", "zeros", "list", "noise"]
)
def test_what_is_damaged_of_an_import_is_made_again(tmp_path, capsys, name, content):
    root, out = write_export(tmp_path / "data", people=2), tmp_path / "set"
    import_data.import_source(export(root), out, 32, CONDITIONS)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    path = next(path for path in sorted(before) if str(path).endswith(name))
    path.write_bytes(content)
    import_data.import_source(export(root), out, 32, CONDITIONS)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert f"{path}' is damaged" in capsys.readouterr().err or name == "manifest.jsonl"


def test_an_import_goes_on_when_there_is_room_again(tmp_path, room):
    root, out = write_export(tmp_path / "data", people=2), tmp_path / "set"
    with room(2000), pytest.raises(WriteError, match="cannot be written: .* make room"):
        import_data.import_source(export(root), out, 32, CONDITIONS)
    assert not list(out.rglob("*.tmp"))
    import_data.import_source(export(root), out, 32, CONDITIONS)
    assert list(problems(out)) == [] and len(read_manifest(out)[1]) == 2


def test_rendered_heads_join_an_import(dataset, tmp_path):
    out = tmp_path / "set"
    command = ["heads", "--source", str(dataset), "--out", str(out), "--resolution", "32", "--condition-people", "1"]
    assert import_data.main(command) == 0
    import_data.import_source(export(write_export(tmp_path / "data", people=1)), out, 32, CONDITIONS)
    header, subjects = read_manifest(out)
    assert header["sources"] == ["heads", "panohead"] and list(problems(out)) == []
    assert [s["split"] for s in subjects[:4]] == ["train", "train", "train", "val"]
    there = read_manifest(dataset)[1]
    assert subjects[3]["views"][8]["label"] == pytest.approx(there[3]["views"][8]["label"])


class Interrupted(eg3d.Export):
    """Ctrl-C while the second person is read."""

    def views(self, group, resolution):
        if group.id.endswith("1"):
            raise KeyboardInterrupt
        return super().views(group, resolution)


def test_an_interrupted_import_continues(tmp_path):
    root, out = write_export(tmp_path / "data"), tmp_path / "set"
    arguments = ("panohead", root, Splits(0, 0), eg3d.Options())
    with pytest.raises(KeyboardInterrupt):
        import_data.import_source(Interrupted(*arguments), out, 32, CONDITIONS)
    first = sorted(out.rglob("subject.json"))
    assert len(first) == 1 and not (out / "manifest.jsonl").exists()
    kept = {path: path.stat().st_mtime_ns for path in first[0].parent.glob("*.png")}
    import_data.import_source(eg3d.Export(*arguments), out, 32, CONDITIONS)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert list(problems(out)) == [] and not list(out.rglob("*.tmp"))


def test_mistakes_in_an_export_are_named(tmp_path):
    root = write_export(tmp_path / "data")
    labels = json.loads((root / "dataset.json").read_text())["labels"]
    (root / "seed0000" / "01.png").unlink()
    labels[3][1] = labels[3][1][:24]
    labels[6][1][16] = 2185.0
    write_json(root / "dataset.json", {"labels": labels})
    source = export(root)
    for group, message in zip(source.groups(), ["cannot be read", "24", "in pixels"], strict=True):
        with pytest.raises(SkippedGroup, match=message):
            source.views(group, 32)
    assert [len(g.place["files"]) for g in export(root, views=2).groups()] == [2, 2, 2]
    singles = [[f"00000/img0000000{k}.png", labels[0][1]] for k in range(3)]
    write_json(root / "dataset.json", {"labels": singles})
    with pytest.raises(DataError, match="one image a person"):
        export(root).groups()
    with pytest.raises(DataError, match="has a single view"):
        export(root, identity="(.+)").groups()
    write_json(root / "dataset.json", {"labels": [1, 2]})
    with pytest.raises(DataError, match='has no "labels"'):
        export(root).groups()
    (root / "dataset.json").unlink()
    with pytest.raises(DataError, match="There is no .*dataset.json"):
        export(root).groups()
