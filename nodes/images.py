"""Looking at the result."""

from __future__ import annotations

from fractions import Fraction

from comfy_api.latest import InputImpl, Types, io

from ..host.grid import view_grid
from ..host.images import turntable_frames
from .input_checks import Node
from .sockets import ADVANCED, VIEWS, Cameras, number, switch, whole


class ViewGrid(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ViewGrid",
            display_name="View Grid",
            category=VIEWS,
            description="All views side by side in one image, with their angles if the cameras are connected.",
            search_aliases=["contact sheet", "image grid", "montage"],
            inputs=[
                io.Image.Input("images", tooltip="The views."),
                Cameras.Input("cameras", optional=True, tooltip="Writes yaw and pitch below every view."),
                whole("columns", (0, 0, 64), "Views per row; 0 chooses a squarish grid."),
                whole("gap", (4, 0, 64), "White pixels between the views."),
            ],
            outputs=[io.Image.Output(tooltip="One image.")],
        )

    @classmethod
    def execute(cls, images, columns, gap, cameras=None) -> io.NodeOutput:
        return io.NodeOutput(view_grid(images, columns, gap, None if cameras is None else cameras["labels"]))


class Turntable(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_Turntable",
            display_name="Turntable",
            category=VIEWS,
            description="The views as a video, for Save Video.",
            search_aliases=["video", "orbit video", "animation", "ping-pong", "create video"],
            inputs=[
                io.Image.Input("images", tooltip="The views in the order of the camera path."),
                number("fps", (12.0, 0.1, 120.0, 0.1), "Views per second."),
                switch(
                    "ping_pong",
                    False,
                    "Forwards, then backwards: for paths that do not end where they began, such as arc.",
                ),
                whole(
                    "loops",
                    (1, 1, 100),
                    "How many times the path is shown, for players that do not repeat a video.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                io.Video.Output(
                    tooltip="The video. Video codecs want even sides: an odd one is lengthened by one row or column."
                )
            ],
        )

    @classmethod
    def execute(cls, images, fps, ping_pong, loops) -> io.NodeOutput:
        frames = turntable_frames(images, ping_pong, loops)
        rate = Fraction(round(fps * 1000), 1000)
        return io.NodeOutput(InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=rate)))


NODES = [ViewGrid, Turntable]
