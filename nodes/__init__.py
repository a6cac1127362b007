"""The nodes, one file per family; each lists its own in NODES."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..patches.live_view import register_routes
from ..patches.model_files import register_folders

register_folders()  # before the loaders ask for their lists
register_routes()

from . import cameras, conditioning, files, images, loaders, sampling  # noqa: E402

FAMILIES = (loaders, conditioning, cameras, sampling, images, files)


class DiffPortrait3DExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]


async def comfy_entrypoint() -> DiffPortrait3DExtension:
    return DiffPortrait3DExtension()
