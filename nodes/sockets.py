"""The pack's node categories, its own socket types, and the widgets that several nodes share."""

from __future__ import annotations

from comfy_api.latest import io

from ..diffportrait3d.cameras.labels import RADIUS
from ..host.drawn_head import FOV
from ..host.loading import trained_side

# Where the nodes are in the editor's node library, in the order of a graph.
CATEGORY = "DiffPortrait3D"
LOAD = f"{CATEGORY}/load"
PORTRAIT = f"{CATEGORY}/portrait"
CAMERAS = f"{CATEGORY}/cameras"
APPLY = f"{CATEGORY}/apply"
SAMPLE = f"{CATEGORY}/sample"
VIEWS = f"{CATEGORY}/views"
FILES = f"{CATEGORY}/files"

ReferenceEncoder = io.Custom("DP3D_REFERENCE_ENCODER")  # host.loading.HostNetwork of kind reference_encoder
ViewConsistency = io.Custom("DP3D_VIEW_CONSISTENCY")  # HostNetwork of kind view_consistency
NovelView = io.Custom("DP3D_NOVEL_VIEW")  # HostNetwork of kind novel_view
Cameras = io.Custom("DP3D_CAMERAS")  # {"labels": float32 [V, 25], EG3D's camera labels}
Place = io.Custom("DP3D_PLACE")  # host.photographs.Placement
ViewSelection = io.Custom("DP3D_VIEW_SELECTION")  # patches.view_batches.Selection

OPTIONAL = {"optional": True}
ADVANCED = {"advanced": True}
ADDED = {"optional": True, "advanced": True}  # an input that graphs saved before it do not have
OWN_SIDE, SMALLEST_SIDE, LARGEST_SIDE = 0, 64, 2048


def whole(name: str, numbers: tuple[int, int, int], tooltip: str, **options) -> io.Input:
    """An INT widget; `numbers`: default, least, most; `options` are those of io.Int.Input."""
    default, least, most = numbers
    return io.Int.Input(name, default=default, min=least, max=most, tooltip=tooltip, **options)


def number(name: str, numbers: tuple[float, float, float, float], tooltip: str, **options) -> io.Input:
    """A FLOAT widget; `numbers`: default, least, most, step; `options` are those of io.Float.Input."""
    default, least, most, step = numbers
    return io.Float.Input(name, default=default, min=least, max=most, step=step, tooltip=tooltip, **options)


def switch(name: str, default: bool, tooltip: str, **options) -> io.Input:
    return io.Boolean.Input(name, default=default, tooltip=tooltip, **options)


def degrees(name: str, default: float, limit: float, tooltip: str, **options) -> io.Input:
    """An angle between -limit and limit."""
    return number(name, (default, -limit, limit, 1.0), tooltip, **options)


def distance(name: str, about: str, **options) -> io.Input:
    return number(
        name, (RADIUS, 0.5, 20.0, 0.05), f"Distance to the head's centre in EG3D's units; {about}.", **options
    )


def field_of_view(about: str, **options) -> io.Input:
    return number("fov", (FOV, 1.0, 120.0, 0.01), f"Field of view in degrees; {about}.", **options)


def percent_range() -> list[io.Input]:
    """The part of the sampling in which something acts."""
    about = "Where in the sampling it {}s: {} is the {} step."
    return [
        number("start_percent", (0.0, 0.0, 1.0, 0.01), about.format("begin", 0, "first"), **ADVANCED),
        number("end_percent", (1.0, 0.0, 1.0, 0.01), about.format("end", 1, "last"), **ADVANCED),
    ]


def resolution_input(tooltip: str) -> io.Input:
    """`resolution`: the side of the views in pixels, or 0 for what the networks were trained at."""
    return whole("resolution", (OWN_SIDE, OWN_SIDE, LARGEST_SIDE), tooltip, step=64)


def chosen_resolution(resolution: int, network, node: str) -> int:
    """The side in pixels that the widget of `node` means; 0 is that of `network` (a VAE, a CONTROL_NET or None).

    Raises:
        ValueError: a side that is too small for the networks.
    """
    if resolution == OWN_SIDE:
        return trained_side(network)
    if resolution < SMALLEST_SIDE:
        raise ValueError(
            f"{node}: resolution must be 0 (the networks' own) or lie between {SMALLEST_SIDE} and {LARGEST_SIDE}, got "
            f"{resolution}."
        )
    return resolution
