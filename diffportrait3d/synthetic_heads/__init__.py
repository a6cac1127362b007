"""Rendered heads: portraits with exact cameras and depth, and the camera images for the view ControlNet."""

from __future__ import annotations

import torch
from torch import Tensor

from .analytic import analytic_head
from .clothes import dress
from .hair import hair_surfaces
from .ict import IctHeads
from .materials import Look, eyeballs, paint_head
from .mesh import HeadMesh, to_world
from .scene import Scene, View, build_scene, render_views


def portrait_scene(seed: int, provider: str | IctHeads = "analytic", device: torch.device | str = "cpu") -> Scene:
    """The person that `seed` stands for, the same on every call: shape, expression, hair, clothes, light, background.

    Args:
        provider: "analytic" (formulas only, needs no files) or an `IctHeads`. The same seed gives different people
            for different providers.
        device: where the scene is rendered.
    """
    look, mesh, generator = _person(seed, provider)
    surfaces = dress(mesh, paint_head(mesh, look, generator), look, generator)
    surfaces += [eyeballs(mesh, look), *hair_surfaces(mesh, look, generator)]
    return build_scene(surfaces, look.light, look.background, device)


def portrait_landmarks(seed: int, provider: str | IctHeads = "analytic") -> Tensor:
    """The 68 landmarks [68, 3], with the expression, in the world of the person of `portrait_scene`."""
    return to_world(_person(seed, provider)[1].posed_landmarks)


def _person(seed: int, provider: str | IctHeads) -> tuple[Look, HeadMesh, torch.Generator]:
    """Look and head, and the generator that goes on from there."""
    if isinstance(provider, str) and provider != "analytic":
        raise ValueError(f"unknown head provider {provider!r}; use 'analytic' or an IctHeads")
    draw_head = analytic_head if isinstance(provider, str) else provider.head
    generator = torch.Generator().manual_seed(seed)
    look = Look(generator)
    return look, draw_head(generator), generator


def render_camera_images(labels: Tensor, resolution: int, subject: int = 0) -> Tensor:
    """Images [V, 3, H, W] in [0, 1] of analytic person `subject` from cameras [V, 25], for the view ControlNet.

    Only the pose is meant to be read from them (paper, section 3.2: an image of another identity at the target camera).
    """
    return render_views(portrait_scene(subject), labels, resolution).image
