"""The KL autoencoder of latent diffusion, of any width: SD1.5's own VAE, or the miniature's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import AutoencoderConfig
from .layers import Upsample

LATENT_SCALE = 0.18215  # SD1.5's latents are multiplied by this


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = _norm(channels, norm_groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, norm_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head attention over the pixels of the lowest resolution."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = _norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "n c h w -> n 1 (h w) c") for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "n 1 (h w) c -> n c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the LDM pads right and bottom only


class Middle(nn.Module):
    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, norm_groups)
        self.attn_1 = AttnBlock(channels, norm_groups)
        self.block_2 = ResnetBlock(channels, channels, norm_groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


def _blocks(count: int, channels: int, out_channels: int, norm_groups: int) -> nn.Sequential:
    widths = [channels] + [out_channels] * count
    return nn.Sequential(*(ResnetBlock(a, b, norm_groups) for a, b in zip(widths, widths[1:], strict=False)))


class DownLevel(nn.Module):
    """Gives the level's hidden states, and those for the next one."""

    def __init__(self, config: AutoencoderConfig, channels: int, level: int):
        super().__init__()
        out_channels = config.ch_mult[level] * config.ch
        self.block = _blocks(config.num_res_blocks, channels, out_channels, config.norm_groups)
        self.downsample = Downsample(out_channels) if level < len(config.ch_mult) - 1 else nn.Identity()

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.block(h)
        return h, self.downsample(h)


class UpLevel(nn.Module):
    def __init__(self, config: AutoencoderConfig, channels: int, level: int):
        super().__init__()
        out_channels = config.ch_mult[level] * config.ch
        self.block = _blocks(config.num_res_blocks + 1, channels, out_channels, config.norm_groups)
        self.upsample = Upsample(out_channels) if level else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return self.upsample(self.block(h))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.patch_channels, config.ch, 3, padding=1)
        widths = [config.ch, *(mult * config.ch for mult in config.ch_mult)]
        self.down = nn.ModuleList(DownLevel(config, widths[level], level) for level in range(len(config.ch_mult)))
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def features(self, x: Tensor) -> list[Tensor]:
        """Hidden states at the end of every level, finest first; the last one has passed the middle."""
        h, levels = self.conv_in(F.pixel_unshuffle(x, self.patch_size)), []
        for level in self.down:
            hidden, h = level(h)
            levels.append(hidden)
        levels[-1] = self.mid(h)
        return levels

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.features(x)[-1])))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [mult * config.ch for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups)
        before = [*widths[1:], widths[-1]]  # a level's input has the channels of the next coarser one
        levels = [UpLevel(config, before[level], level) for level in reversed(range(len(widths)))]
        self.up = nn.ModuleList(reversed(levels))  # the LDM numbers them from the finest level
        self.norm_out = _norm(widths[0], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], config.patch_channels, 3, padding=1)
        self.patch_size = config.patch_size

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch_size)


class AutoencoderKL(nn.Module):
    """Images [N, 3, H, W] in [-1, 1] to latents [N, 4, H/8, W/8] and back."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, unscaled, each [N, 4, H/8, W/8]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mode as scaled latents [N, 4, H/8, W/8]."""
        return LATENT_SCALE * self.moments(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images [N, 3, H, W], about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / LATENT_SCALE))

    @torch.no_grad()
    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """Folds an affine map into the quantisation convolutions so that scaled latents have zero mean, unit std.

        Args:
            mean, std: statistics of the present scaled latents per channel [4].
        """
        if not bool((std > 0).all()):
            raise ValueError(f"Latent channels need a positive std, not {std.tolist()}: the autoencoder has collapsed.")
        z = self.config.z_channels
        scale, shift = 1 / std, mean / std / LATENT_SCALE  # unscaled: new = old * scale - shift
        weight, bias = self.quant_conv.parameters()
        weight[:z] *= scale[:, None, None, None]
        bias[:z] = bias[:z] * scale - shift
        weight, bias = self.post_quant_conv.parameters()
        bias += weight[:, :, 0, 0] @ (mean / LATENT_SCALE)
        weight *= std[None, :, None, None]

    @torch.no_grad()
    def make_deterministic(self) -> None:
        """Sets the posterior's variance to nothing, so that a host that samples it always gets the mode."""
        z = self.config.z_channels
        weight, bias = self.quant_conv.parameters()
        weight[z:] = 0.0
        bias[z:] = -30.0
