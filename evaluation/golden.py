"""Compares the core and the host path with the golden data, tensor by tensor.

    python -m evaluation.golden [--golden DIRECTORY] [--only core|host]

Prints the largest error of every golden tensor; ends with status 1 if one is outside its tolerance: 5e-5 (absolute)
for single passes, 1e-3 (of the tensor's largest magnitude) for the DDIM trajectories of the random network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from diffportrait3d.command import run_main

from .goldens.core import core_outputs
from .goldens.data import Golden, load_golden

SINGLE_PASS_TOLERANCE = 5e-5
TRAJECTORY_TOLERANCE = 1e-3


def error_of(name: str, output: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest error, its tolerance); trajectories are measured relative to their largest magnitude."""
    error = (output.double() - expected.double()).abs().max().item()
    if name.startswith("ddim"):
        return error / expected.double().abs().max().item(), TRAJECTORY_TOLERANCE
    return error, SINGLE_PASS_TOLERANCE


def host_path(golden: Golden) -> dict[str, Tensor]:
    """The outputs through a ComfyUI booted for it in this process."""
    from tools.embedded import temporary_host

    from .goldens.host import host_outputs

    with temporary_host() as host:
        return host_outputs(host.load_pack(), host.comfy, golden)


PATHS: dict[str, Callable[[Golden], dict[str, Tensor]]] = {"core": core_outputs, "host": host_path}


def compare(golden: Golden, outputs: dict[str, dict[str, Tensor]]) -> bool:
    """Prints the table; True if every tensor of every path is there and within its tolerance."""
    print(f"{'golden tensor':24}" + "".join(f"{path:>12}" for path in outputs) + f"{'tolerance':>12}")
    passed = True
    for name, expected in sorted(golden.outputs.items()):
        cells = []
        for path in outputs.values():
            error, tolerance = error_of(name, path[name], expected) if name in path else (float("inf"), 0.0)
            good = error <= tolerance
            passed = passed and good
            cells.append(f"{error:11.1e}{' ' if good else '!'}")
        print(f"{name:24}" + "".join(cells) + f"{tolerance:12.0e}")
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.golden", description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, help="folder with the complete golden files; default: the packed copy")
    parser.add_argument("--only", choices=PATHS, help="one path instead of both")
    options = parser.parse_args(arguments)
    try:
        golden = load_golden(options.golden)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    names = [options.only] if options.only else list(PATHS)
    passed = compare(golden, {name: PATHS[name](golden) for name in names})
    print("All within tolerance." if passed else "Outside tolerance (!).")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(run_main(main))
