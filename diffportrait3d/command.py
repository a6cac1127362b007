"""What all commands have in common: Ctrl-C, at any moment, and a full disk end them with one line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from .files import WriteError

INTERRUPTED = 130  # exit status, as shells have it


def begin_package(package: str) -> None:
    """To be called where a package begins. If one of its commands is being run (`python -m package.command`), Ctrl-C
    leaves at once until `run_main`: modules are being imported, and some would swallow the exception."""
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1] if "-m" in arguments[:-1] else ""
    if f"{module}.".startswith(f"{package}.") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: Any) -> None:
    print("Interrupted before it began.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def run_main(main: Callable[[], int]) -> int:
    """The exit status of a command's `main`."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        print("Interrupted; the same command resumes after what is finished.", file=sys.stderr)
        return INTERRUPTED
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
