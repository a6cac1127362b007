"""The widget for the side of the views, whose default is what the networks were trained at."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.loading import trained_side

OWN = 0
SMALLEST, LARGEST = 64, 2048


def resolution_input(tooltip: str) -> io.Input:
    """`resolution`: a side in pixels, or 0 for the networks' own."""
    return io.Int.Input("resolution", default=OWN, min=OWN, max=LARGEST, step=64, tooltip=tooltip)


def chosen_resolution(resolution: int, network, node: str) -> int:
    """The side in pixels that the widget of `node` means; 0 is that of `network` (a VAE, a CONTROL_NET or None).

    Raises:
        ValueError: a side that is too small for the networks.
    """
    if resolution == OWN:
        return trained_side(network)
    if resolution < SMALLEST:
        raise ValueError(
            f"{node}: resolution must be 0 (the networks' own) or lie between {SMALLEST} and {LARGEST}, got "
            f"{resolution}."
        )
    return resolution
