"""Stage commands as processes of their own: Ctrl-C before the loop starts, and a disk that is full."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from .conftest import settings_of

MODULES = ["training", "numpy.linalg", "torch.nn", "training.engine.stage", "PIL.PngImagePlugin"]


def command(dataset, networks, run_dir, *more: str) -> list[str]:
    values = settings_of("reference", dataset, networks, run_dir, *more)
    return ["-m", "training.reference", "--set", *values]


@pytest.mark.parametrize("module", MODULES)
def test_control_c_before_the_loop_is_one_sentence(dataset, networks, tmp_path, repository, module):
    """While something is imported (torch's C++ part would swallow the exception), or while data are read."""
    arguments = ["-X", "importtime", *command(dataset, networks, tmp_path, "loop.steps=1000000")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *arguments], cwd=repository, **pipes)
    try:
        for line in process.stderr:
            if line.rstrip().endswith(f" {module}"):
                break
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate(timeout=300)
    finally:
        process.kill()
    lines = [line for line in "".join(said).splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130 and "Traceback" not in "".join(lines)
    assert any(line.startswith("Interrupted") or "stopped by SIGINT" in line for line in lines), lines


def test_control_c_while_people_are_rendered(tmp_path, repository):
    """The workers are silent, too."""
    arguments = ["--out", str(tmp_path / "set"), "--train", "200", "--test", "0", "--resolution", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "training.render", *arguments], cwd=repository, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.rglob("subject.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and b"Traceback" not in said and b"Interrupted; the same command" in said
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(dataset, networks, tmp_path, repository, on_small_disk):
    whole = command(dataset, networks, tmp_path / "whole", "loop.steps=4")
    assert subprocess.run([sys.executable, *whole], cwd=repository, capture_output=True).returncode == 0
    stopped = shlex.join([sys.executable, *command(dataset, networks, "RUN", "loop.steps=4")])
    stopped = stopped.replace("RUN", "$DISK/run")
    size = sum(file.stat().st_size for file in (tmp_path / "whole/checkpoints").iterdir()) // 1024
    done = on_small_disk(
        int(1.2 * size),
        f"{stopped}; echo STATUS $?; find $DISK -name '*.tmp'; mount -o remount,size=100m tmpfs $DISK; {stopped}; "
        f"echo STATUS $?; cp -r $DISK/run $KEEP",
        KEEP=str(tmp_path / "kept"),
    )
    assert done.stdout.count("STATUS 1\n") == 1 and done.stdout.count("STATUS 0\n") == 1, done
    assert ".tmp" not in done.stdout and "Traceback" not in done.stderr
    assert done.stderr.count("the disk is full; make room, then run it again.") == 1
    checkpoints = [torch.load(tmp_path / name / "checkpoints/step-00000004.pt") for name in ("whole", "kept")]
    for name, value in checkpoints[0]["network"].items():
        assert torch.equal(checkpoints[1]["network"][name], value), name
