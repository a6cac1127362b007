"""Processes that share out the work of a command."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from typing import Any


@contextlib.contextmanager
def worker_pool(count: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[Pool]:
    """`count` new processes, each of which calls `start(*arguments)` first. They ignore Ctrl-C, from their first moment
    on: this process is told, too, and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool = multiprocessing.get_context("spawn").Pool(count, start, arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    with pool:
        yield pool
