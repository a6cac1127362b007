"""A head made of formulas: needs no data, and is what camera images show.

The skull, face and neck are stacked cross-sections (`_SECTIONS`) with relief added in front; lids, ears and the mouth's
opening are pieces of their own. Proportions follow common anatomical averages in the head frame of `mesh.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .materials import Dice
from .mesh import SKIN, SOCKET, TABLES, HeadMesh, gauss, grid_triangles, interpolate_table, smooth

ROWS, COLUMNS = 112, 120
# From crown to neck: height in front and behind, half width, foremost and hindmost z (cm).
_SECTIONS = TABLES["head sections"]


class Shape:
    """The proportions of one head with a mild expression, drawn; in cm unless said otherwise."""

    def __init__(self, generator: torch.Generator):
        dice = Dice(generator)
        n = dice.normal
        self.width = 1 + n(0.04)  # factors
        self.height = 1 + n(0.025)
        self.depth = 1 + n(0.025)
        self.jaw = 1 + n(0.06)
        self.chin = 0.4 + n(0.3)
        self.cheek = 0.5 + n(0.25)
        self.brow = 0.45 + n(0.2)
        self.eye_x = 3.15 + n(0.12)
        self.eye_y = 3.5 + n(0.12)
        self.lid_open = dice.uniform(0.40, 0.66)
        self.lid_tilt = n(0.08)
        self.nose_length = 1 + n(0.07)
        self.nose_width = 1.15 + n(0.13)
        self.nose_height = 2.6 + n(0.3)
        self.mouth_y = -3.4 + n(0.2)
        self.mouth_width = 2.45 + n(0.2)
        self.lip = 0.45 + n(0.12)
        self.smile = max(-0.25, dice.uniform(-0.45, 0.8))  # how far the corners rise
        self.opening = max(0.0, dice.uniform(-0.9, 0.55))  # gap between the lips
        self.brow_raise = n(0.25)
        self.ear = 1 + n(0.08)
        self.ear_angle = 24 + n(5.0)  # degrees from the skull


def analytic_head(generator: torch.Generator) -> HeadMesh:
    """Draws a head; the expression is part of its shape, so posed and rest vertices are the same."""
    shape = Shape(generator)
    skin = _skull_and_face(shape)
    eyes = torch.tensor([[side * shape.eye_x, shape.eye_y, 7.85] for side in (-1.0, 1.0)])
    eye_radius = 1.5
    pieces = [(skin, grid_triangles(ROWS, COLUMNS))]
    pieces += [_lid(eye, eye_radius, shape, upper) for eye in eyes for upper in (True, False)]
    ears = torch.tensor([[side * 7.15 * shape.width, 1.6, -0.9] for side in (-1.0, 1.0)])
    pieces += [_ear(ear, shape) for ear in ears]
    offsets = torch.tensor([0] + [len(vertices) for vertices, _ in pieces]).cumsum(0)
    vertices = torch.cat([vertices for vertices, _ in pieces])
    triangles = torch.cat([faces + offset for (_, faces), offset in zip(pieces, offsets, strict=False)])
    part = torch.full((len(vertices),), SKIN)
    part[: len(skin)][_mouth_gap(skin, shape)] = SOCKET
    skull = torch.nonzero((skin[:, 1] > -9) & ((skin[:, 2] < 9.0) | (skin[:, 1] > 6))).squeeze(1)
    landmarks = _landmarks(skin, eyes, eye_radius, shape)
    return HeadMesh(vertices, vertices, triangles, part, landmarks, landmarks, eyes, eye_radius, skull)


def _sections() -> Tensor:
    """The table at ROWS heights, rounded: [5, ROWS]."""
    table = torch.tensor(_SECTIONS).T.contiguous()
    at = torch.linspace(0, table.shape[1] - 1, ROWS)
    knots = torch.arange(table.shape[1], dtype=torch.float32)
    rows = torch.stack([interpolate_table(at, knots, row) for row in table])
    for _ in range(8):
        rows = torch.cat([rows[:, :1], (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4, rows[:, -1:]], 1)
    return rows


def _skull_and_face(shape: Shape) -> Tensor:
    y_front, y_back, half, front, back = _sections()[:, :, None]
    phi = torch.arange(COLUMNS) * (2 * math.pi / COLUMNS) - math.pi
    phi = phi - 0.35 * torch.sin(phi)  # more columns in front
    sine, cosine = torch.sin(phi), torch.cos(phi)
    y = torch.lerp(y_back, y_front, (cosine + 1) / 2)
    lower = smooth(-y_front, -1.0, 6.0)
    half = half * shape.width * (1 + (shape.jaw - 1) * lower * smooth(y_front, -12, -8))
    middle = 1.2 - 0.6 * lower
    boxy = 0.80 + 0.12 * smooth(y_front, 6, 12) + 0.12 * smooth(-y_front, 3, 7)
    z_front = middle + (front - middle) * cosine.clamp(min=0) ** boxy
    z_back = middle + (middle - back) * shape.depth * cosine.clamp(max=0)
    x = half * sine.sign() * sine.abs() ** 0.94
    z = torch.where(cosine > 0, z_front, z_back)
    y = torch.where(y > shape.eye_y, shape.eye_y + (y - shape.eye_y) * shape.height, y)
    facing = smooth(cosine, 0.05, 0.45) * smooth(y_front, -8.2, -6.8)
    x, y, z = torch.broadcast_tensors(x, y, z)
    z = z + facing * _relief(x, y, shape)
    return torch.stack([x, y, z], -1).reshape(-1, 3)


def _relief(x: Tensor, y: Tensor, shape: Shape) -> Tensor:
    """How far features rise from the smooth face (cm along z)."""
    ax = x.abs()
    ey, tip, base = shape.eye_y, shape.eye_y - 3.1 * shape.nose_length, shape.eye_y - 4.5 * shape.nose_length
    d = shape.brow * gauss(y - (ey + 2.3 + shape.brow_raise), 0.75) * gauss(ax - 2.6, 1.8)
    socket = torch.sqrt(((ax - shape.eye_x) / 1.75) ** 2 + ((y - ey) / 1.15) ** 2)
    d = d - 0.95 * gauss(socket, 0.8) - 0.9 * smooth(1.1 - socket, 0.0, 0.45)
    t = ((ey + 0.9 - y) / (ey + 0.9 - tip)).clamp(0, 1)
    under = torch.where(y < tip, torch.exp(-(((tip - y) / 1.05) ** 3)), torch.ones_like(y))
    bridge = smooth(ey + 2.2 - y, 0, 1.6)
    d = d + shape.nose_height * (0.10 + 0.90 * t**1.15) * gauss(x, 0.55 + 0.42 * t) * under * bridge
    d = d + 0.75 * gauss(ax - shape.nose_width, 0.48) * gauss(y - (base + 0.75), 0.48)
    d = d - 0.30 * gauss(ax - shape.nose_width - 0.75, 0.35) * gauss(y - (base + 0.5), 0.9)  # fold beside the wings
    d = d + shape.cheek * gauss(ax - 4.3, 1.6) * gauss(y - (ey - 3.0), 1.4)
    d = d + (0.15 + shape.chin) * gauss(x, 1.7) * gauss(y + 6.5, 1.0)
    d = d - 0.35 * gauss(x, 2.2) * gauss(y - (shape.mouth_y - 1.75), 0.55)
    line, u = _lip_line(x, shape), x / shape.mouth_width
    gap = shape.opening
    d = d + 0.45 * gauss(u, 0.75) * gauss(y - line, 1.5)
    body = smooth(1.1 - u.abs(), 0, 0.5)
    upper, lower = gauss(y - (line + 0.42 + gap / 2), 0.32), gauss(y - (line - 0.50 - gap / 2), 0.36)
    d = d + shape.lip * body * (upper + 1.15 * lower)
    d = d - (0.40 + 0.9 * gap) * body * gauss(y - line, 0.13 + 0.45 * gap)
    return d - 0.18 * gauss(x, 0.25) * gauss(y - (line + 1.25), 0.4)  # philtrum


def _lip_line(x: Tensor, shape: Shape) -> Tensor:
    """Height of the line between the lips."""
    return shape.mouth_y + shape.smile * ((x / shape.mouth_width) ** 2).clamp(max=1.6) - 0.10 * gauss(x, 0.35)


def _mouth_gap(skin: Tensor, shape: Shape) -> Tensor:
    """Skin vertices that lie between parted lips: they are coloured like the inside of the mouth."""
    if shape.opening <= 0.05:
        return torch.zeros(len(skin), dtype=torch.bool)
    x, y, z = skin.unbind(1)
    lens = shape.opening * 0.75 * (1 - (x / (0.85 * shape.mouth_width)) ** 2)
    return ((y - _lip_line(x, shape)).abs() < lens) & (z > 6)


def _lid_edge(x: Tensor, shape: Shape, upper: bool, side: float) -> Tensor:
    """Height of a lid's edge above the eye's centre at x (cm from the centre)."""
    arch = (1 - (x / 1.48) ** 2).clamp(min=0)
    height = shape.lid_open * arch**0.8 if upper else -0.42 * arch
    return height + shape.lid_tilt * side * x - 0.05


def _lid(eye: Tensor, radius: float, shape: Shape, upper: bool) -> tuple[Tensor, Tensor]:
    """A lid as a piece of a sphere a little larger than the eyeball, from the lid's edge to well inside the socket."""
    rows, columns, shell = 10, 30, radius * 1.075
    side = float(eye[0].sign())
    x = torch.linspace(-1.52, 1.52, columns)
    edge = _lid_edge(x, shape, upper, side)
    far = (1 if upper else -1) * (shell**2 - x**2 - 0.02).clamp(min=0.02).sqrt()
    s = torch.linspace(0, 1, rows)[:, None] ** 1.5
    y = torch.lerp(edge.expand(rows, -1), far.expand(rows, -1), s)
    z = (shell**2 - x**2 - y**2).clamp(min=0).sqrt()
    crease = 0.10 * gauss(s - 0.42, 0.10) if upper else 0.05 * gauss(s - 0.5, 0.15)
    z = z - crease - 0.09 * (1 - smooth(s, 0.0, 0.05))  # the edge touches the eyeball
    points = torch.stack([x.expand(rows, -1), y, z], -1).reshape(-1, 3) + eye
    triangles = grid_triangles(rows, columns, closed=False)
    return points, triangles.flip(1) if upper else triangles


def _ear(centre: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """A shell with a rim: rings from the middle outwards, over the rim and back to the skull."""
    rows, columns, side = 18, 34, float(centre[0].sign())
    phi = torch.arange(columns) * (2 * math.pi / columns)
    ring = torch.cat([torch.linspace(0.02, 1.0, rows - 4), torch.tensor([1.05, 1.03, 0.92, 0.75])])[:, None]
    lobe = smooth(-torch.sin(phi), 0.2, 1.0)
    across = ring * torch.cos(phi) * 1.75 * (1 - 0.30 * lobe)  # towards the back
    up = ring * torch.sin(phi) * (3.1 + 0.1 * torch.cos(phi))
    inner = 0.75 + 0.35 * gauss(ring - 0.92, 0.09) * (1 - 0.6 * lobe)
    inner = inner + 0.22 * gauss(ring - 0.55, 0.12) - 0.75 * gauss(ring, 0.30)
    behind = torch.zeros(rows, 1)
    behind[-4:, 0] = torch.tensor([0.85, 0.55, 0.15, -0.5])
    out = torch.where(torch.arange(rows)[:, None] >= rows - 4, behind, inner).expand(rows, columns)
    out = out * (0.55 + 0.45 * smooth(torch.cos(phi), -0.9, 0.1))  # lower where it joins the cheek
    angle = math.radians(shape.ear_angle)
    back = torch.tensor([side * math.sin(angle), 0.12, -math.cos(angle)])
    normal = torch.tensor([side * math.cos(angle), 0.0, math.sin(angle)])
    height = torch.tensor([0.0, 1.0, 0.0]) + 0.12 * torch.tensor([0.0, 0.0, -1.0])
    local = across[..., None] * back + up[..., None] * height + out[..., None] * normal
    points = centre + shape.ear * local.reshape(-1, 3)
    triangles = grid_triangles(rows, columns)
    return points, triangles if side > 0 else triangles.flip(1)


def _landmarks(skin: Tensor, eyes: Tensor, radius: float, shape: Shape) -> Tensor:
    """The 68 iBUG landmarks [68, 3]; those on the skin take the nearest vertex's depth."""
    front = skin[skin[:, 2] > 2.0]

    def surface(points: list[tuple[float, float]]) -> list[Tensor]:
        flat = torch.tensor(points)
        near = torch.cdist(flat, front[:, :2]).argmin(1)
        return list(torch.cat([flat, front[near, 2:]], 1))

    jaw = TABLES["jaw"]
    marks = [torch.tensor([-x * shape.width, y, z]) for x, y, z in jaw] + [torch.tensor([0.0, -7.6, 10.2])]
    marks += [torch.tensor([x * shape.width, y, z]) for x, y, z in reversed(jaw)]
    brow_y = shape.eye_y + 2.35 + shape.brow_raise
    brow = [(5.5, -0.75), (4.6, -0.1), (3.5, 0.12), (2.3, 0.05), (1.15, -0.25)]
    marks += surface([(-x, brow_y + y) for x, y in brow] + [(x, brow_y + y) for x, y in reversed(brow)])
    tip, base = shape.eye_y - 3.1 * shape.nose_length, shape.eye_y - 4.5 * shape.nose_length
    marks += surface([(0.0, shape.eye_y + (tip - shape.eye_y) * k / 3 + 0.2 * (1 - k / 3)) for k in range(4)])
    marks += surface([(x, base) for x in (-1.2, -0.6, 0.0, 0.6, 1.2)])
    for eye in eyes:
        marks += _eye_marks(eye, radius, shape)
    u = shape.mouth_width
    gap = shape.opening / 2
    top, bottom = [0.0, 0.62, 0.86, 0.78, 0.86, 0.62, 0.0], [0.62, 0.95, 1.02, 0.95, 0.62]
    across = (-1, -0.66, -0.3, 0, 0.3, 0.66, 1)
    line = [float(_lip_line(torch.tensor(x * u), shape)) for x in across]
    outer = [(x * u, y + h + gap * (abs(x) < 1)) for x, y, h in zip(across, line, top, strict=True)]
    outer += [(x * u, y - h - gap) for x, y, h in zip((0.66, 0.3, 0, -0.3, -0.66), line[5:0:-1], bottom, strict=True)]
    inside = [(-0.88 * u, line[0])]
    inside += [(x * u, y + gap + 0.03) for x, y in zip((-0.35, 0, 0.35), line[2:5], strict=True)]
    inside += [(0.88 * u, line[6])]
    inside += [(x * u, y - gap - 0.03) for x, y in zip((0.35, 0, -0.35), line[4:1:-1], strict=True)]
    return torch.stack(marks + surface(outer) + surface(inside))


def _eye_marks(eye: Tensor, radius: float, shape: Shape) -> list[Tensor]:
    """Six marks around one eye from image left to image right over the upper lid and back along the lower one."""
    side = float(eye[0].sign())
    marks = []
    for x, upper in ((-1.46, True), (-0.6, True), (0.6, True), (1.46, True), (0.6, False), (-0.6, False)):
        y = float(_lid_edge(torch.tensor(x), shape, upper, side))
        z = math.sqrt(max((radius * 1.06) ** 2 - x * x - y * y, 0.0))
        marks.append(eye + torch.tensor([x, y, z]))
    return marks
