"""The faces that crops are aligned to: EG3D's five points, and 68 mean landmarks of our heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cameras.labels import RADIUS
from ..synthetic_heads.mesh import to_world

# The five standard points of the alignment that EG3D uses (Deep3DFaceRecon's `similarity_Lm3D_all.mat`, units of 10
# cm, the standard crop's camera 10 in front of them), moved into EG3D's world as its preparation of FFHQ moves cameras:
# times 0.27, plus (0, 0.006, 0.161), then scaled about the origin until that camera's distance is 2.7.
_STANDARD = torch.tensor(
    [
        [-0.31148657, 0.29036078, 0.13377953],
        [0.30979887, 0.28972036, 0.13179526],
        [0.0032535, -0.04617932, 0.55244243],
        [-0.25216928, -0.38133916, 0.22405732],
        [0.2484662, -0.38128236, 0.22235769],
        [0.0, 0.0, 10.0],  # the camera
    ],
    dtype=torch.float64,
) * 0.27 + torch.tensor([0.0, 0.006, 0.161], dtype=torch.float64)
FIVE_POINTS = _STANDARD[:5] * RADIUS / _STANDARD[5].norm()

# The 68 iBUG landmarks of ICT Face Model Light's mean head (MIT licence), head frame (cm).
# fmt: off
_MEAN = (
    (-7.36, 3.68, 3.66), (-7.28, 1.49, 3.93), (-6.94, -0.46, 4.53), (-6.56, -2.36, 5.17), (-5.72, -4.49, 6.13),
    (-4.3, -6.21, 7.35), (-3.05, -6.91, 8.77), (-1.54, -7.26, 10.27), (0, -7.57, 10.43), (1.54, -7.26, 10.27),
    (3.05, -6.91, 8.77), (4.3, -6.21, 7.35), (5.72, -4.49, 6.13), (6.56, -2.36, 5.17), (6.94, -0.46, 4.53),
    (7.28, 1.49, 3.93), (7.36, 3.68, 3.66), (-5.82, 5.2, 7.91), (-4.93, 5.98, 8.99), (-3.79, 6.26, 9.83),
    (-2.41, 6.19, 10.48), (-1.17, 5.91, 10.73), (1.17, 5.91, 10.73), (2.41, 6.19, 10.48), (3.79, 6.26, 9.83),
    (4.93, 5.98, 8.99), (5.82, 5.2, 7.91), (0, 3.74, 10.73), (0, 2.63, 11.52), (0, 1.61, 12.31), (0, 0.41, 13.07),
    (-1.25, -1.14, 10.87), (-0.6, -1.14, 11.42), (0, -1.2, 11.57), (0.6, -1.14, 11.42), (1.25, -1.14, 10.87),
    (-4.46, 3.43, 8.6), (-3.87, 3.87, 9.36), (-2.78, 3.94, 9.53), (-1.84, 3.25, 9.2), (-2.73, 3.08, 9.41),
    (-3.86, 3.07, 9.23), (1.84, 3.25, 9.2), (2.78, 3.94, 9.53), (3.87, 3.87, 9.36), (4.46, 3.43, 8.6),
    (3.86, 3.07, 9.23), (2.73, 3.08, 9.41), (-2.53, -3.52, 10.19), (-1.7, -2.78, 11.22), (-0.73, -2.42, 11.73),
    (0, -2.48, 11.84), (0.73, -2.42, 11.73), (1.7, -2.78, 11.22), (2.53, -3.52, 10.19), (1.8, -4.06, 10.9),
    (1.03, -4.3, 11.39), (0, -4.38, 11.55), (-1.03, -4.3, 11.39), (-1.8, -4.06, 10.9), (-2.21, -3.49, 10.13),
    (-1, -3.3, 11.09), (0, -3.32, 11.28), (1, -3.3, 11.09), (2.21, -3.49, 10.13), (1.07, -3.38, 11.04),
    (0, -3.4, 11.25), (-1.07, -3.38, 11.04),
)
# fmt: on
MEAN_LANDMARKS = to_world(torch.tensor(_MEAN, dtype=torch.float64))  # [68, 3], where rendered heads have them


FIVE_NUMBERS = (37, 43, 30, 48, 54)  # what the five points are among the 68, the eyes' middle being any of an eye


def five_of(landmarks: Tensor) -> Tensor:
    """The five points [5, D] of 68 landmarks [68, D]: each eye's middle (between its corners), nose tip, mouth
    corners; left to right as seen in the image. Source: Deep3DFaceRecon's `extract_5p`."""
    eyes = (landmarks[[36, 42]] + landmarks[[39, 45]]) / 2
    return torch.cat([eyes, landmarks[[30, 48, 54]]])
