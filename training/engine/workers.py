"""Processes that divide the work of a command."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import Pool
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def worker_pool(count: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[Pool]:
    """`count` new processes, each of which calls `start(*arguments)` first. They ignore Ctrl-C, from their first moment
    on: this process gets the signal, too, and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool = multiprocessing.get_context("spawn").Pool(count, start, arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    with pool:
        yield pool


def run_each(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    start: Callable[..., None],
    arguments: tuple[Any, ...],
    workers: int,
    **progress: Any,
) -> Iterator[Any]:
    """work(item) of every item, in any order, after `start(*arguments)`: in this process or in several.

    progress: settings of the progress bar.
    """
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(items), smoothing=0.1, **progress))
        if workers <= 1 or len(items) < 2:
            start(*arguments)
            results = map(work, items)
        else:
            results = stack.enter_context(worker_pool(workers, start, arguments)).imap_unordered(work, items)
        for result in results:
            bar.update()
            yield result
