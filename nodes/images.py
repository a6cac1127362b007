"""Looking at the result."""
from __future__ import annotations

from comfy_api.latest import io

from ..patches.grid import view_grid
from .sockets import CATEGORY, Cameras


class ViewGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ViewGrid",
            display_name="View Grid",
            category=CATEGORY,
            description="All views side by side in one picture, with their angles if the cameras are connected.",
            search_aliases=["contact sheet", "image grid", "montage"],
            inputs=[
                io.Image.Input("images", tooltip="The views."),
                Cameras.Input("cameras", optional=True, tooltip="Writes yaw and pitch below every view."),
                io.Int.Input("columns", default=0, min=0, max=64, tooltip="Views per row; 0 chooses a squarish grid."),
                io.Int.Input("gap", default=4, min=0, max=64, tooltip="White pixels between the views."),
            ],
            outputs=[io.Image.Output(tooltip="One picture.")],
        )

    @classmethod
    def execute(cls, images, columns, gap, cameras=None) -> io.NodeOutput:
        return io.NodeOutput(view_grid(images, columns, gap, None if cameras is None else cameras["labels"]))


NODES = [ViewGrid]
