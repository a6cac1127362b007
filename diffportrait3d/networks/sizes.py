"""Sizes of networks of the Stable Diffusion 1.5 family, read from the shapes of their tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from .config import AutoencoderConfig

Shapes = Mapping[str, tuple[int, ...]]

SD15_AUTOENCODER = AutoencoderConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, patch_size=1, norm_groups=32)
_VIEW_MODULE = "input_blocks_motion_module.0.0.temporal_transformer."
# Setting of `UNetConfig`, the tensor that shows it, and which of its dimensions does.
_UNET_SIZES = (
    ("model_channels", "input_blocks.0.0.weight", 0),
    ("model_channels", _VIEW_MODULE + "norm.weight", 0),
    ("in_channels", "input_blocks.0.0.weight", 1),
    ("context_dim", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 1),
    ("out_channels", "out.2.weight", 0),
    ("hint_channels", "input_hint_block.0.weight", 1),
    ("max_views", _VIEW_MODULE + "transformer_blocks.0.attention_blocks.0.pos_encoder.pe", 1),
)


def unet_sizes(shapes: Shapes) -> dict[str, Any]:
    """Settings of `UNetConfig` as far as tensors show them. The number of attention heads leaves no trace in shapes."""
    return {
        setting: shapes[key][dimension]
        for setting, key, dimension in _UNET_SIZES
        if len(shapes.get(key, ())) > dimension
    }


def autoencoder_config(shapes: Shapes) -> AutoencoderConfig:
    """Of an autoencoder in SD1.5's layout, of any width; SD1.5's own where there is none."""
    levels = consecutive(shapes, "encoder.down.{}.block.0.conv1.weight")
    channels = shapes.get("encoder.conv_in.weight", (0,))[0]
    if not levels or not channels or channels % 32:
        return SD15_AUTOENCODER
    mults = tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] // channels for level in range(levels))
    blocks = consecutive(shapes, "encoder.down.0.block.{}.conv1.weight")
    return AutoencoderConfig(channels, mults, blocks, patch_size=1, norm_groups=32)


def consecutive(shapes: Shapes, key: str) -> int:
    """How many keys there are with 0, 1, ... in the place of `{}`."""
    return next(index for index in itertools.count() if key.format(index) not in shapes)
