"""Rotation matrices and unit quaternions (w, x, y, z)."""

from __future__ import annotations

import torch
from torch import Tensor


def quaternion_from_matrix(turn: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] -> unit quaternions [..., 4], w >= 0.

    The largest eigenvector of a symmetric 4x4 matrix made of the rotation (Bar-Itzhack, 2000): exact for
    rotations, and the closest one where rounding has left a matrix that is not quite orthonormal.
    """
    m = turn.double()
    (a, b, c), (d, e, f), (g, h, i) = ([m[..., row, column] for column in range(3)] for row in range(3))
    rows = [
        [a + e + i, h - f, c - g, d - b],
        [h - f, a - e - i, b + d, c + g],
        [c - g, b + d, e - a - i, f + h],
        [d - b, c + g, f + h, i - a - e],
    ]
    symmetric = torch.stack([torch.stack(row, -1) for row in rows], -2)
    quaternion = torch.linalg.eigh(symmetric).eigenvectors[..., -1]
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def matrix_from_quaternion(quaternion: Tensor) -> Tensor:
    """Quaternions [..., 4] of any length but zero -> rotation matrices [..., 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
