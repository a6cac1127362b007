"""The KL autoencoder of latent diffusion, of any width: SD1.5's own VAE, or the miniature's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import AutoencoderConfig

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
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


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


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _middle(channels: int, norm_groups: int) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = ResnetBlock(channels, channels, norm_groups)
    middle.attn_1 = AttnBlock(channels, norm_groups)
    middle.block_2 = ResnetBlock(channels, channels, norm_groups)
    return middle


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.patch_channels, config.ch, 3, padding=1)
        channels = config.ch
        self.down = nn.ModuleList()
        for level, mult in enumerate(config.ch_mult):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                stage.block.append(ResnetBlock(channels, mult * config.ch, config.norm_groups))
                channels = mult * config.ch
            if level < len(config.ch_mult) - 1:
                stage.downsample = Downsample(channels)
            self.down.append(stage)
        self.mid = _middle(channels, config.norm_groups)
        self.norm_out = _norm(channels, config.norm_groups)
        self.conv_out = nn.Conv2d(channels, 2 * config.z_channels, 3, padding=1)

    def features(self, x: Tensor) -> list[Tensor]:
        """Hidden states at the end of every level, finest first; the last one has passed the middle."""
        h, levels = self.conv_in(F.pixel_unshuffle(x, self.patch_size)), []
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            levels.append(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        levels[-1] = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return levels

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.features(x)[-1])))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.ch_mult[-1] * config.ch
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = _middle(channels, config.norm_groups)
        stages = []
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                stage.block.append(ResnetBlock(channels, mult * config.ch, config.norm_groups))
                channels = mult * config.ch
            if level:
                stage.upsample = Upsample(channels)
            stages.insert(0, stage)  # the LDM numbers them from the finest level
        self.up = nn.ModuleList(stages)
        self.norm_out = _norm(channels, config.norm_groups)
        self.conv_out = nn.Conv2d(channels, config.patch_channels, 3, padding=1)
        self.patch_size = config.patch_size

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
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
        self.quant_conv.weight[:z] *= scale[:, None, None, None]
        self.quant_conv.bias[:z] = self.quant_conv.bias[:z] * scale - shift
        self.post_quant_conv.bias += self.post_quant_conv.weight[:, :, 0, 0] @ (mean / LATENT_SCALE)
        self.post_quant_conv.weight *= std[None, :, None, None]

    @torch.no_grad()
    def make_deterministic(self) -> None:
        """Sets the posterior's variance to nothing, so that a host that samples it always gets the mode."""
        z = self.config.z_channels
        self.quant_conv.weight[z:] = 0.0
        self.quant_conv.bias[z:] = -30.0
