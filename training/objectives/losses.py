"""Losses and image numbers that the stages share."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffportrait3d.weights.checkpoints import open_checkpoint


def gradient_loss(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of horizontal and vertical image gradients over `scales` octaves.

    Sharpens edges that an L1 loss alone leaves soft. `a`, `b`: [N, C, H, W]; the difference is linear, so the
    gradients are taken of `a - b`.
    """
    difference, total = a - b, a.new_zeros(())
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        total = total + (difference[..., 1:] - difference[..., :-1]).abs().mean()
        total = total + (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return total / scales


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, exp(logvar)) from N(0, 1), averaged over elements."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def psnr(a: Tensor, b: Tensor, value_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, [N]; `value_range` is 2 for [-1, 1]."""
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-12)
    return 20 * math.log10(value_range) - 10 * torch.log10(error)


class EncoderFeatures(nn.Module):
    """Feature maps of a frozen autoencoder's encoder after each level: a perceptual net without outside weights.

    Args:
        autoencoder: a `diffportrait3d.networks.AutoencoderKL`.
        levels: how many levels at most, from the finest down.
    """

    def __init__(self, autoencoder: nn.Module, levels: int = 3):
        super().__init__()
        self.encoder, self.levels = autoencoder.encoder, levels

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, 3, H, W] in [-1, 1] to a list of [N, C_l, H_l, W_l], finest first."""
        return self.encoder.features(x)[: self.levels]


class VggFeatures(nn.Module):
    """VGG-16 after relu1_2, relu2_2, relu3_3 and relu4_3, from a weights file that the user names.

    The file holds torchvision's `vgg16` state dict (`features.N.weight` ...), as .safetensors or .pth. Without a
    file the weights are random.
    """

    TAPS = (3, 8, 15, 22)  # these layers' outputs

    def __init__(self, path: str | Path | None):
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        self.features = make_layers(cfgs["D"])[: self.TAPS[-1] + 1]
        if path is not None:
            source = open_checkpoint(path)
            missing = [name for name in self.state_dict() if name not in source.shapes]
            if missing:
                raise ValueError(f"'{path}' is not torchvision's vgg16 state dict: {missing[0]} is missing.")
            self.load_state_dict({name: source.get(name) for name in self.state_dict()})
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, 3, H, W] in [-1, 1] to four feature maps."""
        x, features = ((x + 1) / 2 - self.mean) / self.std, []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.TAPS:
                features.append(x)
        return features


def perceptual_loss(network: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of channel-normalised features, averaged over layers. `b` is the target (no gradient)."""
    with torch.no_grad():
        wanted = network(b)
    terms = [(_unit(x) - _unit(y)).square().sum(1).mean() for x, y in zip(network(a), wanted, strict=True)]
    return torch.stack(terms).mean()


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-6)
