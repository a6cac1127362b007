"""The denoiser F: SD1.5's UNet with the three openings through which the method acts on it.

Openings: reference tokens in every self-attention (paper eq. 4-5), ControlNet residuals on the skip connections
(section 3.3), and attention across views after the blocks (section 3.4). With none of them it is the plain UNet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import UNetConfig
from .layers import (
    Block,
    Downsample,
    ResBlock,
    SpatialTransformer,
    TokenExchange,
    Upsample,
    set_norm_groups,
    timestep_embedding,
    zero_init,
)
from .view_attention import ViewConsistency


def build_time_embed(config: UNetConfig) -> nn.Sequential:
    width = config.embedding_channels
    return nn.Sequential(nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))


def _res_and_attention(config: UNetConfig, channels: int, out_channels: int, level: int) -> list[nn.Module]:
    layers: list[nn.Module] = [ResBlock(channels, config.embedding_channels, out_channels)]
    if level in config.attention_levels:
        layers.append(SpatialTransformer(out_channels, config.context_dim, config.num_heads))
    return layers


def build_input_blocks(config: UNetConfig) -> nn.ModuleList:
    """The encoder: conv_in, then per level `num_res_blocks` blocks and a Downsample (12 blocks in SD1.5)."""
    channels = config.model_channels
    blocks = [Block(nn.Conv2d(config.in_channels, channels, 3, padding=1))]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            out_channels = mult * config.model_channels
            blocks.append(Block(*_res_and_attention(config, channels, out_channels, level)))
            channels = out_channels
        if level < len(config.channel_mult) - 1:
            blocks.append(Block(Downsample(channels)))
    return nn.ModuleList(blocks)


def build_middle_block(config: UNetConfig) -> Block:
    channels = config.channel_mult[-1] * config.model_channels
    return Block(
        ResBlock(channels, config.embedding_channels, channels),
        SpatialTransformer(channels, config.context_dim, config.num_heads),
        ResBlock(channels, config.embedding_channels, channels),
    )


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
            blocks.append(Block(*layers))
            channels = out_channels
    return nn.ModuleList(blocks)


class BankReader:
    """Hands out a reference bank's entries in the running order of the self-attentions."""

    def __init__(self, bank: Sequence[Tensor]):
        self.bank = bank
        self.index = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.index == len(self.bank):
            raise ValueError(f"The reference bank has {len(self.bank)} entries; this UNet has more self-attentions.")
        entry = self.bank[self.index]
        if entry.shape[-1] != tokens.shape[-1]:
            raise ValueError(
                f"Reference bank entry {self.index} has {entry.shape[-1]} channels, the UNet {tokens.shape[-1]}: "
                "the reference encoder belongs to another base model."
            )
        self.index += 1
        return entry


class UNet(nn.Module):
    """The denoiser F."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_embed = build_time_embed(config)
        self.input_blocks = build_input_blocks(config)
        self.middle_block = build_middle_block(config)
        self.output_blocks = build_output_blocks(config)
        width = config.model_channels
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), zero_init(nn.Conv2d(width, config.out_channels, 3, padding=1))
        )
        set_norm_groups(self, config.norm_groups)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        bank: Sequence[Tensor] | None = None,
        residuals: Sequence[Tensor] | None = None,
        view_attention: ViewConsistency | None = None,
        num_views: int | None = None,
        middle_view_attention: bool = False,
    ) -> Tensor:
        """Predicts the noise in `x`.

        Args:
            x: noisy latents [N, 4, h, w]; N = B*V with views fastest. h and w are multiples of 8.
            timesteps: [N], 0..999.
            context: text tokens [N, L, context_dim].
            bank: reference tokens per self-attention, each [B, M, C] (B divides N), from `ReferenceEncoder`.
            residuals: 12 skip residuals and the middle one, from `ViewControlNet`.
            view_attention: cross-view modules; needs `num_views`.
            num_views: V.
            middle_view_attention: also run the module in the middle block (the release: unconditional pass only).

        Returns:
            eps [N, 4, h, w]
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))
        exchange = BankReader(bank) if bank is not None else None
        h, skips = self._encode(x, emb, context, exchange, view_attention, num_views)
        h = self._middle(h, emb, context, exchange, view_attention if middle_view_attention else None, num_views)
        if residuals is not None:
            h, skips = h + residuals[-1], [skip + r for skip, r in zip(skips, residuals[:-1], strict=True)]
        for index, block in enumerate(self.output_blocks):
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context, exchange)
            if view_attention is not None:
                h = view_attention.after_output(index, h, num_views)
        if exchange is not None and exchange.index != len(exchange.bank):
            raise ValueError(f"The reference bank has {len(exchange.bank)} entries; this UNet read {exchange.index}.")
        return self.out(h)

    def _encode(self, x, emb, context, exchange: TokenExchange | None, view_attention, num_views):
        h, skips = x, []
        for index, block in enumerate(self.input_blocks):
            h = block(h, emb, context, exchange)
            if view_attention is not None and index > 0:
                h = view_attention.after_input(index, h, num_views)
            skips.append(h)  # skips carry the cross-view result, as in the release
        return h, skips

    def _middle(self, h, emb, context, exchange: TokenExchange | None, view_attention, num_views):
        if view_attention is None:
            return self.middle_block(h, emb, context, exchange)
        first, transformer, last = self.middle_block
        h = transformer(first(h, emb), context, exchange)
        return last(view_attention.after_middle_transformer(h, num_views), emb)
