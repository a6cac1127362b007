"""Each stage's one-step update against the same step written out: loss, clipped gradients, AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from diffportrait3d.networks import CrossViewAttention
from training.dataset.images import pick, pick_labels, pick_latents

from .conftest import trainer_of

LR, DECAY, CLIP, EPSILON = 4e-4, 1e-2, 1.0, 1e-8


def noised(stage, batch, t, noise):
    z = pick_latents(stage.latents, batch.targets.ravel(), batch.target_flips)
    betas = torch.linspace(0.00085**0.5, 0.005**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[t].float()[:, None, None, None]
    return abar.sqrt() * z + (1 - abar).sqrt() * noise


def by_hand(stage, networks, batch, views):
    """Paper eq. 1 with the inputs of the stage; draws t and noise as the stage does."""
    count = len(batch.flips)
    t = torch.randint(0, 1000, (count,)).repeat_interleave(views)
    noise = torch.randn(count * views, 4, 8, 8)
    x, nothing = noised(stage, batch, t, noise), torch.zeros(count * views, 1, 32)
    if stage.name == "base":
        return F.mse_loss(networks["unet"](x, t, nothing), noise)
    z_ref = pick_latents(stage.latents, batch.references, batch.flips)
    bank = networks["reference_encoder"](z_ref, t[::views], nothing[:count])
    residuals = None
    if stage.name != "reference":
        residuals = networks["view_controlnet"](x, stage.camera_images(batch, stage.data), t, nothing)
    attention = networks.get("view_consistency")
    eps = networks["unet"](x, t, nothing, bank, residuals, attention, views if attention else None)
    return F.mse_loss(eps, noise)


@pytest.mark.parametrize(
    ("name", "kind", "views"),
    [("base", "unet", 1), ("reference", "reference_encoder", 1), ("view_control", "view_controlnet", 1),
     ("view_consistency", "view_consistency", 4)],
)  # fmt: skip
def test_denoising_stages(name, kind, views, dataset, networks, tmp_path):
    trainer = trainer_of(name, dataset, networks, tmp_path, "loop.precision=float32")
    stage = trainer.stage
    if isinstance(stage.trainable, CrossViewAttention):  # its first gradients would be those of its output layers alone
        for p in stage.trainable.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
    alone = {k: copy.deepcopy(m) for k, m in {**stage.frozen, kind: stage.trainable}.items()}
    batch = next(copy.deepcopy(stage.sampler))
    check(trainer, alone[kind], lambda: by_hand(stage, alone, batch, views))


def test_novel_view_stage(dataset, networks, tmp_path):
    trainer = trainer_of("novel_view", dataset, networks, tmp_path, "loop.precision=float32")
    stage, alone = trainer.stage, copy.deepcopy(trainer.stage.trainable)
    batch = next(copy.deepcopy(stage.sampler))

    def loss():
        source, target = (pick(stage.data.images, rows, batch.flips) for rows in (batch.references, batch.targets))
        labels = [pick_labels(stage.data.labels, rows, batch.flips) for rows in (batch.references, batch.targets)]
        output, perceptual = alone(source, *labels), []
        for a, b in zip(stage.features(output), stage.features(target), strict=True):
            a, b = (x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt() for x in (a, b))
            perceptual.append((a - b).square().sum(1).mean())
        return (output - target).square().mean() + 0.05 * sum(perceptual) / len(perceptual)

    check(trainer, alone, loss)


def check(trainer, alone, loss):
    frozen = {name: copy.deepcopy(m.state_dict()) for name, m in trainer.stage.frozen.items()}
    torch.manual_seed(5)
    trainer.one_step(0.0)
    values = trainer.read()
    torch.manual_seed(5)
    expected = loss()
    assert values["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)

    names, parameters = zip(*alone.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert values["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    scale = min(1.0, CLIP / (float(norm) + 1e-6))
    after = dict(trainer.stage.trainable.named_parameters())
    for name, p, gradient in zip(names, parameters, gradients, strict=True):
        got = after[name]
        assert (got.grad is None) == (gradient is None), name
        if gradient is None:
            assert torch.equal(got, p), name
            continue
        g = gradient * scale
        assert torch.allclose(got.grad, g, rtol=1e-3, atol=1e-5 * float(norm) * scale), name
        # AdamW after one step: the averages, freed of their bias, are the gradient and its square.
        want = p * (1 - LR * DECAY) - LR * got.grad / (got.grad.abs() + EPSILON)
        assert torch.allclose(got, want, atol=1e-6), name
    for name, module in trainer.stage.frozen.items():
        assert all(torch.equal(v, frozen[name][k]) for k, v in module.state_dict().items()), name
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
