"""The golden data: what the authors' released code gives for known weights and inputs.

The weights are never stored: they follow from each key and shape (scheme dp3d-det-1). The repository holds a packed
copy of inputs, outputs and samples of the intermediate tensors (`tests/data/golden_mid.npz`); the hint is rounded to
1/1024 there, which moves the outputs by less than 1e-5. A directory with the complete files can be used instead;
`tests/pack_golden.py` makes the packed copy of them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffportrait3d.networks import NETWORKS, UNetConfig
from diffportrait3d.networks.cross_view_attention import sinusoidal_table

PACKED = Path(__file__).resolve().parents[2] / "tests" / "data" / "golden_mid.npz"
GOLDEN_CONFIG = UNetConfig(model_channels=64, context_dim=96)
HINT_STEPS = 1024
TAP_SAMPLES = 64
PREFIXES = {
    kind: NETWORKS[kind].prefix for kind in ("unet", "reference_encoder", "view_controlnet", "view_consistency")
}


@dataclass(frozen=True)
class Golden:
    """Inputs, expected outputs and sampled intermediate tensors, float32 on the CPU."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    taps: dict[str, Tensor]  # at most TAP_SAMPLES values each, see `sample_tap`

    @property
    def context(self) -> Tensor:
        """The text tokens for all 8 views [8, 77, 96]."""
        return self.inputs["context"].repeat(8, 1, 1)


def deterministic_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that scheme dp3d-det-1 gives a checkpoint key: float32, exactly representable in float16.

    Positional tables are the sinusoids, unrounded. Matrices are uniform with std gain / sqrt(fan_in), norm scales
    1 +- 0.2, biases +- 0.1, from a Philox stream seeded with the key's SHA-256.
    """
    if key.endswith(".pe"):
        return sinusoidal_table(shape[1], shape[2])
    digest = hashlib.sha256(key.encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    integers = stream.random_raw(math.prod(shape)) >> np.uint64(40)
    uniform = torch.from_numpy(integers.astype(np.float32)) * 2.0**-23 - 1.0  # [-1, 1), exact
    if len(shape) > 1:
        fan_in = math.prod(shape[1:])
        values = uniform * float(np.float32(_gain(key) * math.sqrt(3.0 / fan_in)))
    elif key.endswith(".weight"):
        values = uniform * float(np.float32(0.2)) + 1.0
    else:
        values = uniform * float(np.float32(0.1))
    return values.half().float().reshape(shape)


def _gain(key: str) -> float:
    if any(part in key for part in (".temporal_transformer.proj_out.", ".zero_convs.", ".middle_block_out.")):
        return 0.7  # layers that training starts at zero contribute mildly
    return 1.5 if "to_q" in key or "to_k" in key else 1.0


def deterministic_weights(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """A state dict for `module` whose checkpoint keys start with `prefix`."""
    return {k: deterministic_tensor(prefix + k, tuple(v.shape)) for k, v in module.state_dict().items()}


def sample_tap(tensor: Tensor) -> Tensor:
    """Evenly spaced values of an intermediate tensor, at most TAP_SAMPLES."""
    flat = tensor.detach().float().flatten()
    return flat[:: max(1, flat.numel() // TAP_SAMPLES)][:TAP_SAMPLES].clone()


def load_golden(directory: str | Path | None = None) -> Golden:
    """Reads the packed copy in the repository, or the complete files of `directory`.

    Raises:
        FileNotFoundError: naming what is missing. ValueError: data of networks of another width.
    """
    if directory is not None:
        return _load_directory(Path(directory))
    with np.load(PACKED) as packed:
        groups: dict[str, dict[str, Tensor]] = {"inputs": {}, "outputs": {}, "taps": {}}
        for name in packed.files:
            group, key = name.split("/", 1)
            groups[group][key] = torch.from_numpy(packed[name])
    steps = groups["inputs"].pop("hint_steps").to(torch.int32).cumsum(-1)
    groups["inputs"]["hint"] = steps.float() / HINT_STEPS
    return Golden(**groups)


def _load_directory(directory: Path) -> Golden:
    files = {name: directory / f"{name}.safetensors" for name in ("inputs", "outputs", "taps")}
    missing = [str(f) for f in files.values() if not f.is_file()]
    if missing:
        raise FileNotFoundError(f"Golden files are missing: {', '.join(missing)}; give the folder that holds them.")
    loaded = {name: load_file(path) for name, path in files.items()}
    width = loaded["inputs"]["context"].shape[-1]
    if width != GOLDEN_CONFIG.context_dim:
        raise ValueError(
            f"{files['inputs']} has prompts of {width} numbers per token, and the golden networks read "
            f"{GOLDEN_CONFIG.context_dim}: these files are of networks of another width; give those of this one."
        )
    taps = {k: sample_tap(v) for k, v in loaded["taps"].items() if k != "bank_batch1_maxdiff"}
    return Golden(loaded["inputs"], loaded["outputs"], taps)
