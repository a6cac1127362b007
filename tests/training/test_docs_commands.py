"""Every command in every page exists and takes the arguments that are written there; those that are quick are run.

`RUN` prepares a folder for each of the latter; tests/data/docs_parsed_only.txt lists all others with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib
import torch
from PIL import Image
from safetensors.torch import save_file

from diffportrait3d.cameras.labels import orbit_camera
from diffportrait3d.conversion.layout import BASE
from diffportrait3d.networks import NovelViewConfig, NovelViewModel, UNetConfig
from diffportrait3d.weights.files import save_network
from evaluation.full_size_rehearsal import build
from evaluation.goldens.narrow_files import write_networks
from evaluation.metrics.pose import PoseRegressor, save_pose_regressor
from training import render

from .conftest import write_dataset

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```(?:sh|bash)?\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:python -m|make) [^`]+)`")
COMMAND = re.compile(r"^(python -m|make|pip|accelerate)\b")
PARSED_ONLY = ROOT / "tests/data/docs_parsed_only.txt"


class Parsed(Exception):
    """The command took its arguments; it need not run."""


def commands(text: str) -> list[str]:
    """Commands of the blocks and of the running text; optional arguments in [brackets] count as given."""
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [*lines, *(" ".join(inline.split()) for inline in INLINE.findall(text))]
    found = [line.split(" # ")[0].split("    #")[0].strip() for line in found]
    found = [re.sub(r"(?<=\s)\[(--[^\]]+)\]", r"\1", line) for line in found if COMMAND.match(line)]
    return [" ".join(line.split()) for line in found]


CASES = [
    pytest.param(c, id=f"{page.name}: {c[:70]}") for page in PAGES for c in dict.fromkeys(commands(page.read_text()))
]


def check_module(words: list[str], monkeypatch) -> None:
    """Give the words to the command's own parser."""
    original = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    name, *arguments = words
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # some tests have imported the module before
        runpy.run_module(name, run_name="__main__", alter_sys=False)


def check_make(line: str, monkeypatch) -> None:
    """Expand the target, and check the command that it runs."""
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expanded in done.stdout.splitlines():
        words = shlex.split(expanded)
        if words[1:2] == ["-m"] and (ROOT / words[2].split(".")[0]).is_dir():  # of this repository
            check_module(words[2:], monkeypatch)


@pytest.mark.parametrize("line", CASES)
def test_command_takes_what_is_written(line, monkeypatch):
    words = shlex.split(line)
    if words[0] == "make":
        check_make(line, monkeypatch)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\.\[([\w,]+)\]", line)
        assert all(extra in extras for names in named for extra in names.split(","))
    else:  # python -m MODULE ..., accelerate launch ... -m MODULE ...
        words = words[words.index("-m") + 1 :]
        if words[1:] not in (["..."], []):
            check_module(words, monkeypatch)
        assert importlib.util.find_spec(words[0])


# ---- those that are run ----


def write_release(folder: Path) -> Path:
    """The authors' checkpoint and SD1.5's, narrow, where the command has them; the pack's folder inside a ComfyUI."""
    models, pack = folder / "ComfyUI/models/checkpoints", folder / "ComfyUI/custom_nodes/pack"
    models.mkdir(parents=True)
    (pack / "PATH").mkdir(parents=True)
    release = pack / "PATH/model_state-540000-001.th"
    build(release, UNetConfig(model_channels=32, context_dim=32), torch.float16)
    tensors = torch.load(release, weights_only=True)["state_dict"]
    base = {name: tensor for name, tensor in tensors.items() if any(part.owns(name) for part in BASE)}
    save_file(base, models / "v1-5-pruned-emaonly.safetensors")
    return pack


def write_export(folder: Path) -> Path:
    """Two views of one person with EG3D's labels."""
    labels = orbit_camera([-20.0, 20.0], 0.0).tolist()
    names = ["seed0001/00.png", "seed0001/01.png"]
    (folder / "DIR/seed0001").mkdir(parents=True)
    for shade, name in enumerate(names):
        Image.linear_gradient("L").rotate(90 * shade).save(folder / "DIR" / name)
    (folder / "DIR/dataset.json").write_text(json.dumps({"labels": list(zip(names, labels, strict=True))}))
    return folder


def write_heads(folder: Path) -> Path:
    """Two views each of a person in train and one in val."""
    manifest = write_dataset(folder / "DIR", ("train", "val")) / "manifest.jsonl"
    header, *people = manifest.read_text().splitlines()
    few = [json.dumps(person | {"views": person["views"][:2]}) for person in map(json.loads, people)]
    manifest.write_text("\n".join([header, *few]))
    return folder


def write_checked(folder: Path) -> Path:
    return write_dataset(folder / "DATA").parent


def write_study(folder: Path) -> Path:
    """Narrow networks where --weights has its default, and a person, 64 px."""
    weights = folder / "weights/miniature"
    write_networks(weights, image_size=64)
    sizes = {"base_channels": 8, "feature_channels": 6, "volume_size": 8, "volume_channels": 4, "prior_channels": 2}
    novel_view = NovelViewModel(NovelViewConfig(image_size=64, render_size=16, samples_per_ray=8, **sizes))
    save_network(weights / "novel_view.safetensors", novel_view, "novel_view")
    save_pose_regressor(weights / "pose_regressor.safetensors", PoseRegressor(8))
    settings, counts = render.dataset_settings(64, 7, 30.0, 10.0, 0.0, 1, seed=0), {"train": 0, "val": 0, "test": 1}
    return render.render_dataset(folder / "DIR", settings, counts, None, workers=1).parents[1]


# Command -> what prepares a folder, and returns where in it the command is run; a file that the command then has made.
RUN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "python -m diffportrait3d.convert PATH/model_state-540000-001.th --out ../../models/diffportrait3d "
    "--base ../../models/checkpoints/v1-5-pruned-emaonly.safetensors --dtype fp16": (
        write_release, "../../models/diffportrait3d/view_consistency.safetensors",
    ),
    "python -m training.import_data eg3d --source DIR --out DATA": (write_export, "DATA/manifest.jsonl"),
    "python -m training.import_data heads --source DIR --out DATA": (write_heads, "DATA/manifest.jsonl"),
    "python -m training.check_data DATA": (write_checked, "DATA/manifest.jsonl"),
    "python -m evaluation.ablations --data DIR --workers 4 --arms full untrained_reference random_noise": (
        write_study, "runs/ablations.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", RUN, ids=lambda line: line[10:50])
def test_command_runs_as_written(line, tmp_path):
    prepare, made = RUN[line]
    folder = prepare(tmp_path)
    words = [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / made).is_file()


def test_every_command_is_run_or_says_why_not():
    lines = PARSED_ONLY.read_text(encoding="utf-8").splitlines()
    listed = [*RUN, *(line for line in lines if not line.startswith("#"))]
    assert sorted(listed) == sorted({case.values[0] for case in CASES})


def test_pages_are_read():
    assert len(CASES) > 40


@pytest.mark.parametrize(
    "line", ["python -m training.render --out DIR --no-such-option", "make demo ARGS=--no-such-option"]
)
def test_unknown_argument_is_found(line, monkeypatch):
    with pytest.raises(SystemExit):
        test_command_takes_what_is_written(line, monkeypatch)
