"""What Reference View and Align Portrait show while their widgets are being changed, before anything is queued.

`web/reference_view.js` and `web/align_portrait.js` post a node's values and show the answer on the node.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from PIL import Image
from server import PromptServer
from torch import Tensor

from .drawn_head import compare_with_head, reference_camera
from .model_files import miniature_portrait
from .photographs import align_portrait, describe
from .user_files import load_image, user_path

VIEW_PATH, ALIGN_PATH = "/diffportrait3d/reference_view", "/diffportrait3d/align_portrait"
MAX_SIDE = 1024  # pixels


def register_routes() -> None:
    """Adds the paths to the host's server, once, however many copies of the pack are installed."""
    routes = PromptServer.instance.routes
    for path, work in ((VIEW_PATH, _draw), (ALIGN_PATH, _align)):
        if path not in {route.path for route in routes}:
            routes.post(path)(_answers(work))


def _answers(work: Callable[[dict], web.Response]) -> Callable[[web.Request], Any]:
    """What `work` makes of a node's values as JSON; what is wrong with them as {"error": ...} otherwise."""

    async def answer(request: web.Request) -> web.Response:
        try:
            return await asyncio.to_thread(work, await request.json())
        except (ValueError, TypeError, KeyError) as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)

    return answer


def _align(values: dict) -> web.Response:
    """The alignment as JSON of `photograph`, the name of a file that Load Image or the last run has."""
    path, side = user_path(values["photograph"]), 256
    photograph = _last_photograph(path, path.stat().st_mtime_ns)
    names = ("points", "face", "framing", "upright", "outside")
    return web.json_response(describe(align_portrait(photograph, None, *(values[name] for name in names), side)))


@lru_cache(maxsize=1)
def _last_photograph(path: Path, changed: int) -> Tensor:
    return load_image(path)


def _draw(values: dict) -> web.Response:
    """A PNG of Reference View, with `portrait`, the name Load Image has, or `miniature`, the folder Load Miniature has
    (both null: a grey image)."""
    size = int(values["resolution"])
    if not 1 <= size <= MAX_SIDE:
        raise ValueError(f"resolution must lie between 1 and {MAX_SIDE}, got {size}")
    name, miniature = values["portrait"], values.get("miniature")
    path = user_path(name) if name else miniature_portrait(miniature) if miniature else None
    portrait = torch.full((1, size, size, 3), 0.5) if path is None else load_image(path)
    label = reference_camera(*(float(values[name]) for name in ("yaw", "pitch", "roll", "distance", "fov")))
    image = compare_with_head(portrait, label, values["picture"], float(values["opacity"]), size)
    file = io.BytesIO()
    Image.fromarray((image[0].clamp(0, 1) * 255).byte().numpy()).save(file, "PNG", compress_level=1)
    return web.Response(body=file.getvalue(), content_type="image/png")
