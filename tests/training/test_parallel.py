"""Two processes take the step that one takes on the joint batch."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffportrait3d.weights.files import load_network
from training.dataset.images import Batch, DataError
from training.engine.device import prepare
from training.engine.distributed import Processes
from training.engine.loop import Trainer
from training.miniature import CONFIGS

from .conftest import stage_config

SCRIPT = Path(__file__).parent / "processes.py"
one_step = runpy.run_path(str(SCRIPT))["one_step"]


def settings(dataset, networks, run_dir, *more):
    values = [f"run_dir={run_dir}", f"data.root={dataset}", f"latents_dir={run_dir}", "loop.device=cpu",
              "loop.precision=float32", "loop.batch_size=3", "optimizer.warmup_steps=0",
              "optimizer.ema=0.9"]  # fmt: skip
    return [*values, *(f"inputs.{kind}={networks[kind]}" for kind in ("autoencoder", "unet")), *more]


def launch(command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def in_two_processes(script, sharded):
    command = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", *script]
    launch(command, ACCELERATE_USE_FSDP=str(sharded).lower())


@pytest.mark.parametrize(
    ("sharded", "more"),
    [(False, ["loop.accumulate=2", "loop.checkpointing=true"]), (True, [])],
    ids=["ddp", "fsdp"],
)
def test_two_processes_are_one_with_the_joint_batch(sharded, more, dataset, networks, tmp_path):
    """Three samples over two processes: two and one. The dead layers behind F_ref's last tokens get no gradient."""
    in_two_processes([str(SCRIPT), "reference", json.dumps(settings(dataset, networks, tmp_path, *more))], sharded)
    got = torch.load(tmp_path / "step.pt")
    want = one_step("reference", settings(dataset, networks, tmp_path / "alone", *more))
    assert got.keys() == want.keys()
    largest = max(value.abs().max() for name, value in want.items() if name.startswith("grad."))
    for name, value in want.items():
        if not name.startswith("weight."):
            assert torch.allclose(got[name], value, rtol=1e-3, atol=1e-5 * largest), name
    # AdamW's first step is the gradient's sign: where that is nearly zero, it may differ.
    moved = torch.cat([(got[k] - want[k]).abs().flatten() for k in want if k.startswith("weight.")])
    assert moved.mean() < 1e-6

    # One process goes on with the checkpoint of both, sharded or not.
    saved = torch.load(tmp_path / "checkpoints/step-00000001.pt", weights_only=True)
    stage, config = stage_config("reference", dataset, networks, tmp_path, "optimizer.ema=0.9")
    device = prepare(config.loop)
    trainer = Trainer(stage.build(config, device), config, device)
    assert trainer.resume() and trainer.step == 1
    own = trainer.stage.trainable.state_dict()
    assert all(torch.equal(own[k], v) for k, v in saved["network"].items())
    trainer.started = 0.0
    trainer.one_step()


@pytest.mark.parametrize("file", ["ddp.yaml", "fsdp.yaml"])
def test_the_launcher_with_the_presets_file(file, dataset, networks, tmp_path):
    """The documented command, with two processes in place of six GPUs."""
    preset = CONFIGS / "paper_6xa100"
    values = settings(dataset, networks, tmp_path, "loop.steps=1", "ddim_steps=2", "validation_subjects=2")
    stage = ["training.reference", "--config", str(preset / "reference.yaml"), "--set", *values]
    launch(["accelerate.commands.launch", "--config_file", str(preset / file), "--num_processes", "2", "-m", *stage])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["samples"], summary["processes"]) == (1, 3, 2)
    assert load_network(tmp_path / "reference_encoder.safetensors")


def test_a_sharded_run_ends_with_a_picture_and_the_averaged_network(dataset, networks, tmp_path):
    """The command itself, to its end: validation and saving need weights that no process has whole."""
    values = settings(dataset, networks, tmp_path, "loop.steps=2", "ddim_steps=2", "validation_subjects=2")
    in_two_processes(["-m", "training.reference", "--set", *values], sharded=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["samples"], summary["processes"]) == (2, 6, 2)
    assert (tmp_path / "validation/step-00000002.png").is_file()
    trained = load_network(tmp_path / "reference_encoder.safetensors")[0].state_dict()
    saved = torch.load(tmp_path / "checkpoints/step-00000002.pt", weights_only=True)
    assert all(torch.equal(trained[k], v) for k, v in saved["average"]["shadow"].items())
    assert not all(torch.equal(trained[k], v) for k, v in saved["network"].items())


def test_batches_are_shared_out_whole():
    import numpy as np

    batch = Batch(np.arange(10).reshape(5, 2), np.arange(5), np.zeros(5, bool))
    parts = [batch.part(rank, 2) for rank in range(2)]
    assert [len(p.flips) for p in parts] == [3, 2]
    assert np.concatenate([p.targets for p in parts]).tolist() == batch.targets.tolist()
    with pytest.raises(DataError, match="batch_size=5 cannot be shared out over 6"):
        batch.part(0, 6)
    part, weight = Processes(torch.device("cpu")).share(batch)
    assert part is batch and weight == 1.0
