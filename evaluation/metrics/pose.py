"""Errors of cameras, and the small network that reads a camera's direction from an image of a head."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffportrait3d.weights.safetensors_writer import write_tensors

FORMAT = "diffportrait3d-pose-regressor"
INPUT_SIZE = 64


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """Degrees between unit vectors [..., 3]; exact for small angles too."""
    cross = torch.linalg.cross(first.double(), second.double()).norm(dim=-1)
    return torch.rad2deg(torch.atan2(cross, (first.double() * second.double()).sum(-1))).to(first.dtype)


class PoseRegressor(nn.Module):
    """Images [N, 3, H, W] in [-1, 1], any square size -> unit viewing directions [N, 3] in world axes."""

    def __init__(self, width: int = 24):
        super().__init__()
        if width % 8:
            raise ValueError(f"width must be a multiple of 8 (norm groups), got {width}")
        self.width = width
        self.features = nn.Sequential(
            *_layer(3, width, stride=2),  # 64 -> 32
            *_layer(width, 2 * width, stride=2),
            *_layer(2 * width, 4 * width, stride=2),
            *_layer(4 * width, 4 * width, stride=1),
            *_layer(4 * width, 5 * width, stride=2),  # 8 -> 4
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(5 * width * (INPUT_SIZE // 16) ** 2, 96), nn.SiLU(), nn.Linear(96, 3)
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.raw(images), dim=-1)

    def raw(self, images: Tensor) -> Tensor:
        """The direction before normalisation [N, 3]."""
        if images.shape[-1] != INPUT_SIZE:
            images = F.interpolate(images, size=INPUT_SIZE, mode="area")
        return self.head(self.features(images))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Like forward, averaged with the mirrored images (the same head seen from the mirrored side)."""
        mirror = torch.tensor([-1.0, 1.0, 1.0], device=images.device)
        return F.normalize(self(images) + self(images.flip(-1)) * mirror, dim=-1)


def _layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]


def save_pose_regressor(path: str | Path, model: PoseRegressor, **facts) -> None:
    """Float16 safetensors; facts (JSON-able) go to the metadata."""
    tensors = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": FORMAT, "width": str(model.width), **{k: json.dumps(v) for k, v in facts.items()}}
    write_tensors(Path(path), tensors, metadata)


def load_pose_regressor(path: str | Path) -> PoseRegressor:
    """Float32 on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a pose regressor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No pose regressor at '{path}'; train it: python -m evaluation.pose_regressor --data DIR --out {path}"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k).float() for k in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a readable safetensors file ({error}); train it again.") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"'{path}' is not a pose regressor (format {metadata.get('format')!r}, expected {FORMAT!r}).")
    model = PoseRegressor(int(metadata["width"]))
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)
