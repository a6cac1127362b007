"""Quaternions."""

from __future__ import annotations

import torch

from diffportrait3d.cameras.rotations import matrix_from_quaternion, quaternion_from_matrix


def test_matrix_to_quaternion_and_back():
    generator = torch.Generator().manual_seed(0)
    quaternions = torch.nn.functional.normalize(torch.randn(200, 4, generator=generator, dtype=torch.float64), dim=1)
    half_turns = torch.eye(4, dtype=torch.float64)  # w = 0, where the usual formula divides by zero
    matrices = matrix_from_quaternion(torch.cat([quaternions, half_turns]))
    torch.testing.assert_close(matrices.mT @ matrices, torch.eye(3, dtype=torch.float64).expand_as(matrices))
    assert (torch.linalg.det(matrices) > 0).all()
    back = quaternion_from_matrix(matrices)
    assert (back[:, 0] >= 0).all()
    torch.testing.assert_close(matrix_from_quaternion(back), matrices)


def test_a_known_quarter_turn():
    quarter = torch.tensor([2**-0.5, 0.0, 0.0, 2**-0.5])  # about z: x becomes y
    torch.testing.assert_close(matrix_from_quaternion(quarter) @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))
