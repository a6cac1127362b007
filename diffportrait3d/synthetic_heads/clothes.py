"""Neck, shoulders and a garment: one lathe-like body below the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .materials import Look
from .mesh import SKIN, TABLES, HeadMesh, Noise, Surface, grid_triangles, interpolate_table, smooth, vertex_normals

ROWS, COLUMNS = 38, 76
# Height, half width, half depth and centre z of the bust's cross-sections (cm).
_SECTIONS = TABLES["bust sections"]


def dress(mesh: HeadMesh, head: Surface, look: Look, generator: torch.Generator) -> list[Surface]:
    """The head's surface and the bust, both bare only above the neckline, and a garment that follows them below it."""
    noise = Noise(generator, 0.35)
    width = 1 + 0.05 * float(torch.randn(1, generator=generator).clamp(-2, 2))
    vertices = _bust(width)
    colour = look.skin.expand(len(vertices), 3) * (1 + 0.02 * noise(vertices))[:, None]
    bust = Surface(vertices, grid_triangles(ROWS, COLUMNS), colour, torch.full((len(vertices),), 0.08))
    skin = mesh.triangles[(mesh.part == SKIN)[mesh.triangles].all(1)]
    surfaces = []
    for body, faces in ((head, skin), (bust, bust.triangles)):
        height = body.vertices[:, 1] - _neckline(body.vertices, look)
        bare = (height > -1.0)[body.triangles].any(1)
        surfaces += [
            body._replace(triangles=body.triangles[bare]),
            *_garment(body.vertices, faces, height, look, noise),
        ]
    return surfaces


def _garment(vertices: Tensor, triangles: Tensor, height: Tensor, look: Look, noise: Noise) -> list[Surface]:
    """A copy of the body, outside of it below the neckline and inside of it above: the two meet in a clean hem."""
    near = triangles[(height < 1.5)[triangles].all(1)]
    if not len(near):
        return []
    lift = 0.55 - 1.1 * smooth(height, -0.45, 0.45) + 0.10 * noise(vertices * 2) * smooth(-height, 0, 2)
    cloth = vertices + vertex_normals(vertices, triangles) * lift[:, None]
    used, near = near.unique(return_inverse=True)
    colour = _fabric(cloth, height, look, noise)[used]
    return [Surface(cloth[used], near, colour, torch.full((len(used),), 0.03))]


def _bust(width: float) -> Tensor:
    """[ROWS * COLUMNS, 3] from inside the neck down to the chest, wide shoulders, flat chest."""
    knots = torch.tensor(_SECTIONS).flip(0).T.contiguous()  # rising heights
    angle = torch.arange(COLUMNS) * (2 * math.pi / COLUMNS)
    y = torch.cat([torch.linspace(-7, -16, ROWS - 12), torch.linspace(-16, -30, 13)[1:]])
    half_width, depth, centre = (interpolate_table(y, knots[0], knots[k])[:, None] for k in (1, 2, 3))
    sine, cosine = torch.sin(angle), torch.cos(angle)
    power = 0.85  # a superellipse: rounder than a box, fuller than an ellipse
    x = half_width * width * sine.sign() * sine.abs() ** power
    z = depth * cosine.sign() * cosine.abs() ** power + centre
    y = y[:, None] - 0.8 * smooth(half_width, 6, 14) * smooth(cosine, 0.2, 1.0)  # the neckline dips in front
    return torch.stack([x, y.expand_as(x), z], -1).reshape(-1, 3)


def _neckline(points: Tensor, look: Look) -> Tensor:
    """Height of the hem at each point: a high collar, a V or a round neckline."""
    x, _, z = points.unbind(1)
    front = smooth(z, -1.5, 4.5)
    if look.collar < 0.25:
        return -7.6 - 2.2 * front
    if look.collar < 0.5:
        return -9.2 - 1.2 * front - 4.0 * front * (1 - x.abs() / 5).clamp(min=0)
    return -9.6 - (1.2 + 1.8 * look.collar) * front


def _fabric(points: Tensor, height: Tensor, look: Look, noise: Noise) -> Tensor:
    second = torch.zeros(len(points))
    if look.pattern == "stripes":
        second = (torch.sin(points[:, 1] * 3.2) > 0.2).float()
    elif look.pattern == "zip":
        second = (points[:, 0].abs() < 0.45).float() * (points[:, 2] > 0).float()
    elif look.pattern == "knit":
        second = 0.25 * (torch.sin(points[:, 0] * 4) * torch.sin(points[:, 1] * 4) > 0).float()
    second = torch.maximum(second, smooth(height, -0.75, -0.6) * (look.pattern != "plain"))
    colour = look.cloth * (1 - second[:, None]) + look.cloth_second * second[:, None]
    return colour * (1 + 0.08 * noise(points * 3))[:, None]
