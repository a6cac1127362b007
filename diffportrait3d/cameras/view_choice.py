"""Choosing some of the views of a batch: by their numbers, or by the angles of their cameras."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .labels import camera_angles, split_label

NUMBER, RANGE = re.compile(r"-?\d+"), re.compile(r"(-?\d+)\s*-\s*(-?\d+)")
LAYOUT = "0, 2, 5-7 or -1 for the last"


def parse_numbers(text: str, count: int) -> list[int]:
    """Numbers of views in the order of the text, e.g. "5, 0-2" -> [5, 0, 1, 2]; a range may run backwards.

    Args:
        text: numbers and ranges, both ends included, with commas or spaces between; negative ones count from the end.
        count: how many views there are.

    Raises:
        ValueError: naming the part that is no number, is out of range, or is named twice; or nothing is named.
    """
    chosen: list[int] = []
    for part in re.findall(r"-?\d+\s*-\s*-?\d+|[^,;\s]+", text):
        between = RANGE.fullmatch(part)
        if not between and not NUMBER.fullmatch(part):
            raise ValueError(f"numbers {text!r}: {part!r} is no number of a view; write them as {LAYOUT}.")
        ends = [_place(end, count, text) for end in (between.groups() if between else (part, part))]
        step = 1 if ends[0] <= ends[1] else -1
        chosen += range(ends[0], ends[1] + step, step)
    if not chosen:
        raise ValueError(f"numbers is empty; write the numbers of the views as {LAYOUT}.")
    twice = [number for number in chosen if chosen.count(number) > 1]
    if twice:
        raise ValueError(f"numbers {text!r} names view {twice[0]} more than once; name every view once.")
    return chosen


def _place(number: str, count: int, text: str) -> int:
    place = int(number) + (count if number.startswith("-") else 0)
    if not 0 <= place < count:
        raise ValueError(f"numbers {text!r}: there is no view {number}; the {count} views are 0 to {count - 1}.")
    return place


def views_within(labels: Tensor, yaw: tuple[float, float], pitch: tuple[float, float]) -> list[int]:
    """Numbers of the cameras [V, 25] whose angles lie within both ranges (degrees, ends included).

    Args:
        yaw: from the first to the second, through 180 where the first is the larger one.

    Raises:
        ValueError: no camera lies there (the message says where they are), or pitch is upside down.
    """
    if pitch[0] > pitch[1]:
        raise ValueError(f"pitch_min {pitch[0]} is larger than pitch_max {pitch[1]}; swap them.")
    angles, slack = camera_angles(labels), 1e-3  # float32 cameras at an end of the range belong to it
    low, high = (angles.yaw >= yaw[0] - slack), (angles.yaw <= yaw[1] + slack)
    inside = low & high if yaw[0] <= yaw[1] else low | high
    inside &= (angles.pitch >= pitch[0] - slack) & (angles.pitch <= pitch[1] + slack)
    chosen = inside.nonzero().flatten().tolist()
    if not chosen:
        spans = [
            f"{name} {found.min():.1f} to {found.max():.1f}"
            for name, found in (("yaw", angles.yaw), ("pitch", angles.pitch))
        ]
        raise ValueError(
            f"no view lies in yaw {yaw[0]} to {yaw[1]} and pitch {pitch[0]} to {pitch[1]}; "
            f"the cameras have {' and '.join(spans)}."
        )
    return chosen


def nearest_views(labels: Tensor, direction: Tensor, count: int) -> list[int]:
    """Numbers of the `count` cameras [V, 25] that look most nearly as `direction` (a label [25]) does, nearest first.

    Raises:
        ValueError: there are fewer cameras than `count`.
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"count must be 1 to {len(labels)}, as there are so many views, not {count}.")
    towards, wanted = (split_label(each)[0][..., :3, 2].double() for each in (labels, direction))
    return torch.argsort(towards @ wanted, descending=True, stable=True)[:count].tolist()


def left_over(chosen: list[int], count: int) -> list[int]:
    """The numbers from 0 to count - 1 that are not among `chosen`, in order."""
    return sorted(set(range(count)) - set(chosen))
