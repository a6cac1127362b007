"""The image of Reference View while its numbers are being changed, before anything is queued.

`web/reference_view.js` posts the node's values to `PATH` and shows the answer on the node.
"""

from __future__ import annotations

import asyncio
import io

import torch
from aiohttp import web
from PIL import Image
from server import PromptServer
from torch import Tensor

from .drawn_head import compare_with_head, reference_camera
from .model_files import miniature_portrait
from .user_files import load_image, user_path

PATH = "/diffportrait3d/reference_view"
MAX_SIDE = 1024  # pixels


def register_routes() -> None:
    """Adds `PATH` to the host's server, once, however many copies of the pack are installed."""
    routes = PromptServer.instance.routes
    if PATH not in {route.path for route in routes}:
        routes.post(PATH)(answer)


async def answer(request: web.Request) -> web.Response:
    """A PNG for the node's values as JSON, with `portrait`, the name Load Image has, or `miniature`, the folder Load
    Miniature has (both null: a grey image); what is wrong with them as {"error": ...} otherwise."""
    try:
        png = await asyncio.to_thread(_draw, await request.json())
    except (ValueError, TypeError, KeyError) as error:
        return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
    return web.Response(body=png, content_type="image/png")


def _draw(values: dict) -> bytes:
    size = int(values["resolution"])
    if not 1 <= size <= MAX_SIDE:
        raise ValueError(f"resolution must lie between 1 and {MAX_SIDE}, got {size}")
    name, miniature = values["portrait"], values.get("miniature")
    path = user_path(name) if name else miniature_portrait(miniature) if miniature else None
    portrait = torch.full((1, size, size, 3), 0.5) if path is None else load_image(path)
    label = reference_camera(*(float(values[name]) for name in ("yaw", "pitch", "roll", "distance", "fov")))
    return _png(compare_with_head(portrait, label, values["picture"], float(values["opacity"]), size))


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray((image[0].clamp(0, 1) * 255).byte().numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()
