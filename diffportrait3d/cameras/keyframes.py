"""Camera paths through poses written by hand, one keyframe per line."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

LAYOUT = "yaw pitch [roll] [distance] [fov]"
_LIMITS = {
    "yaw": (-720.0, 720.0),
    "pitch": (-89.0, 89.0),
    "roll": (-720.0, 720.0),
    "distance": (0.1, 100.0),
    "fov": (1.0, 120.0),
}


class Keyframe(NamedTuple):
    """Degrees; distance to the look-at point in world units."""

    yaw: float
    pitch: float
    roll: float
    distance: float
    fov: float


def parse_keyframes(text: str, roll: float, distance: float, fov: float) -> list[Keyframe]:
    """Keyframes from lines of `LAYOUT`, numbers separated by blanks or commas; empty lines and what follows a
    `#` are left out. `roll`, `distance` and `fov` stand in for numbers that a line does not give.

    Raises:
        ValueError: naming the line, if there is one.
    """
    keyframes = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = re.split(r"[,\s]+", line.split("#")[0].strip(" \t,"))
        if words == [""]:
            continue
        if not 2 <= len(words) <= len(Keyframe._fields):
            raise ValueError(f"keyframes, line {number}: expected '{LAYOUT}', got {len(words)} numbers in {line!r}.")
        values = [_number(word, name, number) for word, name in zip(words, Keyframe._fields, strict=False)]
        keyframes.append(Keyframe(*values, *(roll, distance, fov)[len(values) - 2 :]))
    if not keyframes:
        raise ValueError(f"There are no keyframes; write one per line as '{LAYOUT}' in degrees.")
    return keyframes


def interpolate_keyframes(keyframes: list[Keyframe], views: int) -> dict[str, Tensor]:
    """{field of Keyframe: [views]} spread evenly from the first keyframe to the last, passing smoothly through
    those between and never beyond the values of the two around.

    The curve is the monotone cubic of Fritsch and Carlson (1980) with harmonic-mean slopes.
    """
    knots = torch.tensor(keyframes, dtype=torch.float64)  # [K, 5]
    if len(knots) == 1:
        values = knots.expand(views, -1)
    else:
        values = _monotone_cubic(knots, torch.linspace(0, len(knots) - 1, views, dtype=torch.float64))
    return dict(zip(Keyframe._fields, values.unbind(1), strict=True))


def _number(word: str, name: str, line: int) -> float:
    try:
        value = float(word)
    except ValueError:
        raise ValueError(f"keyframes, line {line}: {name} {word!r} is not a number; write '{LAYOUT}'.") from None
    low, high = _LIMITS[name]
    if not low <= value <= high:
        raise ValueError(f"keyframes, line {line}: {name} must lie between {low:g} and {high:g}, got {word}.")
    return value


def _monotone_cubic(knots: Tensor, places: Tensor) -> Tensor:
    """Values [V, D] at `places` [V] of the curve through knots [K, D] that lie at 0, 1, ..., K - 1."""
    secants = knots.diff(dim=0)  # [K-1, D]
    before, after = secants[:-1], secants[1:]
    inner = torch.where(before * after > 0, 2 * before * after / (before + after), 0.0)
    slopes = torch.cat([secants[:1], inner, secants[-1:]])  # [K, D]
    return torch.from_numpy(CubicHermiteSpline(range(len(knots)), knots, slopes)(places))
