"""Layers that the UNet, its copies and the view attention share.

Module names follow the LDM checkpoints, so state dicts of SD1.5, ControlNet and the authors' release load unchanged.
`operations` is the namespace the leaf layers come from: `torch.nn`, or a host's own casting layers.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import UNetConfig

Layer = TypeVar("Layer", bound=nn.Module)


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoids of diffusion timesteps [N] (0..999, integer or float), cosines first: float32 [N, channels], even."""
    half = channels // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * rates  # [N, half]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zero_init(module: Layer) -> Layer:
    """Zeroes all parameters, so that a new branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GEGLU(nn.Module):
    def __init__(self, channels: int, hidden: int, operations=nn):
        super().__init__()
        self.proj = operations.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU feed-forward with four times the channels; `net.0.proj` and `net.2` are its names in every checkpoint."""

    def __init__(self, channels: int, operations=nn):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels, operations), nn.Identity(), operations.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """Multi-head attention with biased output and unbiased queries, keys and values (paper eq. 2-3)."""

    def __init__(self, channels: int, context_channels: int, num_heads: int, operations=nn):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = operations.Linear(channels, channels, bias=False)
        self.to_k = operations.Linear(context_channels, channels, bias=False)
        self.to_v = operations.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(operations.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = map(self._heads, self.project(x, x if context is None else context))
        out = F.scaled_dot_product_attention(q, k, v)  # [N, heads, L, d]
        return self.to_out(out.transpose(1, 2).reshape(x.shape))

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Queries of x, keys and values of context."""
        return self.to_q(x), self.to_k(context), self.to_v(context)

    def _heads(self, t: Tensor) -> Tensor:
        """[N, L, heads*d] -> [N, heads, L, d], a view."""
        return t.view(*t.shape[:2], self.num_heads, -1).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each pre-normed and residual."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.attn1 = Attention(channels, channels, config.num_heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, config.context_dim, config.num_heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the block.

        Args:
            x: hidden states [N, L, C].
            context: text tokens [N, T, context_dim].
            reference: tokens that self-attention reads behind its own [B, M, C]; B divides N.

        Returns:
            hidden states [N, L, C], and self-attention's own tokens [N, L, C] for a reference bank
        """
        tokens = self.norm1(x)
        x = x + self.attn1(tokens, tokens if reference is None else append_tokens(tokens, reference))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x)), tokens


def append_tokens(tokens: Tensor, reference: Tensor) -> Tensor:
    """Concatenates reference tokens behind a view's own (paper eq. 4).

    Args:
        tokens: [B*V, L, C], views fastest.
        reference: [B, M, C]; each of the B rows serves its V views.

    Returns:
        [B*V, L+M, C]
    """
    repeats, remainder = divmod(tokens.shape[0], reference.shape[0])
    if remainder:
        raise ValueError(f"{tokens.shape[0]} views cannot share {reference.shape[0]} reference banks evenly.")
    return torch.cat([tokens, reference.repeat_interleave(repeats, dim=0)], dim=1)


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map; arguments and results as in `TransformerBlock`."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.channels = channels
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config, channels)])
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, tokens = self._block(self._flat(x), context, reference)
        return x + self.proj_out(rearrange(h, "n (h w) c -> n c h w", h=x.shape[2])), tokens

    def tokens(self, x: Tensor) -> Tensor:
        """The second result of `forward` without the work for the first."""
        return self._block.norm1(self._flat(x))

    @property
    def _block(self) -> TransformerBlock:
        return cast(TransformerBlock, self.transformer_blocks[0])

    def _flat(self, x: Tensor) -> Tensor:
        return rearrange(self.proj_in(self.norm(x)), "n c h w -> n (h w) c")


class ResBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(config.embedding_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, out_channels),
            nn.SiLU(),
            nn.Identity(),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Checkpointed(nn.Module):
    """A block whose inner activations may be computed anew in the backward pass instead of being kept.

    It changes neither results nor gradients; a step takes about a third more work and several times less memory.
    Subclasses implement `compute`; callers use the module as any other.

    Attributes:
        checkpointing: run `compute` again in the backward pass, where there is one.
    """

    checkpointing = False

    def compute(self, *inputs: Any, **_: Any) -> Any:
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Any:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.compute(*inputs)
        return checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)


def set_checkpointing(network: nn.Module, on: bool = True) -> int:
    """Switches it in every block of `network`; returns the number of blocks."""
    blocks = [module for module in network.modules() if isinstance(module, Checkpointed)]
    for block in blocks:
        block.checkpointing = on
    return len(blocks)


class Block(Checkpointed, nn.ModuleList):
    """One numbered block of the UNet: hands each layer what it needs."""

    @property
    def attention_channels(self) -> int | None:
        """Width of its self-attention, if it has one."""
        return next((layer.channels for layer in self if isinstance(layer, SpatialTransformer)), None)

    def compute(
        self, x: Tensor, emb: Tensor, context: Tensor, reference: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the layers; `reference` and the second result, where there is a self-attention, are its tokens."""
        tokens = None
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x, tokens = layer(x, context, reference)
            else:
                x = layer(x)
        return x, tokens
