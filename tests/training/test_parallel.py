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
from accelerate import Accelerator, DistributedType

from diffportrait3d.weights.files import load_network
from training.dataset.images import Batch, DataError
from training.engine.config import load_config
from training.engine.device import prepare
from training.engine.distributed import init, shard
from training.engine.loop import Trainer
from training.miniature import CONFIGS
from training.reference import ReferenceConfig, ReferenceStage

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


def test_two_processes_are_one_with_the_joint_batch(dataset, networks, tmp_path):
    """Three samples over two processes: two and one. The dead layers behind F_ref's last tokens get no gradient."""
    more = ["loop.accumulate=2", "loop.checkpointing=true"]
    command = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", str(SCRIPT), "reference"]
    launch([*command, json.dumps(settings(dataset, networks, tmp_path, *more))])
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

    # One process goes on with the checkpoint of both.
    saved = torch.load(tmp_path / "checkpoints/step-00000001.pt", weights_only=True)
    config = load_config(ReferenceConfig, None, settings(dataset, networks, tmp_path, *more))
    device = prepare(config.loop)
    trainer = Trainer(ReferenceStage.build(config, device), config, init(device))
    assert trainer.resume() and trainer.step == 1
    own = trainer.stage.trainable.state_dict()
    assert all(torch.equal(own[k], v) for k, v in saved["network"].items())
    trainer.one_step(0.0)


def test_the_launcher_with_the_presets_file(dataset, networks, tmp_path):
    """The documented command, with two processes in place of six GPUs."""
    preset = CONFIGS / "paper_6xa100"
    values = settings(dataset, networks, tmp_path, "loop.steps=1", "ddim_steps=2", "validation_subjects=2")
    stage = ["training.reference", "--config", str(preset / "reference.yaml"), "--set", *values]
    launch(
        ["accelerate.commands.launch", "--config_file", str(preset / "ddp.yaml"), "--num_processes", "2", "-m", *stage]
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["samples"], summary["processes"]) == (1, 3, 2)
    assert load_network(tmp_path / "reference_encoder.safetensors")


def test_batches_are_shared_out_whole():
    import numpy as np

    batch = Batch(np.arange(10).reshape(5, 2), np.arange(5), np.zeros(5, bool))
    parts = [batch.part(rank, 2) for rank in range(2)]
    assert [len(p.flips) for p in parts] == [3, 2]
    assert np.concatenate([p.targets for p in parts]).tolist() == batch.targets.tolist()
    with pytest.raises(DataError, match="batch_size=5 cannot be divided among 6"):
        batch.part(0, 6)
    part, weight = shard(batch, init(torch.device("cpu")))
    assert part.targets.tolist() == batch.targets.tolist() and weight == 1.0


def test_other_kinds_of_parallel_training_are_rejected(monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="FSDP is not supported, only DDP: see .*ddp.yaml"):
        init(torch.device("cpu"))
