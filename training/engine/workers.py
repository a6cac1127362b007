"""Processes that divide the work of a command."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import Pool
from typing import Any

import torch
from tqdm import tqdm

_work: Callable[[Any], Any]  # of a worker process


@contextlib.contextmanager
def worker_pool(
    count: int, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], threads: int = 1
) -> Iterator[Pool]:
    """`count` new processes of so many torch threads. Each makes its `make(*arguments)` once, which `call` calls then.

    They ignore Ctrl-C, from their first moment on: this process gets the signal, too, and ends them.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool = multiprocessing.get_context("spawn").Pool(count, _start, (make, arguments, threads))
    finally:
        signal.signal(signal.SIGINT, before)
    with pool:
        yield pool


def _start(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], threads: int) -> None:
    global _work
    torch.set_num_threads(threads)
    _work = make(*arguments)


def call(item: Any) -> Any:
    """In a worker process: its work on an item."""
    return _work(item)


def run_each(
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    workers: int,
    **progress: Any,
) -> Iterator[Any]:
    """`make(*arguments)` of every item, in any order: made once in this process, or in each of several.

    progress: settings of the progress bar.
    """
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(items), smoothing=0.1, **progress))
        if workers <= 1 or len(items) < 2:
            results = map(make(*arguments), items)
        else:
            results = stack.enter_context(worker_pool(workers, make, arguments)).imap_unordered(call, items)
        for result in results:
            bar.update()
            yield result
