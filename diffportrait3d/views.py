"""Grouping many views into overlapping windows that the cross-view attention can hold."""

from __future__ import annotations

import math


def check_window(size: int, overlap: int) -> None:
    """Raises ValueError unless windows of `size` views can share `overlap` of them with the next."""
    if size < 2:
        raise ValueError(f"A window needs at least 2 views, not {size}.")
    if not 0 <= overlap < size:
        raise ValueError(f"The overlap of windows of {size} views must be 0 to {size - 1}, not {overlap}.")


def view_windows(views: int, size: int, overlap: int, closed: bool = False, step: int = 0) -> list[list[int]]:
    """Windows of neighbouring views that cover all of them; the grid of windows is shifted at every step.

    A view's window changes from step to step, so whatever one view knows reaches all others after some steps, and no
    two neighbours are separated at every step. The shifts are the van der Corput sequence: evenly spread after any
    number of steps.

    Args:
        views: V. Up to `size` of them are one window.
        size: views per window. overlap: views that neighbouring windows share at least.
        closed: the last view is the neighbour of the first, and windows go round.
        step: of the sampling.

    Returns:
        lists of `size` indices (of V indices if V is smaller)

    Raises:
        ValueError: a window of fewer than 2 views, or an overlap that is not smaller than the window.
    """
    check_window(size, overlap)
    if views <= size:
        return [list(range(views))]
    stride = size - overlap
    shift = int(stride * van_der_corput(step))
    if closed:
        count = math.ceil(views / stride)
        starts = [shift + number * views // count for number in range(count)]
    else:
        last = views - size
        starts = sorted({min(max(start, 0), last) for start in range(-shift, last + stride, stride)})
    return [[(start + offset) % views for offset in range(size)] for start in starts]


def window_weights(size: int) -> list[float]:
    """How much each view of a window counts where windows overlap: rising to the middle, 1 at the ends."""
    return [float(min(position + 1, size - position)) for position in range(size)]


def van_der_corput(index: int) -> float:
    """The index-th number (0, 1/2, 1/4, 3/4, 1/8, ...) of the sequence that fills [0, 1) evenly."""
    value, unit = 0.0, 0.5
    while index:
        value += unit * (index & 1)
        index, unit = index >> 1, unit / 2
    return value
