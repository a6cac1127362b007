"""Meshes in the head frame, and the few mesh operations that the head providers share.

Head frame: centimetres, x to the right of the frontal image, y up, z out of the face; the eyes are near (+-3.1, 3.5,
9), the chin near (0, -7.5, 10), the crown near (0, 14.5, 2). `to_world` places it the way EG3D's crops place a face.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..cameras.labels import PIVOT

# World units per centimetre: a bald head takes about 70 % of the frame's height at focal 4.2647 and radius 2.7.
UNIT = 0.0185
HEAD_ORIGIN = (0.0, 3.0, 3.5)  # the point of the head frame that sits at the cameras' pivot

SKIN, TEETH, SOCKET = range(3)
TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))  # of numbers


class Surface(NamedTuple):
    """A coloured piece: vertices [V, 3] (head frame), triangles [T, 3], albedo [V, 3] (sRGB, 0..1), specular
    [V] (0..1). two_sided: open sheets are drawn from both sides, closed bodies only from outside
    (counter-clockwise corners)."""

    vertices: Tensor
    triangles: Tensor
    albedo: Tensor
    specular: Tensor
    two_sided: bool = False


@dataclass
class HeadMesh:
    """What a provider delivers, everything in the head frame.

    Attributes:
        vertices, rest: [V, 3] with and without the expression (`rest` anchors the colours).
        triangles: [T, 3].
        part: [V], one of SKIN, TEETH, SOCKET.
        landmarks, posed_landmarks: [68, 3] without and with the expression (iBUG order).
        eyes: [2, 3], eyeball centres (subject's right eye, at -x, first).
        skull: [S], vertices under the hair.
    """

    vertices: Tensor
    rest: Tensor
    triangles: Tensor
    part: Tensor
    landmarks: Tensor
    posed_landmarks: Tensor
    eyes: Tensor
    eye_radius: float
    skull: Tensor


def to_world(points: Tensor) -> Tensor:
    """Head frame (cm) -> EG3D world."""
    return (points - points.new_tensor(HEAD_ORIGIN)) * UNIT + points.new_tensor(PIVOT)


def vertex_normals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """Area-weighted unit normals [V, 3]; corners in counter-clockwise order give outward normals."""
    a, b, c = vertices[triangles].unbind(1)
    face = torch.linalg.cross(b - a, c - a)  # [T, 3]
    total = torch.zeros_like(vertices)
    for corner in range(3):
        total.index_add_(0, triangles[:, corner], face)
    return normalize(total, dim=1)


def grid_triangles(rows: int, columns: int, closed: bool = True) -> Tensor:
    """Triangles of a rows x columns vertex grid (row-major); `closed` joins the last column to the first."""
    i = torch.arange(rows - 1)[:, None] * columns
    j = torch.arange(columns if closed else columns - 1)[None]
    a, b = i + j, i + (j + 1) % columns
    c, d = a + columns, b + columns
    return torch.stack([torch.stack([a, c, b], -1), torch.stack([b, c, d], -1)]).reshape(-1, 3)


def gauss(x: Tensor, width: float | Tensor) -> Tensor:
    return torch.exp(-0.5 * (x / width) ** 2)


def smooth(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """0 below `low`, 1 above `high`, a cubic in between."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def interpolate_table(x: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """Piecewise linear interpolation of `value` given at rising `at`; constant outside."""
    k = torch.searchsorted(at, x.contiguous()).clamp(1, len(at) - 1)
    t = ((x - at[k - 1]) / (at[k] - at[k - 1])).clamp(0, 1)
    return torch.lerp(value[k - 1], value[k], t)


class Noise:
    """Smooth band-limited noise in 3D: a sum of plane waves with random directions and phases, about -1..1."""

    def __init__(self, generator: torch.Generator, frequency: float, octaves: int = 3):
        waves, gain = 6, 0.6  # per octave
        scale = torch.tensor([2.0**k for k in range(octaves)]).repeat_interleave(waves) * frequency
        self.wave = torch.randn(octaves * waves, 3, generator=generator) * scale[:, None]
        self.phase = torch.rand(octaves * waves, generator=generator) * 2 * math.pi
        self.weight = torch.tensor([gain**k for k in range(octaves)]).repeat_interleave(waves) / math.sqrt(waves)

    def to(self, device: torch.device | str) -> Noise:
        """A copy on another device."""
        moved = copy.copy(self)
        moved.wave, moved.phase, moved.weight = (v.to(device) for v in (self.wave, self.phase, self.weight))
        return moved

    def __call__(self, points: Tensor) -> Tensor:
        return torch.sin(points @ self.wave.T + self.phase) @ self.weight
