"""The checks for a GPU, on the CPU: each passes here, and finds what is wrong."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation import gpu_check
from evaluation.gpu_check import REFERENCE, SETUPS, Checks


@pytest.fixture(scope="module")
def checks(host, pack, tmp_path_factory) -> Checks:
    out = tmp_path_factory.mktemp("gpu_check")
    made = Checks(host, pack, argparse.Namespace(views=2, steps=1, out=out, setup="default"))
    assert made.run("reference") == {"passed": True, "views": [2, 256, 256, 3]}
    return made


def test_the_turntable_is_compared_view_by_view(checks):
    found = checks.run("turntable same")
    assert found["passed"] and found["worst view, dB"] > 60
    assert (checks.options.out / "default.png").is_file()
    path = checks.options.out / REFERENCE
    wanted = load_file(path)["views"]
    spoiled = wanted.clone()
    spoiled[1] = 1 - spoiled[1]
    save_file({"views": spoiled}, path)
    assert not checks.run("turntable")["passed"]
    save_file({"views": wanted}, path)


def test_equal_runs_are_equal_to_the_bit(checks):
    assert checks.run("twice") == {"passed": True, "equal": True}


def test_view_attention_of_the_largest_images(checks):
    assert checks.run("2048 px")["passed"]


def test_every_node_class_runs(checks):
    found = checks.run("all nodes")
    assert found["passed"] and found["images"] > 10, found


def test_a_golden_number_outside_its_tolerance_is_named():
    expected = {"eps_base": torch.zeros(2), "eps_ref": torch.zeros(2)}
    found = gpu_check._golden({"eps_base": torch.zeros(2), "eps_ref": torch.tensor([0.0, 1e-3])}, expected)
    assert not found["passed"] and found["worst"] == "eps_ref" and found["of tolerance"] == pytest.approx(20)


def test_every_setup_is_a_process_and_a_line(tmp_path, monkeypatch, capsys):
    """Also one that does not come up: the others go on, and the command says so."""
    monkeypatch.setattr(gpu_check, "SETUPS", {"cpu": ([], []), "wrong": (["--no-such-option"], ["turntable"])})
    monkeypatch.setattr(gpu_check.sys, "executable", "false")
    assert gpu_check.main(["--cpu", "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "gpu_check.json").read_text())["results"]
    assert [result["setup"] for result in results] == ["cpu", "wrong"]
    assert "all checks run" in capsys.readouterr().out


def test_every_check_exists():
    assert {name for _, names in SETUPS.values() for name in names} == set(gpu_check.CHECKS)


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])
    assert "--cpu runs the checks on the CPU" in capsys.readouterr().err
