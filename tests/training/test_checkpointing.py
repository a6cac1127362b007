"""Gradient checkpointing changes neither outputs nor gradients, and keeps less."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.denoiser import Denoiser
from diffportrait3d.networks import (
    CrossViewAttention,
    NovelViewConfig,
    NovelViewModel,
    ReferenceEncoder,
    UNet,
    UNetConfig,
    ViewControlNet,
    set_checkpointing,
)

from .conftest import TINY_UNET, label


@pytest.fixture(scope="module")
def denoiser():
    config = UNetConfig.from_dict(TINY_UNET)
    torch.manual_seed(0)
    networks = Denoiser(UNet(config), ReferenceEncoder(config), ViewControlNet(config), CrossViewAttention(config))
    for p in networks.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return networks


def step(network, loss, trained):
    """Loss, gradients of the trained part, and bytes kept for the backward pass."""
    network.zero_grad(set_to_none=True)
    network.requires_grad_(False)
    trained.requires_grad_(True)
    own, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}, kept


def compare(network, loss, trained):
    set_checkpointing(network, False)
    value, gradients, kept = step(network, loss, trained)
    assert set_checkpointing(network) > 0
    again, same, less = step(network, loss, trained)
    set_checkpointing(network, False)
    assert torch.equal(value, again) and gradients.keys() == same.keys()
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert sum(less.values()) < 0.6 * sum(kept.values())


@pytest.mark.parametrize("part", ["unet", "reference_encoder", "view_controlnet", "view_consistency"])
def test_denoiser(denoiser, part):
    """The bank is written and read once, though the blocks around it run twice."""
    x, hint, t = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 64, 64), torch.full((4,), 500)
    context, reference = torch.randn(4, 1, 32), torch.randn(2, 4, 8, 8)

    def loss():
        bank = denoiser.reference_encoder(reference, t[:2], context[:2])
        return denoiser.conditional(x, t, context, bank, hint, 2).square().mean()

    compare(denoiser, loss, getattr(denoiser, part))


def test_novel_view_model():
    torch.manual_seed(0)
    sizes = {"render_size": 16, "base_channels": 16, "volume_size": 8, "samples_per_ray": 4}
    model = NovelViewModel(NovelViewConfig(image_size=64, **sizes)).train()
    torch.nn.init.normal_(model.decoder.out[2].weight, std=0.05)
    image, source, target = torch.rand(1, 3, 64, 64), torch.tensor([label(0)]), torch.tensor([label(30)])
    compare_loosely(model, lambda: model(image, source, target).square().mean())


def compare_loosely(model, loss):
    """S keeps its volume renderer's activations: only its residual blocks are run again."""
    value, gradients, kept = step(model, loss, model)
    set_checkpointing(model)
    again, same, less = step(model, loss, model)
    assert torch.equal(value, again)
    assert all(torch.allclose(gradients[name], same[name], rtol=1e-4, atol=1e-7) for name in gradients)
    assert sum(less.values()) < sum(kept.values())
