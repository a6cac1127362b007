"""Prints a SHA-256 of what the project computes, to show that a change of the code changed no number.

    python tests/fingerprints.py > before.txt      (in a checkout of the old commit)
    python tests/fingerprints.py > after.txt       (in the new one, same machine and packages)
    diff before.txt after.txt

Covered, each through its command: rendering; two training steps of every stage and what they export; the conversion of
a narrow checkpoint in the authors' layout; every golden number of the core and of the real ComfyUI; the demo's views.
Takes about five minutes on two cores; `--skip demo` leaves a part out. Equality to the bit holds on one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from diffportrait3d.conversion.layout import TextEncoderSizes, official_shapes
from diffportrait3d.diffusion import Schedule
from diffportrait3d.networks import AutoencoderConfig, UNetConfig

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: object) -> str:
    """The printed text of a command of this project, run by its module's name."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def array_digest(array: np.ndarray) -> str:
    header = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


def tensors_digest(path: Path) -> str:
    """Of names, types, shapes and values; the metadata holds minutes and folders, which differ from run to run."""
    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def image_digest(path: Path) -> str:
    return array_digest(np.asarray(Image.open(path)))


def training(folder: Path) -> Iterator[tuple[str, str]]:
    """Rendered images, networks after two steps of every stage, and their export in half precision."""
    out, weights = folder / "run", folder / "weights"
    run("training.miniature", "--preset", "smoke", "--out", out, "--data", folder / "data", "--export",
        "--weights", weights)  # fmt: skip
    for path in sorted((folder / "data").rglob("*.png")):
        yield f"rendered {path.relative_to(folder / 'data')}", image_digest(path)
    for root in (out, weights):
        for path in sorted(root.rglob("*.safetensors")):
            yield f"trained {path.relative_to(folder)}", tensors_digest(path)


def official_checkpoint(path: Path) -> Path:
    """A narrow checkpoint in the authors' layout, with random values."""
    groups = official_shapes(
        UNetConfig(model_channels=32, context_dim=32),
        AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, patch_size=1),
        TextEncoderSizes(vocabulary=50, width=32, positions=77, hidden=128, layers=2),
    )
    shapes = {name: shape for names in groups.values() for name, shape in names.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.05 * torch.randn(shapes[name], generator=generator) for name in sorted(shapes)}
    schedule = Schedule()
    tensors |= {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod}
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "global_step": 540000}, path)
    return path


def conversion(folder: Path) -> Iterator[tuple[str, str]]:
    """The converter's tensors."""
    checkpoint = official_checkpoint(folder / "model_state.th")
    run("diffportrait3d.convert", checkpoint, "--out", folder / "converted", "--verify")
    for path in sorted((folder / "converted").rglob("*.safetensors")):
        yield f"converted {path.name}", tensors_digest(path)


def golden(folder: Path) -> Iterator[tuple[str, str]]:
    """The table of golden numbers, as printed."""
    for line in run("evaluation.golden").splitlines():
        if re.search(r"\de-\d\d", line):
            yield "golden", line.strip()


def demo(folder: Path) -> Iterator[tuple[str, str]]:
    """The demo's views through the real ComfyUI server."""
    run("tools.demo", "--outputs", folder / "demo")
    for path in sorted((folder / "demo").rglob("view_*.png")):
        yield f"demo {path.name}", image_digest(path)


PARTS = {"training": training, "conversion": conversion, "golden": golden, "demo": demo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[], help="parts to leave out")
    skip = parser.parse_args().skip
    for name, part in PARTS.items():
        if name in skip:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lines = list(part(Path(folder)))
        if not lines:
            raise SystemExit(f"{name}: nothing was written.")
        for what, digest in lines:
            print(f"{digest}  {what}" if name != "golden" else f"{what}: {digest}", flush=True)


if __name__ == "__main__":
    main()
