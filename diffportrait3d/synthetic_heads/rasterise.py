"""A small z-buffer rasteriser in plain torch: same code on CPU and GPU, exact depth, repeatable to the bit.

Every triangle proposes the pixel centres inside its bounding box; edge functions keep those inside the triangle, and
one integer `scatter_reduce(amin)` keeps the nearest. The key packs the float bits of the depth (monotonic for positive
numbers) above the triangle's number, so ties fall to the lower triangle whatever the order of execution. Depth and
attributes are interpolated with perspective correction (1/z is linear in the image).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 1e-3
_EMPTY = torch.iinfo(torch.int64).max


class Fragments(NamedTuple):
    """What each pixel sees: `triangle` [H, W] int64 (-1 = nothing), `barycentric` [H, W, 3], `depth` [H, W]
    (0 = nothing). Of several images each has a leading dimension B."""

    triangle: Tensor
    barycentric: Tensor
    depth: Tensor


def rasterise(
    points: Tensor,
    triangles: Tensor,
    height: int,
    width: int,
    two_sided: Tensor | None = None,
    max_candidates: int = 1 << 22,
) -> Fragments:
    """Find the nearest triangle at every pixel centre.

    Args:
        points: [V, 3] float32, x and y in pixels (the first pixel's centre is at 0.5, 0.5; y down), z = depth > 0.
            [B, V, 3] draws B images of the same triangles at once: few large operations, as GPUs want them.
        triangles: [T, 3] int64. Triangles with a corner nearer than 1e-3 are left out, not clipped.
        two_sided: None draws all triangles from both sides; a [T] bool mask drops the others where they face away
            (corners that are counter-clockwise in the world, seen from outside, appear clockwise in these coordinates
            when seen from behind).
        max_candidates: (triangle, pixel) pairs that are tested at once; bounds the memory, never changes the result.
    """
    shape, points = (*points.shape[:-2], height, width), points.reshape(-1, *points.shape[-2:])
    images = len(points)
    corners = points.index_select(1, triangles.flatten()).view(-1, 3, 3)  # [B * T, 3, 3]
    x, y, z = corners.permute(2, 0, 1).contiguous()  # [B * T, 3] each
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    drawn = (z.amin(1) > NEAR) & (area != 0)
    if two_sided is not None:
        drawn &= (area < 0) | two_sided.repeat(images)
    x0, x1 = _pixel_range(x, width)
    y0, y1 = _pixel_range(y, height)
    wide, high = (x1 - x0 + 1).clamp(min=0), (y1 - y0 + 1).clamp(min=0)
    used = torch.nonzero(drawn & (wide * high > 0)).squeeze(1)  # [U] the triangles that propose any pixel
    x, y, z, area = (value.index_select(0, used) for value in (x, y, z, area))
    left, top, wide, high = (value.int().index_select(0, used) for value in (x0, y0, wide, high))
    plane, count = _planes(x, y, z, area), (wide * high).long()
    image = torch.div(used, len(triangles), rounding_mode="floor")  # [U] the number of a triangle's image
    nearest = torch.full((images * height * width,), _EMPTY, dtype=torch.int64, device=points.device)
    for part in _parts(count, max_candidates):
        rep = torch.repeat_interleave(part, count[part])  # [C] into used
        first = (torch.cumsum(count[part], 0) - count[part]).int()
        local = torch.arange(rep.numel(), dtype=torch.int32, device=rep.device) - first[rep - part[0]]
        across = wide.index_select(0, rep)
        row = torch.div(local, across, rounding_mode="floor")
        px, py = left.index_select(0, rep) + local - row * across, top.index_select(0, rep) + row
        w1, w2 = _weights(plane, rep, px, py)
        inside = torch.nonzero((w1 >= 0) & (w2 >= 0) & (w1 + w2 <= 1)).squeeze(1)
        rep, w1, w2 = (value.index_select(0, inside) for value in (rep, w1, w2))
        depth = 1 / _inverse_depth(plane, rep, w1, w2)
        key = (depth.view(torch.int32).long() << 32) | rep
        place = (py * width + px).index_select(0, inside).long() + image.index_select(0, rep) * (height * width)
        nearest.scatter_reduce_(0, place, key, "amin")
    return _resolve(nearest, plane, z, used % max(1, len(triangles)), shape)


def interpolate(attributes: Tensor, triangles: Tensor, fragments: Fragments) -> Tensor:
    """Per-vertex attributes [V, C] at the covered pixels, in row-major order: [N, C] for N = (triangle >= 0).sum()."""
    hit = torch.nonzero(fragments.triangle.flatten() >= 0).squeeze(1)
    corner = triangles.index_select(0, fragments.triangle.flatten().index_select(0, hit))  # [N, 3]
    weight = fragments.barycentric.view(-1, 3).index_select(0, hit)  # [N, 3]
    parts = (attributes.index_select(0, corner[:, k]) * weight[:, k : k + 1] for k in range(3))
    return sum(parts, attributes.new_zeros(()))


def _pixel_range(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor]:
    low, high = (coordinate.amin(1) - 0.5).ceil(), (coordinate.amax(1) - 0.5).floor()
    return low.clamp(0, size).long(), high.clamp(-1, size - 1).long()


def _parts(count: Tensor, limit: int) -> list[Tensor]:
    """Indices of the triangles in consecutive parts of about `limit` candidates."""
    if count.numel() == 0:
        return []
    group = torch.div(torch.cumsum(count, 0), limit, rounding_mode="floor")
    sizes = torch.unique_consecutive(group, return_counts=True)[1].tolist()
    return list(torch.split(torch.arange(count.numel(), device=count.device), sizes))


def _planes(x: Tensor, y: Tensor, z: Tensor, area: Tensor) -> Tensor:
    """Per triangle [9, U]: corner 0 (x, y), the image gradients of the second and third weight, and 1/z at the corners.

    The weights are affine in the image, so these numbers save the edge functions' divisions at every pixel."""
    ax, ay = x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]
    bx, by = x[:, 2] - x[:, 0], y[:, 2] - y[:, 0]
    inverse = (1 / z).T  # [3, U]
    rows = [x[:, 0], y[:, 0], by / area, -bx / area, -ay / area, ax / area]
    return torch.stack([*rows, inverse[0], inverse[1] - inverse[0], inverse[2] - inverse[0]])


def _weights(plane: Tensor, which: Tensor, px: Tensor, py: Tensor) -> tuple[Tensor, Tensor]:
    """Second and third screen-space weight at pixel centres; plane [9, U], the rest [C]."""
    # Column by column: each is small enough for the cache while it is read.
    cx, cy, g1x, g1y, g2x, g2y = (column.index_select(0, which) for column in plane[:6])
    dx, dy = px + (0.5 - cx), py + (0.5 - cy)
    return g1x * dx + g1y * dy, g2x * dx + g2y * dy


def _inverse_depth(plane: Tensor, which: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """1/z where the weights are these [C]."""
    z0, z1, z2 = (column.index_select(0, which) for column in plane[6:])
    return z0 + w1 * z1 + w2 * z2


def _resolve(nearest: Tensor, plane: Tensor, z: Tensor, triangles: Tensor, shape: tuple[int, ...]) -> Fragments:
    """`triangles` [U] are the numbers of those in `plane`, `shape` is that of the result."""
    height, width = shape[-2:]
    pixel = torch.nonzero(nearest != _EMPTY).squeeze(1)
    winner = nearest[pixel] & 0xFFFFFFFF
    row = torch.div(pixel, width, rounding_mode="floor")
    w1, w2 = _weights(plane, winner, pixel - row * width, row % height)
    depth_here = 1 / _inverse_depth(plane, winner, w1, w2)
    weight = torch.stack([1 - w1 - w2, w1, w2], 1) / z[winner] * depth_here[:, None]  # perspective-correct
    triangle = torch.full_like(nearest, -1)
    triangle[pixel] = triangles[winner]
    barycentric = z.new_zeros(len(nearest), 3)
    barycentric[pixel] = weight
    depth = z.new_zeros(len(nearest))
    depth[pixel] = depth_here
    return Fragments(triangle.view(shape), barycentric.view(*shape, 3), depth.view(shape))
