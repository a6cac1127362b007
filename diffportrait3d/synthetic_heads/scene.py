"""A scene fixed in the world (surfaces, light, background) and its image from any camera label.

Nothing but highlights depends on the camera: diffuse light with ambient occlusion and a soft key shadow is
baked into the vertices once, and the background is a function of the viewing direction. Views of one scene
are therefore consistent with each other wherever they see the same point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import normalize

from ..cameras.labels import validate_labels
from ..cameras.projection import pixel_centres, project, world_rays
from .mesh import Noise, Surface, to_world, vertex_normals
from .rasterise import interpolate, rasterise

GAMMA = 2.2
DRAWN_TOGETHER = 16  # views, on a GPU


class View(NamedTuple):
    """image [V, 3, H, W] in [0, 1] (sRGB), depth [V, H, W] camera z in world units (0 = background), mask [V, H, W]."""

    image: Tensor
    depth: Tensor
    mask: Tensor


@dataclass
class Light:
    """A key light (unit direction towards it, linear colour) and a sky that shades from `ground` to `sky` colour."""

    direction: Tensor
    key: Tensor
    sky: Tensor
    ground: Tensor

    def to(self, device: torch.device | str) -> Light:
        return Light(*(value.to(device) for value in (self.direction, self.key, self.sky, self.ground)))


@dataclass
class Background:
    """Two colours (sRGB) mixed by noise over the viewing direction, and a third towards the ground."""

    colours: Tensor  # [3, 3]
    noise: Noise
    contrast: float

    def to(self, device: torch.device | str) -> Background:
        return Background(self.colours.to(device), self.noise.to(device), self.contrast)

    def __call__(self, directions: Tensor) -> Tensor:
        """Linear colour [N, 3] seen along unit directions [N, 3]."""
        mix = torch.sigmoid(self.contrast * self.noise(directions))[:, None]
        low = torch.sigmoid(-6 * (directions[:, 1:2] + 0.1)) * 0.5
        colour = self.colours[0] * mix + self.colours[1] * (1 - mix)
        return (colour * (1 - low) + self.colours[2] * low) ** GAMMA


@dataclass
class Scene:
    """World-space mesh with baked radiance. vertices, normals, radiance (linear) [V, 3]; specular [V];
    triangles [T, 3]; two_sided [T] bool."""

    vertices: Tensor
    normals: Tensor
    radiance: Tensor
    specular: Tensor
    triangles: Tensor
    two_sided: Tensor
    light: Light
    background: Background


def build_scene(
    surfaces: list[Surface], light: Light, background: Background, device: torch.device | str = "cpu"
) -> Scene:
    """Join coloured surfaces (head frame), place them in the EG3D world and bake the diffuse light on `device`.

    Normals are summed before the move: the order in which a GPU adds is not repeatable.
    """
    offset, triangles, two_sided, normals = 0, [], [], []
    for surface in surfaces:
        triangles.append(surface.triangles + offset)
        two_sided.append(torch.full((len(surface.triangles),), surface.two_sided))
        normals.append(vertex_normals(surface.vertices, surface.triangles))
        offset += len(surface.vertices)
    vertices = to_world(torch.cat([s.vertices for s in surfaces])).to(device)
    triangles, normals, two_sided = (torch.cat(parts).to(device) for parts in (triangles, normals, two_sided))
    albedo = torch.cat([s.albedo for s in surfaces]).to(device).clamp(0, 1) ** GAMMA
    light, background = light.to(device), background.to(device)
    irradiance = bake_light(vertices, normals, triangles, light)
    specular = torch.cat([s.specular for s in surfaces]).to(device) * (irradiance.mean(1) / 0.8).clamp(max=1)
    return Scene(vertices, normals, albedo * irradiance, specular, triangles, two_sided, light, background)


def bake_light(vertices: Tensor, normals: Tensor, triangles: Tensor, light: Light, directions: int = 32) -> Tensor:
    """Diffuse irradiance [V, 3]: the sky over `directions` directions and the key light, both with visibility."""
    sky, key_ways = fibonacci_sphere(directions), _around(light.direction.cpu(), spread=0.16)
    # All that a GPU is sent, at once: it would be waited for at every direction.
    frames = torch.stack([_frame(way) for way in (*sky, *key_ways)]).to(vertices)  # [D, 3, 3]
    origin = vertices.new_tensor([0.0, 0.0, 0.1])
    corners = vertices[triangles]
    long = (corners - corners.roll(1, 1)).square().sum(-1).amax(1) > 0.008**2  # fill the gaps between sparse vertices
    occluders = torch.cat([vertices, corners[long].mean(1)])
    total = torch.zeros_like(vertices)
    for frame in frames[:directions]:
        way = frame[:, 2]
        up = way[1] * 0.5 + 0.5
        facing = (normals @ way).clamp(min=0)
        # a quarter of the sky reaches even hidden places: light bounced between surfaces
        lit = facing * (0.25 + 0.75 * _visibility(occluders, vertices, normals, frame, origin, grid=72))
        total += lit[:, None] * (light.sky * up + light.ground * (1 - up)) * (4.0 / directions)
    key = vertices.new_zeros(len(vertices))
    for frame in frames[directions:]:
        key += _visibility(occluders, vertices, normals, frame, origin, grid=110) / 5
    wrapped = ((normals @ light.direction + 0.2) / 1.2).clamp(min=0)
    # a little light leaks red through skin at the shadow's edge; harmless on other materials
    tint = torch.stack([key**0.75, key, key**1.1], 1)
    return total + wrapped[:, None] * tint * light.key


def _draw(scene: Scene, labels: Tensor, resolution: int, supersample: int) -> View:
    side, own = resolution * supersample, labels.to(scene.vertices)
    points = torch.stack([project(scene.vertices, label, side) for label in own])  # [V, P, 3]
    fragments = rasterise(points, scene.triangles, side, side, scene.two_sided)
    hit = torch.nonzero(fragments.triangle.flatten() >= 0).squeeze(1)  # [N]
    attributes = torch.cat([scene.radiance, scene.normals, scene.specular[:, None]], 1)
    colour = interpolate(attributes, scene.triangles, fragments)  # [N, 7]
    view = -_rays(side, own, hit)
    shaded = colour[:, :3] + _highlight(scene, colour[:, 3:6], colour[:, 6], view)
    image = _tone(scene.background(_rays(resolution, own))).view(-1, resolution, resolution, 3)
    image = image.repeat_interleave(supersample, 1).repeat_interleave(supersample, 2)
    image = image.reshape(-1, 3).index_copy(0, hit, _tone(shaded)).view(-1, side, side, 3).permute(0, 3, 1, 2)
    image = F.avg_pool2d(image, supersample)
    depth, mask = _reduce_depth(fragments.depth, supersample)
    return View(image, depth, mask)


def _rays(side: int, labels: Tensor, hit: Tensor | None = None) -> Tensor:
    """World rays [V * side * side, 3] through all pixels of V cameras; [N, 3] through those with the numbers `hit`."""
    centres, pixels = pixel_centres(side, side, labels), side * side
    parts = [centres] * len(labels)
    if hit is not None:
        counts = torch.bincount(hit // pixels, minlength=len(labels)).tolist()
        parts = centres.index_select(0, hit % pixels).split(counts)
    return torch.cat([world_rays(part, label) for part, label in zip(parts, labels, strict=True)])


def render_views(scene: Scene, labels: Tensor, resolution: int, supersample: int = 2) -> View:
    """The scene from camera labels [V, 25]: squares of `resolution` pixels, averaged over supersample^2 samples."""
    together = 1 if scene.vertices.device.type == "cpu" else DRAWN_TOGETHER  # one view at a time stays in a CPU's cache
    views = [_draw(scene, part, resolution, supersample) for part in validate_labels(labels).split(together)]
    return View(*(torch.cat(field) for field in zip(*views, strict=True)))


def fibonacci_sphere(count: int) -> Tensor:
    """`count` nearly even unit directions [count, 3]."""
    k = torch.arange(count, device="cpu") + 0.5
    y = 1 - 2 * k / count
    turn = math.pi * (3 - math.sqrt(5)) * k
    flat = (1 - y * y).sqrt()
    return torch.stack([flat * torch.cos(turn), y, flat * torch.sin(turn)], 1)


def _around(direction: Tensor, spread: float) -> list[Tensor]:
    u = _across(direction)
    v = torch.linalg.cross(direction, u)
    cross = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    return [normalize(direction + spread * (a * u + b * v), dim=0) for a, b in cross]


def _across(way: Tensor) -> Tensor:
    """A unit vector [3] at a right angle to `way`."""
    helper = [0.0, 1.0, 0.0] if abs(float(way[1])) < 0.9 else [1.0, 0.0, 0.0]
    return normalize(torch.linalg.cross(way, way.new_tensor(helper)), dim=0)


def _frame(way: Tensor) -> Tensor:
    """Axes [3, 3] as columns, of which `way` is the last."""
    u = _across(way)
    return torch.stack([u, torch.linalg.cross(way, u), way], 1)


def _visibility(
    occluders: Tensor, vertices: Tensor, normals: Tensor, frame: Tensor, origin: Tensor, grid: int
) -> Tensor:
    """Soft visibility [V] along the last axis of `frame`: compared with the occluders' height in a grid at 3 places."""
    extent = 0.5  # world units around the pivot; what lies outside is clamped to the border and hardly seen
    cell = 2 * extent / grid
    flat = (occluders - origin) @ frame
    index = ((flat[:, :2] + extent) / cell).long().clamp(0, grid - 1)
    height = vertices.new_full((grid * grid,), -10.0)
    height.scatter_reduce_(0, index[:, 0] * grid + index[:, 1], flat[:, 2], "amax")
    lifted = (vertices + normals * (1.2 * cell) - origin) @ frame
    place, level, total = (lifted[:, :2] + extent) / cell, lifted[:, 2] + 0.6 * cell, 0.0
    for dx, dy in ((0.0, 0.8), (-0.7, -0.4), (0.7, -0.4)):
        cx, cy = (place[:, 0] + dx).long().clamp(0, grid - 1), (place[:, 1] + dy).long().clamp(0, grid - 1)
        total = total + ((level - height[cx * grid + cy]) / cell + 1).clamp(0, 1)
    return total / 3


def _highlight(scene: Scene, normal: Tensor, specular: Tensor, view: Tensor) -> Tensor:
    normal = normalize(normal, dim=1)
    half = normalize(view + scene.light.direction, dim=1)
    facing = (normal * half).sum(1).clamp(min=0)
    power = 12 + 60 * (specular > 0.5)  # wet and hard things shine in a small spot
    shine = specular * facing**power * 0.4
    edge = (1 - (normal * view).sum(1).abs()) ** 4 * 0.06 * (specular > 0)
    return shine[:, None] * scene.light.key + edge[:, None] * scene.light.sky


def _tone(linear: Tensor) -> Tensor:
    """Linear light -> sRGB-like values in [0, 1] with a soft shoulder."""
    knee = 0.7
    soft = knee + (1 - knee) * (1 - torch.exp(-(linear - knee) / (1 - knee)))
    return torch.where(linear > knee, soft, linear).clamp(0, 1) ** (1 / GAMMA)


def _reduce_depth(depth: Tensor, supersample: int) -> tuple[Tensor, Tensor]:
    """Nearest sample's depth per pixel [V, H, W], and the mask of pixels at least half covered."""
    covered = depth > 0
    mask = F.avg_pool2d(covered.float(), supersample) >= 0.5
    nearest = -F.max_pool2d(torch.where(covered, -depth, -torch.inf), supersample)
    return torch.where(mask, nearest, 0.0), mask
