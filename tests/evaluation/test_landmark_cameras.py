"""Landmarks' cameras on two rendered people, and what is said without dlib or without the ICT model."""

from __future__ import annotations

import importlib.util
import re

import pytest

from evaluation import landmark_cameras
from training import render


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    root = tmp_path_factory.mktemp("heads")
    settings = render.dataset_settings(96, 2, 30, 10, 0.0, 2, 0)
    render.render_dataset(root, settings, {"train": 0, "val": 0, "test": 2}, None, workers=1)
    return root


def test_table(heads, capsys, monkeypatch):
    assert landmark_cameras.main(["--data", str(heads), str(heads), "--views", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("4 people, 8 views") and "dlib's five, found, all" in text
    rows = {row[0]: [float(cell.strip("%") or "nan") for cell in row[1:]] for row in re.findall(
        r"^\| (.*?) +\| (\d+) +\| (\d+%) +\| ([\d.]+) +\| ([\d.]+) +\| ([\d.]+)", text, re.MULTILINE)}  # fmt: skip
    ours, five, front = rows["68 landmarks, all"], rows["five points, all"], rows["nothing: from the front, all"]
    assert ours[:2] == [8, 100] and ours[2] < 3 and five[2] < 4 < front[2]
    eg3d, rendered = (float(re.search(rf"{name} ([\d.]+)%", text)[1]) for name in ("EG3D", "rendered heads"))
    assert eg3d < 2 < rendered
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dlib" else find(name))
    assert landmark_cameras.main(["--data", str(heads), "--views", "1"]) == 0
    text = capsys.readouterr().out
    assert "pip install dlib-bin" in text and "dlib's five" not in text


def test_people_of_another_model(heads):
    line = {"seed": 1, "provider": "ict", "views": []}
    with pytest.raises(ValueError, match="rendered with the ICT model; give its file by --ict"):
        landmark_cameras.measure(heads, line, 1, None, None)
