"""Converts the authors' released checkpoint into the files this pack loads.

    python -m diffportrait3d.convert model_state-540000-001.th --out models/diffportrait3d --base sd15.safetensors

Run it in the folder of this pack, with the Python that runs ComfyUI. A Python that finds no modules in the current
folder (the portable ComfyUI's) takes the file instead: `python diffportrait3d/convert.py ...`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    __package__ = "diffportrait3d"

import torch

from .command import run_main
from .conversion import Options, convert
from .conversion.report import findings, next_steps, table
from .weights.files import CheckpointError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m diffportrait3d.convert",
        description="Splits the authors' checkpoint into reference encoder, view ControlNet, view consistency and,"
        " unless --base has the same, the base model.",
    )
    parser.add_argument("checkpoint", type=Path, help="model_state-540000-001.th, or the same as safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, e.g. models/diffportrait3d")
    parser.add_argument("--base", type=Path, help="your SD1.5 checkpoint; what is equal to it is not written")
    parser.add_argument("--dtype", choices=DTYPES, help="of the results (default: as in the checkpoint)")
    parser.add_argument("--overwrite", action="store_true", help="replace results of another checkpoint or dtype")
    parser.add_argument("--drop-surplus", action="store_true", help="leave out keys that are not the release's")
    parser.add_argument("--verify", action="store_true", help="read the results back and compare every value")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    settings = vars(parse_arguments(arguments))
    checkpoint, dtype = settings.pop("checkpoint"), DTYPES.get(settings.pop("dtype"))
    try:
        conversion = convert(checkpoint, Options(dtype=dtype, **settings))
    except (CheckpointError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(table(conversion))
    for line in [*findings(conversion), *next_steps(conversion)]:
        print(f"- {line}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
