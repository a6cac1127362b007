"""Self-attentions of the host that read more tokens than their own, in some of the conditions of a batch.

The host lets a patch change what goes into to_k and to_v: there, a portrait's tokens would be projected for every view.
Here they are appended behind to_k and to_v, by the override of the attention function that the host looks for in its
transformer options; an override that is there already does the attention itself. Whatever acts on an attention's
projections, inputs or output is not concerned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from torch import Tensor, nn

OVERRIDE = "optimized_attention_override"  # the host's name for it


class Reading(NamedTuple):
    """Keys and values [1, count*M, C] of `count` references of M tokens each.

    strength: 1 the reference as it is, 0 own tokens only, between: blended; a number or one for each token
    [1, count*M, 1].
    """

    keys: Tensor
    values: Tensor
    count: int
    strength: float | Tensor


class LongerAttention:
    """The override of one UNet call.

    Args:
        unet: of the host. previous: another override, or None.
    """

    KEY = "diffportrait3d.longer_attention"

    def __init__(self, unet: nn.Module, previous: Callable | None):
        self.unet, self.previous = unet, previous
        self.readings: list[Reading] = []
        self.positive: list[bool] = []

    def module(self, where: tuple) -> nn.Module:
        """The self-attention at a place (see `layer_key`)."""
        part, number, index = where
        block = self.unet.middle_block if part == "middle" else getattr(self.unet, f"{part}_blocks")[number]
        transformer = next(layer for layer in block if isinstance(layer, SpatialTransformer))
        return transformer.transformer_blocks[index].attn1

    def read(self, reading: Reading, positive: list[bool]) -> None:
        """The next attention reads this, too, in the chunks of the batch that are positive."""
        self.readings.append(reading)
        self.positive = positive

    def __call__(self, attend: Callable, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        """Attention of the host: q [N, L, C], k and v [N, L', C]."""
        if self.previous is not None:
            attend = partial(self.previous, attend)
        if not self.readings:
            return attend(q, k, v, *args, **kwargs)
        readings, self.readings = self.readings, []
        # HyperTile has cut the queries into tiles: the host's attention would cut keys and values alike.
        k, v = (own.reshape(len(q), -1, own.shape[-1]) for own in (k, v))
        rows, outputs = len(q) // len(self.positive), []
        sides = [(positive, len(list(chunks))) for positive, chunks in groupby(self.positive)]
        parts = (tensor.split([rows * count for _, count in sides]) for tensor in (q, k, v))
        for (positive, _), q_part, k_part, v_part in zip(sides, *parts, strict=True):
            if positive:
                k_part, v_part = append_reference(k_part, v_part, readings)
            outputs.append(attend(q_part, k_part, v_part, *args, **kwargs))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@contextmanager
def longer_attention(options: dict, unet: nn.Module) -> Iterator[None]:
    """Puts a LongerAttention into the transformer options of a UNet call while the block runs; one for all patches."""
    if LongerAttention.KEY in options:
        yield
        return
    previous = options.get(OVERRIDE)
    options[LongerAttention.KEY] = options[OVERRIDE] = LongerAttention(unet, previous)
    try:
        yield
    finally:
        del options[LongerAttention.KEY], options[OVERRIDE]
        if previous is not None:
            options[OVERRIDE] = previous


def layer_key(options: dict) -> tuple:
    """Which self-attention of the UNet: (input | middle | output, block number, transformer block)."""
    return (*options["block"], options["block_index"])


def append_reference(keys: Tensor, values: Tensor, readings: list[Reading]) -> tuple[Tensor, Tensor]:
    """Keys and values of views [N, L, C] with those of references behind them [N, L + all count*M, C]."""
    longer_keys = [_of_views(reading.keys, keys, reading) for reading in readings]
    longer_values = [_of_views(reading.values, values, reading) for reading in readings]
    return torch.cat([keys, *longer_keys], dim=1), torch.cat([values, *longer_values], dim=1)


def _of_views(reference: Tensor, own: Tensor, reading: Reading) -> Tensor:
    """A reference's keys or values [1, count*M, C] as the views [N, L, C] read them [N, count*M, C].

    At a strength below 1 they are blended with the views' own first M, which are repeated where a tile of a view has
    fewer: to_k and to_v are linear, so that this is the same as to blend tokens.
    """
    reference = reference.expand(len(own), -1, -1)
    if not isinstance(reading.strength, Tensor) and reading.strength == 1.0:
        return reference
    length = reference.shape[1] // reading.count
    padding = own[:, :length].repeat(1, reference.shape[1] // min(length, own.shape[1]), 1)
    return torch.lerp(padding, reference, reading.strength)
