"""Start values for small autoencoders: from the first step on, the colour of every latent cell passes from end to end.

A small network trained for minutes otherwise settles on one colour axis (skin against sky) and never finds the others.
The path uses a few channels of the plain chain of resampling layers; a pair (x, -x) crosses a SiLU unchanged, since
silu(x) - silu(-x) = x, and a constant pair in the same norm group keeps the norm from forgetting even areas.
"""

from __future__ import annotations

import torch
from torch import nn

from diffportrait3d.networks import AutoencoderKL

COLOURS = 3
CONSTANT = 2.0  # beside colours in [-1, 1]
DECODER_SCALE = 0.35  # the norms have divided by about a third


@torch.no_grad()
def carry_colours(autoencoder: AutoencoderKL) -> None:
    """Sets the start values of `autoencoder`, whose residual branches must end in zeros.

    Latent channels 0..2 begin as the mean red, green and blue of their cell, up to a scale; 3 begins with noise.

    Raises:
        ValueError: a layout in which the path is not known: it needs one res block and more channels per level.
    """
    config = autoencoder.config
    if config.num_res_blocks != 1 or list(config.ch_mult) != sorted(set(config.ch_mult)) or len(config.ch_mult) < 2:
        raise ValueError(
            f"The small autoencoder needs num_res_blocks 1 and growing ch_mult, not {config.num_res_blocks} and "
            f"{list(config.ch_mult)}."
        )
    size, channels = autoencoder.config.patch_size**2, autoencoder.config.z_channels
    encoder, decoder = autoencoder.encoder, autoencoder.decoder

    _clear(encoder.conv_in, range(COLOURS + 1))
    for colour in range(COLOURS):
        encoder.conv_in.weight[colour, colour * size : (colour + 1) * size, 1, 1] = 1 / size
    encoder.conv_in.bias[COLOURS] = CONSTANT
    for level in encoder.down[:-1]:
        _pass(level)
        _average(level.downsample.conv)
    _pass(encoder.down[-1])
    _write_pairs(encoder.down[-1].block[-1].nin_shortcut)
    _clear(encoder.conv_out, range(COLOURS))
    _read_pairs(encoder.conv_out, 1)
    autoencoder.quant_conv.weight[:channels] = torch.eye(channels, 2 * channels)[:, :, None, None]
    autoencoder.post_quant_conv.weight.copy_(torch.eye(channels)[:, :, None, None])

    _clear(decoder.conv_in, range(COLOURS + 1))
    for colour in range(COLOURS):
        decoder.conv_in.weight[colour, colour, 1, 1] = 1.0
    decoder.conv_in.bias[COLOURS] = CONSTANT
    for level in decoder.up[1:]:
        _pass(level)
        _identity(level.upsample.conv, COLOURS + 1)
    _write_pairs(decoder.up[0].block[0].nin_shortcut)
    _clear(decoder.conv_out, range(COLOURS * size))
    _read_pairs(decoder.conv_out, size, DECODER_SCALE)


def _clear(layer: nn.Conv2d, rows: range) -> None:
    layer.weight[rows.start : rows.stop] = 0.0
    layer.bias[rows.start : rows.stop] = 0.0


def _identity(layer: nn.Conv2d, count: int) -> None:
    _clear(layer, range(count))
    centre = layer.kernel_size[0] // 2
    for channel in range(count):
        layer.weight[channel, channel, centre, centre] = 1.0


def _pass(level: nn.Module) -> None:
    """The residual blocks of a level leave the path as it is."""
    for block in level.block:
        if isinstance(block.nin_shortcut, nn.Conv2d):
            _identity(block.nin_shortcut, COLOURS + 1)


def _write_pairs(layer: nn.Conv2d) -> None:
    """Channels 2k and 2k + 1 become channel k and its negative."""
    _clear(layer, range(2 * (COLOURS + 1)))
    for source in range(COLOURS + 1):
        layer.weight[2 * source, source, 0, 0], layer.weight[2 * source + 1, source, 0, 0] = 1.0, -1.0


def _average(downsample: nn.Conv2d) -> None:
    """Means of 2x2; the layer pads right and bottom only, so the window starts at its own pixel."""
    _clear(downsample, range(COLOURS + 1))
    for channel in range(COLOURS):
        downsample.weight[channel, channel, :2, :2] = 0.25
    downsample.bias[COLOURS] = CONSTANT


def _read_pairs(layer: nn.Conv2d, repeat: int, scale: float = 1.0) -> None:
    """Rows `repeat` at a time read one colour from its pair behind the SiLU."""
    for colour in range(COLOURS):
        rows = slice(colour * repeat, (colour + 1) * repeat)
        layer.weight[rows, 2 * colour, 1, 1], layer.weight[rows, 2 * colour + 1, 1, 1] = scale, -scale
