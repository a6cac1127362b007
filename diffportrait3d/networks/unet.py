"""The denoiser F: SD1.5's UNet with three more inputs.

They are reference tokens in every self-attention (paper eq. 4-5), ControlNet residuals on the skip connections
(section 3.3), and attention across views after the blocks (section 3.4). With none of them it is the plain UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig
from .cross_view_attention import CrossViewAttention
from .layers import Block, Downsample, ResBlock, SpatialTransformer, Upsample, timestep_embedding, zero_init


def _res_and_attention(config: UNetConfig, channels: int, out_channels: int, level: int) -> list[nn.Module]:
    layers: list[nn.Module] = [ResBlock(config, channels, out_channels)]
    if level in config.attention_levels:
        layers.append(SpatialTransformer(config, out_channels))
    return layers


def _input_blocks(config: UNetConfig) -> nn.ModuleList:
    """conv_in, then per level `num_res_blocks` blocks and a Downsample (12 blocks in SD1.5)."""
    channels = config.model_channels
    blocks = [Block([nn.Conv2d(config.in_channels, channels, 3, padding=1)])]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            out_channels = mult * config.model_channels
            blocks.append(Block(_res_and_attention(config, channels, out_channels, level)))
            channels = out_channels
        if level < len(config.channel_mult) - 1:
            blocks.append(Block([Downsample(channels)]))
    return nn.ModuleList(blocks)


def build_output_blocks(config: UNetConfig) -> nn.ModuleList:
    """The decoder: per level one block more than the encoder; the last of a level ends in an Upsample."""
    skips = config.input_channels()
    channels = skips[-1]
    blocks = []
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for index in range(config.num_res_blocks + 1):
            out_channels = mult * config.model_channels
            layers = _res_and_attention(config, channels + skips.pop(), out_channels, level)
            if level and index == config.num_res_blocks:
                layers.append(Upsample(out_channels))
            blocks.append(Block(layers))
            channels = out_channels
    return nn.ModuleList(blocks)


class UNetEncoder(nn.Module):
    """What F, F_ref and F_cam have in common: time embedding, input blocks and middle block."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width = config.embedding_channels
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.input_blocks = _input_blocks(config)
        c = config.channel_mult[-1] * config.model_channels
        self.middle_block = Block([ResBlock(config, c, c), SpatialTransformer(config, c), ResBlock(config, c, c)])

    def embed(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps [N] -> embedding [N, 4 * model_channels] in the type of the network's activations.

        With the SiLU that SD1.5's ResBlocks begin with: all of them read the same.
        """
        return F.silu(self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(dtype)))


class UNet(UNetEncoder):
    """The denoiser F."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.output_blocks = build_output_blocks(config)
        width = config.model_channels
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, width),
            nn.SiLU(),
            zero_init(nn.Conv2d(width, config.out_channels, 3, padding=1)),
        )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        bank: Sequence[Tensor] | None = None,
        residuals: Sequence[Tensor] | None = None,
        cross_view: CrossViewAttention | None = None,
        num_views: int | None = None,
        cross_view_in_middle: bool = False,
    ) -> Tensor:
        """Predicts the noise in `x`.

        Args:
            x: noisy latents [N, 4, h, w]; N = B*V with views fastest. h and w are multiples of 8.
            timesteps: [N], 0..999.
            context: text tokens [N, L, context_dim].
            bank: reference tokens per self-attention, each [B, M, C] (B divides N), from `ReferenceEncoder`.
            residuals: 12 skip residuals and the middle one, from `ViewControlNet`.
            cross_view: cross-view modules; needs `num_views`.
            num_views: V.
            cross_view_in_middle: also run the module in the middle block (the release: unconditional pass only).

        Returns:
            eps [N, 4, h, w]
        """
        emb = self.embed(timesteps, x.dtype)
        references = iter(self._references(bank))
        h, skips = x, []
        for index, block in enumerate(self.input_blocks):
            h, _ = block(h, emb, context, next(references))
            if cross_view is not None and index > 0:
                h = cross_view.after_input(index, h, num_views)
            skips.append(h)  # skips carry the cross-view result, as in the release
        if cross_view is not None and cross_view_in_middle:
            first, transformer, last = self.middle_block
            h, _ = transformer(first(h, emb), context, next(references))
            h = last(cross_view.after_middle_transformer(h, num_views), emb)
        else:
            h, _ = self.middle_block(h, emb, context, next(references))
        if residuals is not None:
            h, skips = h + residuals[-1], [skip + r for skip, r in zip(skips, residuals[:-1], strict=True)]
        for index, block in enumerate(self.output_blocks):
            h, _ = block(torch.cat([h, skips.pop()], dim=1), emb, context, next(references))
            if cross_view is not None:
                h = cross_view.after_output(index, h, num_views)
        return self.out(h)

    def _references(self, bank: Sequence[Tensor] | None) -> list[Tensor | None]:
        """The bank's entries for the blocks in running order; None for a block without self-attention."""
        blocks = [cast(Block, block) for block in (*self.input_blocks, self.middle_block, *self.output_blocks)]
        if bank is None:
            return [None] * len(blocks)
        channels = [block.attention_channels for block in blocks]
        found, expected = [entry.shape[-1] for entry in bank], [width for width in channels if width]
        if found != expected:
            raise ValueError(
                f"The reference bank has {len(found)} entries of {found} channels, the UNet's self-attentions are "
                f"{len(expected)} of {expected}: the reference encoder belongs to another base model."
            )
        entries = iter(bank)
        return [next(entries) if width else None for width in channels]
