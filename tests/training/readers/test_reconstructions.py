"""Importing data sets for 3D reconstruction: what Export Views writes, and what nerfstudio and COLMAP write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.export import export_views
from diffportrait3d.cameras.labels import trajectory
from training import import_data
from training.check_data import problems
from training.dataset.images import read_manifest
from training.sources import eg3d
from training.sources.reader import Splits

SIDE, VIEWS = 40, 3


def write_sets(root: Path, people: int = 2) -> dict[str, torch.Tensor]:
    """One folder per person as Export Views writes it; the cameras [3, 25] of each."""
    labels = {}
    for person in range(people):
        name = f"person_{person}"
        labels[name] = trajectory("arc", VIEWS, (-30, 30), (5.0 * person, 5.0 * person), roll=4.0)
        images = torch.rand(VIEWS, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(person))
        export_views(root / name, images, labels[name])
    return labels


def run(root: Path, out: Path, *options: str) -> int:
    command = ["eg3d", "--source", str(root), "--out", str(out), "--resolution", str(SIDE), "--condition-people", "1"]
    return import_data.main([*command, "--val-share", "0", "--test-share", "0", *options])


@pytest.mark.parametrize("form", ["transforms.json", "colmap", "colmap in sparse"])
def test_our_export_is_imported(tmp_path, form):
    """A folder of data sets, one person each: images and cameras as they were exported."""
    root, out = tmp_path / "sets", tmp_path / "out"
    labels = write_sets(root)
    for folder in root.iterdir():
        if form != "transforms.json":
            (folder / "transforms.json").unlink()
        if form == "colmap in sparse":
            for path in (folder / "sparse/0").iterdir():
                path.rename(folder / "sparse" / path.name)
    assert run(root, out) == 0
    _, subjects = read_manifest(out)
    assert [subject["person"] for subject in subjects] == ["eg3d-person_0", "eg3d-person_1"]
    for subject, (person, cameras) in zip(subjects, labels.items(), strict=True):
        for view, label in zip(subject["views"], cameras, strict=True):
            assert view["label"] == pytest.approx(label.tolist(), abs=1e-6)
            assert view["camera"].startswith(f"{person}/images/view_00")
            assert np.array_equal(Image.open(out / view["image"]), Image.open(root / view["camera"]))
    assert list(problems(out)) == []


def test_one_data_set_is_one_person(tmp_path):
    """The folder itself; a name without a suffix is looked for; --identity may say who is who."""
    write_sets(tmp_path, people=1)
    path = tmp_path / "person_0/transforms.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        frame["file_path"] = frame["file_path"].removesuffix(".png")
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    assert run(tmp_path / "person_0", tmp_path / "out") == 0
    _, [subject] = read_manifest(tmp_path / "out")
    assert subject["person"] == "eg3d-person_0" and len(subject["views"]) == VIEWS
    assert run(tmp_path / "person_0", tmp_path / "other", "--identity", "images/(view)_.*") == 0
    _, [subject] = read_manifest(tmp_path / "other")
    assert subject["person"] == "eg3d-view"


def damage(content: dict) -> None:
    content["frames"][1]["transform_matrix"] = None


def distort(content: dict) -> None:
    content.update(camera_model="OPENCV", k1=0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(damage, "frame 1 .*transform_matrix is null"), (distort, "has k1 = 0.1; undistort the images first")],
)
def test_a_set_that_cannot_be_used_is_left_out(tmp_path, capsys, change, reason):
    write_sets(tmp_path / "sets")
    path = tmp_path / "sets/person_0/transforms.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert run(tmp_path / "sets", tmp_path / "out") == 0
    _, [subject] = read_manifest(tmp_path / "out")
    assert subject["person"] == "eg3d-person_1"
    source = eg3d.Export("eg3d", tmp_path / "sets", Splits(0.0, 0.0), eg3d.Options())
    assert len(source.groups()) == 1
    assert list(source.left_out) == ["person_0"] and re.search(reason, source.left_out["person_0"])
    with pytest.raises(SystemExit):
        run(tmp_path / "sets/person_0", tmp_path / "alone")
    assert "person_0" in capsys.readouterr().err


def test_binary_models_and_empty_folders_say_what_to_do(tmp_path, capsys):
    write_sets(tmp_path, people=1)
    (tmp_path / "person_0/transforms.json").unlink()
    for path in (tmp_path / "person_0/sparse/0").glob("*.txt"):
        path.unlink()
    with pytest.raises(SystemExit):
        run(tmp_path / "person_0", tmp_path / "out")
    assert "colmap model_converter" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        run(tmp_path / "empty", tmp_path / "out")
    assert "There is no dataset.json with camera labels" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_dataset_json_with_a_byte_order_mark_and_wrapped_labels(tmp_path, encoding):
    labels = write_sets(tmp_path / "sets")
    rows = {
        f"{person}/images/view_{view:03d}.png": [label.tolist()]
        for person, cameras in labels.items()
        for view, label in enumerate(cameras)
    }
    (tmp_path / "sets/dataset.json").write_text(json.dumps({"labels": rows}), encoding=encoding)
    assert run(tmp_path / "sets", tmp_path / "out") == 0
    _, subjects = read_manifest(tmp_path / "out")
    assert [view["label"] for subject in subjects for view in subject["views"]] == [row for [row] in rows.values()]
