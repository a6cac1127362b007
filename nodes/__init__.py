"""The nodes, one file per family; each lists its own in NODES."""

from __future__ import annotations

from ..host.internals import check_host_version, check_internals

check_host_version()  # before anything that another host lacks is imported
check_internals()

from comfy_api.latest import ComfyExtension, io  # noqa: E402

from ..host.live_view import register_routes  # noqa: E402
from ..host.model_files import register_folders  # noqa: E402

register_folders()  # before the loaders ask for their lists
register_routes()

from . import cameras, conditioning, files, images, loaders, portraits, sampling, views  # noqa: E402

FAMILIES = (loaders, portraits, conditioning, cameras, sampling, views, images, files)


class DiffPortrait3DExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]


async def comfy_entrypoint() -> DiffPortrait3DExtension:
    return DiffPortrait3DExtension()
