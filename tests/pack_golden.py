"""Makes the packed copy of the golden data, `tests/data/golden_mid.npz`, from the complete files.

python tests/pack_golden.py DIRECTORY
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from evaluation.goldens.data import HINT_STEPS, PACKED, load_golden


def main() -> None:
    golden = load_golden(sys.argv[1])
    inputs = dict(golden.inputs)
    hint = (inputs.pop("hint") * HINT_STEPS).round().to(torch.int16)
    inputs["hint_steps"] = torch.diff(hint, dim=-1, prepend=torch.zeros_like(hint[..., :1]))  # along rows: packs well
    groups = {"inputs": inputs, "outputs": golden.outputs, "taps": golden.taps}
    arrays = {f"{group}/{k}": v.numpy() for group, tensors in groups.items() for k, v in tensors.items()}
    np.savez_compressed(PACKED, **arrays)
    print(f"{PACKED}: {PACKED.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
