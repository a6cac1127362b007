"""What the commands of this package have in common once their options are read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from diffportrait3d.files import WriteError


def run_command(work: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> int:
    """Do ``work(options)`` and return the exit status; an error that a user can mend ends the program as one sentence.

    ``options.threads``, where a command has it, is the number of CPU threads.
    """
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    try:
        work(options)
    except (ValueError, FileNotFoundError, WriteError) as error:  # DataError, CheckpointError, ... are ValueErrors
        raise SystemExit(f"{error}") from None
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on after what is finished.", file=sys.stderr)
        return 130
    return 0
