"""`python -m diffportrait3d` and the README's lines of Python, as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diffportrait3d.__main__ import chosen_sampling, main, parse_arguments
from diffportrait3d.images import read_image, save_image
from diffportrait3d.pipeline import PRESETS, Pipeline, Sampling


@pytest.fixture(scope="module")
def weights(repository):
    return repository / "weights/miniature"


def test_a_turntable_is_written(weights, tmp_path):
    out, wide = tmp_path / "new" / "views", tmp_path / "wide.png"
    Image.open(weights / "portrait.png").resize((300, 200)).save(wide)
    arguments = [str(wide), "--out", str(out), "--views", "2", "--steps", "1", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "diffportrait3d", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    side = Pipeline.from_folder(weights).resolution
    assert f"view_00.png to view_01.png, {side} px" in done.stdout and "1/1" in done.stderr
    views = [read_image(out / f"view_{number:02d}.png").as_tensor() for number in range(2)]
    assert views[0].shape == (3, side, side) and not torch.equal(*views)
    assert sorted(path.name for path in out.parent.rglob("*")) == ["view_00.png", "view_01.png", "views"]


def test_camera_images_are_used_in_order(weights, tmp_path, capsys):
    portrait = str(weights / "portrait.png")
    for number in range(2):
        (tmp_path / "cameras").mkdir(exist_ok=True)
        save_image(tmp_path / f"cameras/{number}.png", torch.rand(3, 64, 64))
    common = [portrait, "--weights", str(weights), "--steps", "1", "--camera-images", str(tmp_path / "cameras")]
    assert main([*common, "--out", str(tmp_path / "out"), "--views", "2", "--guidance", "1"]) == 0
    assert main([*common, "--out", str(tmp_path / "other"), "--views", "3"]) == 1
    assert "has 2 images for 3 cameras" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", Sampling()),
        ("--preset release", Sampling(50, "ddim", 0.5)),
        ("--preset faster --guidance 2", replace(PRESETS["faster"], guidance=2.0)),
        ("--preset faster --steps 9 --solver ddim", replace(PRESETS["faster"], steps=9, solver="ddim")),
    ],
)
def test_a_preset_with_what_is_said_otherwise(words, expected):
    assert chosen_sampling(parse_arguments(["portrait.png", "--out", "views", *words.split()])) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--weights": "nowhere"}, r"nowhere.unet\.safetensors"),
        ({"--out": "."}, "not an empty folder"),
        ({"--views": "0"}, "at least one view"),
        ({"--pitch": "90"}, "pitch must lie strictly between"),
        ({"--steps": "0"}, "steps must be at least 1, not 0"),
        ({"--camera-images": "nowhere"}, "nowhere"),
        ({"portrait": "missing.png"}, "missing.png is not an image that can be read: it does not exist"),
    ],
)
def test_what_cannot_be_used_is_named(weights, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    options = {"--out": "out", "--weights": str(weights), **change}
    portrait = options.pop("portrait", str(weights / "portrait.png"))
    assert main([portrait, *(word for option in options.items() for word in option)]) == 1
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_lines_of_the_readme(repository, tmp_path):
    (tmp_path / "weights").symlink_to(repository / "weights")
    lines = re.search(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("view_*.png"))) >= 2


def test_importing_the_package_is_cheap():
    code = "import sys, diffportrait3d; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), 'too much'"
    subprocess.run([sys.executable, "-c", code], check=True)
