"""Run by the tests in two processes: one step of a stage, its gradients and weights saved. Not a test itself."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from training.engine.config import load_config
from training.engine.device import prepare
from training.engine.distributed import init
from training.engine.loop import Trainer
from training.miniature import STAGES


def seeded_noise(stage, batch):
    """The stage's loss with noise that depends on the targets alone, however a batch is cut."""
    rows = batch.targets.reshape(len(batch.flips), -1)
    shape = stage.latents.shape[2:]
    noise, t = [], []
    for row in rows:
        generator = torch.Generator().manual_seed(int(row[0]))
        t += [int(torch.randint(0, 1000, (), generator=generator))] * len(row)
        noise.append(torch.randn(len(row), *shape, generator=generator))
    return {"loss": stage.noise_loss(batch, stage.data, stage.latents, torch.tensor(t), torch.cat(noise))}


def one_step(stage_name: str, settings: list[str]) -> dict[str, torch.Tensor]:
    """Gradients of the first step (as clipped) and the weights after it."""
    stage_class = next(stage for stage in STAGES if stage.name == stage_name)
    config = load_config(stage_class.config_class, None, settings)
    device = prepare(config.loop)
    accelerator = init(device)
    with accelerator.main_process_first():
        stage = stage_class.build(config, device)
    stage.inputs = lambda batch, variant: {"batch": batch}
    stage.loss = lambda inputs, variant: seeded_noise(stage, inputs["batch"])
    trainer = Trainer(stage, config, accelerator)
    trainer.one_step(0.0)
    parameters = dict(stage.trainable.named_parameters())
    out = {f"grad.{k}": p.grad.clone() for k, p in parameters.items() if p.grad is not None}
    out |= {f"weight.{k}": p.detach().clone() for k, p in parameters.items()}
    out["loss"] = torch.tensor(trainer.read()["loss"])
    trainer.save()
    assert trainer.resume()
    if accelerator.is_main_process:
        torch.save(out, Path(config.run_dir) / "step.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_step(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # threads of the communication may hold a finished process for minutes
