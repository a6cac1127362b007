"""The whole recipe within a given time, killed at random moments and continued."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffportrait3d.networks import CrossViewAttention, NovelViewConfig, NovelViewModel, UNetConfig
from diffportrait3d.weights.files import load_network, save_network
from training import miniature
from training.engine.background import Background
from training.engine.budget import Budget, BudgetConfig

from .conftest import TINY_UNET

MINUTES = 0.4
KILLS = 5
QUICK = ["loop.checkpoint_every=10", "loop.validate_every=1000000", "loop.log_every=10", "loop.threads=1"]


def renderers(data: Path) -> list[int]:
    """Processes that render into a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"training.render" in words and str(data).encode() in words:
            found.append(int(entry.parent.name))
    return found


def gone(data: Path, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while renderers(data) and time.monotonic() < end:
        time.sleep(0.1)
    return not renderers(data)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_run_in_minutes_survives_being_killed(tmp_path):
    """Killed at five random moments, it still ends with six networks and a page, and keeps what was finished."""
    out, weights, draw = tmp_path / "run", tmp_path / "weights", random.Random(0)
    command = [sys.executable, "-m", "training.miniature", "--preset", "smoke", "--minutes", str(MINUTES),
               "--out", str(out), "--export", "--weights", str(weights), "--set", *QUICK]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished: dict[Path, int] = {}
    for _ in range(KILLS):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
        )
        for line in process.stdout:
            if ": device" in line or "data:" in line:  # its first sign of work
                break
        time.sleep(draw.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert gone(out / "data")
        for path, written in finished.items():
            assert path.stat().st_mtime_ns == written, f"{path.name} was trained again"
        summaries = [out / stage.name / "summary.json" for stage in miniature.STAGES]
        finished = {path: path.stat().st_mtime_ns for path in summaries if path.is_file()}
    done = subprocess.run(command, capture_output=True, env=environment, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "report.html" in done.stdout and "TFLOP/s" in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert [summary["stage"] for summary in report] == [stage.name for stage in miniature.STAGES]
    assert sum(summary["minutes"] for summary in report) < MINUTES + 6 / 60  # a stage has a second at least
    page = (out / "report.html").read_text()
    for stage in miniature.STAGES:
        assert f'src="{stage.name}/validation/' in page
        load_network(weights / f"{stage.kind}.safetensors", stage.kind)
    assert gone(out / "data", 0)
    assert re.search(r"0.4 minutes were given, [\d.]+ taken", done.stdout)


def test_a_run_in_minutes_goes_on_from_networks(dataset, networks, tmp_path, capsys):
    """Every network is trained on from its file, but for the encoder, whose latents all others know; the page has what
    was planned beside what was taken."""
    config, start, out = UNetConfig.from_dict(TINY_UNET), tmp_path / "start", tmp_path / "run"
    fresh = {
        "view_consistency": CrossViewAttention(config),
        "novel_view": NovelViewModel(NovelViewConfig(64, render_size=16, base_channels=16, volume_size=8)),
    }
    for kind, network in fresh.items():
        save_network(start / f"{kind}.safetensors", network, kind)
    for kind, file in networks.items():
        shutil.copy(file, start / f"{kind}.safetensors")
    arguments = ["--preset", "smoke", "--minutes", "0.2", "--out", str(out), "--data", str(dataset), "--start",
                 str(start), "--set", *QUICK, "optimizer.ema=null"]  # fmt: skip
    assert miniature.main(arguments) == 0
    report, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    shares = [summary["planned_minutes"] for summary in report]
    assert shares == pytest.approx([(0.2 - 6 * 1.5 / 60) / 6] * 6, abs=1e-3)
    assert re.search(r"beside training +0.1 .*\ntotal +0.2 ", capsys.readouterr().out) and "planned" in page
    for stage, summary in zip(miniature.STAGES, report, strict=True):
        before, after = (load_network(folder / f"{stage.kind}.safetensors")[0].state_dict()
                         for folder in (start, out / stage.name))  # fmt: skip
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert moved and summary["steps"] > 0, stage.name
        if stage.name == "autoencoder":
            assert not [name for name in moved if name.startswith(("encoder.", "quant_conv."))]
        change = sum((after[name] - before[name]).square().sum() for name in moved)
        assert change < 0.1 * sum(before[name].square().sum() for name in moved), stage.name


def test_data_that_are_complete_are_not_rendered_again(dataset, tmp_path):
    """Those of others as well; what an interrupted renderer has left is continued."""
    assert miniature.is_complete(dataset) and not miniature.is_complete(tmp_path)
    header, *subjects = (dataset / "manifest.jsonl").read_text().splitlines()
    started = json.dumps({**json.loads(header), "complete": False})
    (tmp_path / "manifest.jsonl").write_text("\n".join([started, *subjects]))
    assert not miniature.is_complete(tmp_path)


def config(**changes) -> BudgetConfig:
    return BudgetConfig(**{"shares": {"first": 1.0, "second": 3.0}, "around": 6.0, "first_people": 1} | changes)


def test_time_is_divided_by_the_shares_of_what_is_left(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("training.engine.budget.time.monotonic", lambda: clock[0])
    budget = Budget(tmp_path, 2.0, config())
    assert 60 * budget.training_minutes("first", tmp_path / "first") == pytest.approx((120 - 1.5 * 6) / 4)
    clock[0] += 50  # it took longer than it should
    assert 60 * budget.training_minutes("second", tmp_path / "second") == pytest.approx(70 - 0.5 * 6)
    clock[0] += 1000
    assert 60 * budget.training_minutes("second", tmp_path / "second") == pytest.approx(1)  # but every stage is trained


def test_time_goes_on_after_an_interruption(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("training.engine.budget.time.monotonic", lambda: clock[0])
    budget = Budget(tmp_path, 2.0, config())
    clock[0] += 30
    budget.note(20)  # 20 seconds of them in the first stage
    (tmp_path / "first").mkdir()
    (tmp_path / "first/summary.json").write_text(json.dumps({"minutes": 20 / 60}))
    clock[0] = 7.0  # another process
    assert Budget(tmp_path, 2.0, config()).left() == pytest.approx(90)
    with pytest.raises(ValueError, match="--minutes 2; continue it with these"):
        Budget(tmp_path, 3.0, config())


def test_a_preset_without_shares_is_named(tmp_path, capsys):
    assert miniature.main(["--preset", "cpu", "--minutes", "5", "--out", str(tmp_path)]) == 1
    assert "Preset 'cpu' has no minutes.yaml" in capsys.readouterr().err


def test_a_failing_renderer_is_named(tmp_path):
    with Background("training.render", ["--out", str(tmp_path / "set"), "--views", "0"], tmp_path / "log") as process:
        process.process.wait()
        with pytest.raises(ValueError, match="failed with status 2; its message is in '.*log'"):
            process.running()
    assert "--views 0 must be at least 1" in (tmp_path / "log").read_text()
