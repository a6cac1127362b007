"""The view consistency module (paper section 3.4): attention along the view axis, after the UNet's blocks.

The layout is the authors' release: AnimateDiff's vanilla temporal transformer with two attentions per module, one
module after every input block but the first (Downsamples included), one in the middle block, and one after every
output block, two in series where the block ends in an Upsample.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from .config import UNetConfig
from .layers import Attention, Checkpointed, FeedForward, zero_init

MAX_PIXELS = 2**15  # that are attended to at once: kernels of GPUs take batches of less than 2**16, and memory is saved


def sinusoidal_table(length: int, channels: int) -> Tensor:
    """Positional table float32 [1, length, channels]: even channels sine, odd channels cosine."""
    rates = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    angles = torch.arange(length)[:, None] * rates  # [length, channels/2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None]


class PositionalEncoding(nn.Module):
    pe: Tensor

    def __init__(self, channels: int, max_views: int):
        super().__init__()
        self.register_buffer("pe", sinusoidal_table(max_views, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Adds the view's position; x [*, V, C]."""
        return x + self.pe[:, : x.shape[1]].to(x)


class ViewAxisAttention(Attention):
    """Attention among the V views of one pixel; the position enters queries, keys and values, as in the release."""

    def __init__(self, config: UNetConfig, channels: int, operations=nn):
        super().__init__(channels, channels, config.num_heads, operations)
        self.pos_encoder = PositionalEncoding(channels, config.max_views)
        self.to_qkv: nn.Module | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(self.pos_encoder(x), context)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return super().project(x, context) if self.to_qkv is None else self.to_qkv(x).chunk(3, dim=-1)

    def join_projections(self) -> None:
        joined = self.to_q
        joined.weight = nn.Parameter(torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight]), False)
        joined.out_features *= 3
        del self.to_q, self.to_k, self.to_v
        self.to_qkv = joined


class CrossViewBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, operations=nn):
        super().__init__()
        self.attention_blocks = nn.ModuleList(ViewAxisAttention(config, channels, operations) for _ in range(2))
        self.norms = nn.ModuleList(operations.LayerNorm(channels) for _ in range(2))
        self.ff = FeedForward(channels, operations)
        self.ff_norm = operations.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = x + attention(norm(x))
        return x + self.ff(self.ff_norm(x))


class CrossViewTransformer(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, operations=nn):
        super().__init__()
        self.norm = operations.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = operations.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([CrossViewBlock(config, channels, operations)])
        self.proj_out = zero_init(operations.Linear(channels, channels))

    def forward(self, x: Tensor, num_views: int) -> Tensor:
        """x [B*V, C, H, W]; GroupNorm is per view."""
        grid = -1, num_views, x.shape[1], x.shape[2] * x.shape[3]  # [B, V, C, H*W]
        h = self.norm(x).reshape(grid).permute(0, 3, 1, 2)  # [B, H*W, V, C]
        h = self.proj_in(h.flatten(0, 1).contiguous())  # of one group that is a strided view, whose product is slow
        for block in self.transformer_blocks:
            h = torch.cat([block(pixels) for pixels in h.split(MAX_PIXELS)]) if len(h) > MAX_PIXELS else block(h)
        h = self.proj_out(h).view(-1, grid[3], num_views, x.shape[1])  # [B, H*W, V, C]
        return (x.reshape(grid) + h.permute(0, 2, 3, 1)).reshape(x.shape)


class CrossViewModule(Checkpointed):
    """One module of the release; its weights live under `temporal_transformer`."""

    def __init__(self, config: UNetConfig, channels: int, operations=nn):
        super().__init__()
        self.temporal_transformer = CrossViewTransformer(config, channels, operations)

    def compute(self, x: Tensor, num_views: int) -> Tensor:
        return self.temporal_transformer(x, num_views)


class CrossViewAttention(nn.Module):
    """All cross-view modules of one UNet (27 for SD1.5), under the names they have in the release."""

    def __init__(self, config: UNetConfig, operations=nn):
        super().__init__()
        self.config = config

        def module(channels: int) -> CrossViewModule:
            return CrossViewModule(config, channels, operations)

        upsampled = config.upsample_blocks()
        self.input_blocks_motion_module = nn.ModuleList(nn.ModuleList([module(c)]) for c in config.input_channels()[1:])
        self.middle_block_motion_module = nn.ModuleList([module(config.input_channels()[-1])])
        self.output_blocks_motion_module = nn.ModuleList(
            nn.ModuleList(module(c) for _ in range(2 if i in upsampled else 1))
            for i, c in enumerate(config.output_channels())
        )

    def join_projections(self) -> None:
        """One product for queries, keys and values of each attention: fewer kernels, for inference only, as the weights
        lose the names that they have in files."""
        for module in self.modules():
            if isinstance(module, ViewAxisAttention):
                module.join_projections()

    def remove_positions(self) -> None:
        """Zeroes the positional tables: attention becomes blind to the order of the views, and to their number.

        The tables are part of the weights, so a file saved afterwards stays that way everywhere.
        """
        for module in self.modules():
            if isinstance(module, PositionalEncoding):
                module.pe.zero_()

    def after_input(self, index: int, h: Tensor, num_views: int | None) -> Tensor:
        """After input block `index` (1..11); h [B*V, C, H, W]."""
        return self._run(self.input_blocks_motion_module[index - 1], h, num_views)

    def after_middle_transformer(self, h: Tensor, num_views: int | None) -> Tensor:
        """Between the middle block's transformer and its last ResBlock."""
        return self._run(self.middle_block_motion_module, h, num_views)

    def after_output(self, index: int, h: Tensor, num_views: int | None) -> Tensor:
        """After the complete output block `index` (0..11), its Upsample included."""
        return self._run(self.output_blocks_motion_module[index], h, num_views)

    def _run(self, modules: nn.Module, h: Tensor, num_views: int | None) -> Tensor:
        views = self.check_views(num_views, h.shape[0])
        for module in cast(nn.ModuleList, modules):
            h = module(h, views)
        return h

    def check_views(self, num_views: int | None, batch: int) -> int:
        """`num_views`; ValueError unless `batch` holds whole groups of 2..max_views views."""
        if num_views is None or not 2 <= num_views <= self.config.max_views:
            raise ValueError(f"View attention needs 2 to {self.config.max_views} views at once, not {num_views}.")
        if batch % num_views:
            raise ValueError(f"A batch of {batch} does not hold whole groups of {num_views} views.")
        return num_views
