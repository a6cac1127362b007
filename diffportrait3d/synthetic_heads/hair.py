"""Hair as one sheet draped over the skull: combed out of the crown, hugging the head down to the hairline,
and, for long styles, hanging freely below the widest part of the skull."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .materials import Look
from .mesh import HeadMesh, Noise, Surface, gauss, grid_triangles, interpolate_table, smooth

ROWS, COLUMNS = 56, 132
_EQUATOR = 84.0  # degrees from the crown where long hair stops hugging the skull and starts to hang
_LONG = ("bob", "long")


def hair_surfaces(mesh: HeadMesh, look: Look, generator: torch.Generator) -> list[Surface]:
    """The hair of a head in its rest pose (the scalp does not move): none for bald heads, else one or two surfaces."""
    noises = [Noise(generator, frequency) for frequency in (0.25, 1.0, 1.6)]
    if look.hair_style == "bald":
        return []
    surfaces = [_sheet(mesh, look, *noises)]
    if look.hair_style == "bun":
        surfaces.append(_bun(mesh, look, noises[1]))
    return surfaces


def skull_centre(mesh: HeadMesh) -> Tensor:
    """The point that hair is combed around: between the temples, above the ears."""
    p = mesh.rest[mesh.skull]
    return torch.stack(
        [p.new_tensor(0.0), mesh.landmarks[36:48, 1].mean() + 1.8, (p[:, 2].amin() + mesh.landmarks[27, 2]) / 2 + 0.3]
    )


def hairline(azimuth: Tensor, look: Look) -> Tensor:
    """Where hair ends, in degrees from the crown, for azimuths in degrees (0 = front, 180 = back)."""
    front = 57 + look.hairline + 17 * look.fringe
    temple = front + (6 if look.fringe else 14)
    table = [
        (0, front), (25, front + 1), (42, front + 5), (55, temple), (61, max(temple, 78)), (66, 97),
        (72, 106), (79, 110), (86, 98), (92, 89), (104, 84), (115, 90),
        (123, 114), (132, 124), (150, 130), (180, 131),
    ]  # fmt: skip
    if look.hair_style in _LONG:
        table = table[:5] + (
            [(68, 150), (76, 230), (180, 230)]
            if look.covers_ears
            else table[5:10] + [(108, 84), (117, 150), (123, 230), (180, 230)]
        )
    elif look.hair_style in ("bun", "afro"):
        table = table[:5] + [(66, 92), (78, 94)] + table[8:]
    knots = torch.tensor(table, dtype=torch.float32).T.contiguous()
    return interpolate_table(azimuth.abs(), knots[0], knots[1])


class _Skull:
    """Distance from a centre to the skull as a function of direction: a smoothed table over azimuth and polar angle."""

    def __init__(self, mesh: HeadMesh, rows: int = 37, columns: int = 72):
        self.centre = skull_centre(mesh)
        offset = mesh.rest[mesh.skull[:: max(1, len(mesh.skull) // 2500)]] - self.centre
        radius = offset.norm(dim=1)
        theta = torch.linspace(0, 180, rows)[:, None].expand(rows, columns)
        azimuth = (torch.arange(columns) * (360 / columns) - 180).expand(rows, columns)
        near = torch.cdist(spherical(theta, azimuth).view(-1, 3), offset / radius[:, None]).topk(4, largest=False)
        weight = 1 / (near.values + 0.02)
        table = ((radius[near.indices] * weight).sum(1) / weight.sum(1)).view(rows, columns)
        self.table = _blur(table)

    def __call__(self, theta: Tensor, azimuth: Tensor) -> Tensor:
        place = torch.stack([azimuth / 180, theta / 90 - 1], -1)[None]  # grid_sample wants -1..1
        return F.grid_sample(self.table[None, None], place, align_corners=True, padding_mode="border")[0, 0]


def spherical(theta: Tensor, azimuth: Tensor) -> Tensor:
    """Unit directions [..., 3] from the polar angle (0 = crown) and the azimuth (0 = front, 90 = +x), in degrees."""
    t, a = torch.deg2rad(theta), torch.deg2rad(azimuth)
    return torch.stack([torch.sin(t) * torch.sin(a), torch.cos(t), torch.sin(t) * torch.cos(a)], -1)


def _blur(table: Tensor) -> Tensor:
    """Light smoothing of a table around the head; its last column then repeats the first."""
    for _ in range(2):
        table = (table.roll(1, 1) + table.roll(-1, 1) + 2 * table) / 4
        padded = torch.cat([table[:1], table, table[-1:]])
        table = (padded[:-2] + padded[2:] + 2 * table) / 4
    return torch.cat([table, table[:, :1]], 1)


def _sheet(mesh: HeadMesh, look: Look, broad: Noise, clump: Noise, strand: Noise) -> Surface:
    skull = _Skull(mesh)
    azimuth = (torch.arange(COLUMNS) + 0.5) * (360 / COLUMNS) - 180
    end = _rounded(hairline(azimuth, look)) + 1.2 * torch.sin(azimuth * 0.21 + 3 * look.parting)
    long = look.hair_style in _LONG
    # rows follow the hairline, so its edge is smooth whatever the resolution
    reach = torch.linspace(0.01, 1.0, ROWS)[:, None]
    theta, az = reach * end, azimuth.expand(ROWS, COLUMNS)  # [R, C]
    hug = theta.clamp(max=_EQUATOR) if long else theta
    direction = spherical(hug, az)  # [R, C, 3]
    inside = _border_distance(theta, end)
    body = _volume(look, direction, theta, az, inside, broad, clump)
    point = skull.centre + direction * (skull(hug, az) + body)[..., None]
    if long:
        point = _hang(point, skull.centre, theta, az, look, clump)
    vertices = point.reshape(-1, 3)
    colour = _strands(look, direction, theta, az, body, strand)
    specular = torch.full((len(vertices),), 0.22)
    return Surface(vertices, grid_triangles(ROWS, COLUMNS), colour.reshape(-1, 3), specular, two_sided=long)


def _rounded(end: Tensor) -> Tensor:
    """Soften the corners of the hairline a little."""
    return (end.roll(1) + end.roll(-1) + 2 * end) / 4


def _border_distance(theta: Tensor, end: Tensor) -> Tensor:
    """About 1 well inside the hair, 0 on its border: the smallest distance to this and nearby columns' hairline."""
    distance = (end - theta) / 11
    for shift in range(1, 5):
        for side in (shift, -shift):
            distance = torch.minimum(distance, (end.roll(side) - theta) / 11 + 0.13 * shift)
    return distance.clamp(-1, 1)


def _volume(
    look: Look, direction: Tensor, theta: Tensor, az: Tensor, inside: Tensor, broad: Noise, clump: Noise
) -> Tensor:
    """Height of the hair above the skull in cm."""
    flat = direction.reshape(-1, 3)
    waves = {"curly": 0.30, "afro": 0.16, "buzz": 0.03}.get(look.hair_style, 0.13)
    fine = 9 if look.hair_style in ("curly", "afro") else 4
    shape = 1 + 0.22 * broad(flat * 8).view_as(theta) + waves * clump(flat * fine).view_as(theta)
    edge = inside.clamp(0, 1).sqrt()
    if look.hair_style == "swept":
        lift = gauss(theta - 42, 16.0) * gauss(az, 45.0)
        shape = shape * (1 + 0.9 * lift)
    parted = look.hair_style not in ("afro", "curly", "buzz")
    part = gauss(direction[..., 0] * 9 - look.parting, 0.55) * smooth(direction[..., 2], -0.3, 0.3) * parted
    body = look.hair_thickness * shape * edge * (1 - 0.55 * part)
    if look.fringe and look.hair_style != "afro":
        body = body * (1 - 0.3 * gauss(az, 40.0) * smooth(theta, 55, 70))
    if look.hair_style in _LONG and look.covers_ears:
        body = body + 1.0 * gauss(az.abs() - 98, 17.0) * gauss(theta - 95, 22.0) * edge
    return torch.where(inside > 0, body, inside * 0.8) - 0.10


def _hang(point: Tensor, centre: Tensor, theta: Tensor, az: Tensor, look: Look, clump: Noise) -> Tensor:
    """Rows beyond the equator fall straight down, a little wavy, tapering or turning in at the tips."""
    below = ((theta - _EQUATOR) / (230 - _EQUATOR)).clamp(min=0)[..., None]  # 0..1 along the hanging part
    length = 7.5 + 3.5 * look.hair_length if look.hair_style == "bob" else 13 + 6 * look.hair_length
    out, up = (point - centre) * point.new_tensor([1.0, 0.0, 1.0]), point.new_tensor([0.0, 1.0, 0.0])
    back = smooth(az.abs(), 90, 150)[..., None]
    places = torch.cat([out * 0.25, below * length * 0.35], -1)[..., [0, 2, 3]].reshape(-1, 3)
    wave = 0.05 * clump(places).view(*theta.shape, 1)
    turn_in = 0.30 * below**3 if look.hair_style == "bob" else 0.10 * below**2
    bulge = 0.10 * torch.sin(math.pi * below.clamp(max=1) * 0.8)
    scale = 1 + (bulge + wave) * (below > 0) - turn_in - 0.22 * back * below
    return centre + out * scale + (point - centre) * up - up * below * length


def _strands(look: Look, direction: Tensor, theta: Tensor, az: Tensor, body: Tensor, strand: Noise) -> Tensor:
    """Streaks along the combing direction, darker at the roots, in the parting and inside curls."""
    a = torch.deg2rad(az)
    if look.hair_style in ("curly", "afro", "buzz"):
        place = direction * 7
    else:
        place = torch.stack([torch.sin(a) * 9, torch.cos(a) * 9, theta / 60], -1)
    streak = strand(place.reshape(-1, 3)).view_as(theta)
    depth = (body / max(look.hair_thickness, 0.3)).clamp(0, 1.4)
    shade = (0.78 + 0.26 * depth) * (1 + 0.20 * streak)
    return look.hair * shade[..., None] + 0.02 * streak[..., None]


def _bun(mesh: HeadMesh, look: Look, clump: Noise) -> Surface:
    rows, columns, radius = 22, 30, 3.0 + 1.0 * look.hair_length
    t, a = torch.meshgrid(
        torch.linspace(0.05, math.pi - 0.05, rows), torch.arange(columns) * (2 * math.pi / columns), indexing="ij"
    )
    ball = torch.stack([torch.sin(t) * torch.sin(a), torch.cos(t), torch.sin(t) * torch.cos(a)], -1).reshape(-1, 3)
    tilt = math.radians(20 + 35 * abs(look.parting) / 4.5)
    away = torch.tensor([0.0, math.cos(tilt), -math.sin(tilt)])
    centre = skull_centre(mesh)
    base = _Skull(mesh)(torch.tensor([[math.degrees(tilt)]]), torch.tensor([[180.0]]))[0]
    place = centre + away * (base + 0.55 * radius)
    vertices = place + ball * torch.tensor([1.0, 0.8, 1.0]) * (radius * (1 + 0.06 * clump(ball * 4)))[:, None]
    colour = look.hair * (0.95 + 0.2 * torch.sin(8 * a.reshape(-1) + 5 * t.reshape(-1)))[:, None]
    return Surface(vertices, grid_triangles(rows, columns), colour, torch.full((len(vertices),), 0.22))
