"""Cameras: where the views are taken from, and the pictures that tell the view ControlNet."""
from __future__ import annotations

import math

from comfy_api.latest import io

from ..diffportrait3d.cameras import FOCAL, RADIUS, TRAJECTORIES, trajectory
from ..diffportrait3d.heads import render_condition_images
from .sockets import CATEGORY, Cameras

FOV = round(math.degrees(2 * math.atan(0.5 / FOCAL)), 2)  # 13.37 degrees in EG3D


def angle(name: str, default: float, limit: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=-limit, max=limit, step=1.0, tooltip=tooltip)


class CameraTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_CameraTrajectory",
            display_name="Camera Trajectory",
            category=CATEGORY,
            description="A path of cameras around the head. All look at the head's centre; angles are in degrees.",
            search_aliases=["orbit", "turntable", "camera path", "novel views"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(TRAJECTORIES),
                    tooltip="arc: from yaw_min to yaw_max. orbit: a closed loop. figure_eight: a closed lying eight. "
                    "spiral: from the middle outwards.",
                ),
                io.Int.Input("views", default=16, min=1, max=512, tooltip="How many views."),
                angle("yaw_min", -45.0, 180.0, "Smallest yaw; negative is the camera on the head's right-hand side."),
                angle("yaw_max", 45.0, 180.0, "Largest yaw; positive moves the camera to the right of the picture."),
                angle("pitch_min", -10.0, 89.0, "Smallest pitch; negative looks up from below."),
                angle("pitch_max", 10.0, 89.0, "Largest pitch; positive looks down from above."),
                io.Float.Input(
                    "roll", default=0.0, min=-180.0, max=180.0, step=1.0, advanced=True,
                    tooltip="Turns the camera about its viewing direction.",
                ),
                io.Float.Input(
                    "radius", default=RADIUS, min=0.5, max=20.0, step=0.05, advanced=True,
                    tooltip="Distance to the head's centre in EG3D's units; the networks were trained at 2.7.",
                ),
                io.Float.Input(
                    "fov", default=FOV, min=1.0, max=120.0, step=0.01, advanced=True,
                    tooltip="Field of view in degrees; the networks were trained at 13.37.",
                ),
            ],
            outputs=[
                Cameras.Output(display_name="cameras", tooltip="For Render Camera Conditions and 3D-Aware Noise."),
            ],
        )

    @classmethod
    def execute(cls, kind, views, yaw_min, yaw_max, pitch_min, pitch_max, roll, radius, fov) -> io.NodeOutput:
        focal = FOCAL if fov == FOV else 0.5 / math.tan(math.radians(fov) / 2)
        labels = trajectory(
            kind, views, (yaw_min, yaw_max), (pitch_min, pitch_max), roll=roll, radius=radius, focal=focal
        )
        return io.NodeOutput({"labels": labels})


class RenderCameraConditions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_RenderCameraConditions",
            display_name="Render Camera Conditions",
            category=CATEGORY,
            description="Renders one invented person at every camera: the pictures from which View ControlNet reads "
            "where the cameras stand. They never show the portrait's person.",
            search_aliases=["camera condition images", "pose images"],
            inputs=[
                Cameras.Input("cameras", tooltip="From Camera Trajectory."),
                io.Int.Input(
                    "resolution", default=512, min=64, max=2048, step=64, tooltip="Side of the pictures: that of the "
                    "views."
                ),
                io.Int.Input(
                    "subject", default=0, min=0, max=2**31 - 1, advanced=True,
                    tooltip="Which invented person; the views should not depend on it.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="One picture per camera, for View ControlNet.")],
        )

    @classmethod
    def execute(cls, cameras, resolution, subject) -> io.NodeOutput:
        images = render_condition_images(cameras["labels"], resolution, subject)  # [V, 3, H, W]
        return io.NodeOutput(images.movedim(1, -1).contiguous())


NODES = [CameraTrajectory, RenderCameraConditions]
