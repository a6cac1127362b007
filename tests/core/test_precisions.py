"""Every network in every type on every device that is there: close to its float32 result on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffportrait3d.cameras.labels import trajectory
from diffportrait3d.networks import (
    AutoencoderConfig,
    AutoencoderKL,
    CrossViewAttention,
    NovelViewConfig,
    NovelViewModel,
    ReferenceEncoder,
    UNet,
    UNetConfig,
    ViewControlNet,
)

# Largest error allowed, as a part of the largest value of the float32 result: of all others, and of S, whose density is
# an exponential.
TOLERANCES = {
    ("cpu", torch.float32): (0.0, 0.0),
    ("cpu", torch.bfloat16): (5e-2, 0.25),
    ("cpu", torch.float16): (1e-2, 0.1),
    ("cuda", torch.float32): (5e-3, 2e-2),  # convolutions in TF32
    ("cuda", torch.bfloat16): (5e-2, 0.25),
    ("cuda", torch.float16): (1e-2, 0.1),
}
SIZES = UNetConfig(model_channels=32, context_dim=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,))
VOLUME = NovelViewConfig(
    image_size=32,
    render_size=8,
    base_channels=16,
    volume_size=8,
    volume_channels=8,
    prior_channels=4,
    samples_per_ray=8,
)
VIEWS = 2


def latents() -> tuple[Tensor, Tensor, Tensor]:
    """x, t and context of two views."""
    return torch.randn(VIEWS, 4, 8, 8), torch.full((VIEWS,), 300), torch.randn(VIEWS, 3, 16)


def cross_view(network: CrossViewAttention, x: Tensor) -> Tensor:
    return network.after_output(len(SIZES.output_channels()) - 1, network.after_input(1, x, VIEWS), VIEWS)


# kind: (network, its inputs, how it is called if not by itself)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], Callable | None]] = {
    "unet": (lambda: UNet(SIZES), latents, None),
    "reference_encoder": (lambda: ReferenceEncoder(SIZES), latents, None),
    "view_controlnet": (
        lambda: ViewControlNet(SIZES),
        latents,
        lambda network, x, t, context: network(x, x.new_ones(VIEWS, 3, 64, 64), t, context),
    ),
    "view_consistency": (lambda: CrossViewAttention(SIZES), lambda: (torch.randn(VIEWS, 32, 8, 8),), cross_view),
    "autoencoder": (
        lambda: AutoencoderKL(AutoencoderConfig(ch=32)),
        lambda: (torch.rand(VIEWS, 3, 32, 32),),
        lambda network, images: network.decode(network.encode(images)),
    ),
    "novel_view": (
        lambda: NovelViewModel(VOLUME),
        lambda: (torch.rand(VIEWS, 3, 32, 32), trajectory("arc", VIEWS), trajectory("arc", VIEWS).flip(0)),
        None,
    ),
}


def run(kind: str, device: str, dtype: torch.dtype) -> Tensor:
    """All results in one float32 row. S's cameras need float32: it is autocast, as in its training."""
    build, inputs, call = CASES[kind]
    torch.manual_seed(0)
    network = build().eval()
    for parameter in network.parameters():
        if not parameter.any():  # layers that training starts at zero
            nn.init.normal_(parameter, std=0.05)
    given = [value.to(device) for value in inputs()]
    network, mixed = network.to(device), kind == "novel_view"
    if not mixed:
        network = network.to(dtype)
        given = [value.to(dtype) if value.is_floating_point() else value for value in given]
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=mixed and dtype != torch.float32):
        found = call(network, *given) if call else network(*given)
    return torch.cat([value.float().cpu().flatten() for value in (found if isinstance(found, list) else [found])])


@pytest.mark.parametrize(("device", "dtype"), TOLERANCES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("kind", CASES)
def test_a_network_in_a_type_on_a_device(kind, device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    expected = run(kind, "cpu", torch.float32)
    error = (run(kind, device, dtype) - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCES[device, dtype][kind == "novel_view"]
    assert dtype == torch.float32 or error > 0  # the type was used
