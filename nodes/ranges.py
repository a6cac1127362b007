"""Numbers that come over a wire: the host checks only those typed into a node."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from comfy_api.latest import io


def in_range(execute: Callable) -> Callable:
    """Decorates a node's `execute` (below @classmethod), so that it refuses numbers outside of their inputs' ranges.

    Raises (when called):
        ValueError: naming the node, the input, the number and the range. NaN is outside of every range.
    """
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(cls, *args, **kwargs) -> io.NodeOutput:
        given, schema = signature.bind(cls, *args, **kwargs).arguments, cls.define_schema()
        for each in schema.inputs:
            if isinstance(each, io.Int.Input | io.Float.Input) and each.id in given:
                _check(given[each.id], each, schema.display_name)
        return execute(cls, *args, **kwargs)

    return checked


def _check(value: float, limits: io.Int.Input | io.Float.Input, node: str) -> None:
    if not limits.min <= value <= limits.max:
        raise ValueError(f"{node}: {limits.id} must lie between {limits.min} and {limits.max}, got {value}.")
