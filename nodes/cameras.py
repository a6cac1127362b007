"""Cameras: where the views are taken from, and the images that show them to the view ControlNet."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..diffportrait3d.cameras.keyframes import LAYOUT, interpolate_keyframes, parse_keyframes
from ..diffportrait3d.cameras.labels import CENTRES, TRAJECTORIES, focal_from_fov, orbit_camera, trajectory
from ..diffportrait3d.portraits.alignment import EG3D, RENDERED
from ..host.drawn_head import LAYOUTS, compare_with_head, exact_fov, reference_camera, render_conditions
from ..host.viewer_camera import FRAMINGS, WORLDS, viewer_camera, viewer_info
from .input_checks import Node
from .sockets import (
    ADDED,
    ADVANCED,
    CAMERAS,
    Cameras,
    chosen_resolution,
    degrees,
    distance,
    field_of_view,
    number,
    resolution_input,
    whole,
)

KEYFRAMES = "keyframes"


class CameraTrajectory(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_CameraTrajectory",
            display_name="Camera Trajectory",
            category=CAMERAS,
            description="A path of cameras around the head. All look at the head's centre; angles are in degrees.",
            search_aliases=["orbit", "turntable", "camera path", "novel views", "keyframes", "EG3D cameras"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=[*TRAJECTORIES, KEYFRAMES],
                    tooltip="arc: from yaw_min to yaw_max. orbit: a closed loop. figure_eight: a closed lying eight. "
                    "spiral: from the middle outwards. keyframes: through the poses written below.",
                ),
                whole("views", (16, 1, 512), "How many views."),
                degrees("yaw_min", -45.0, 180.0, "Smallest yaw; negative is the camera on the head's right-hand side."),
                degrees("yaw_max", 45.0, 180.0, "Largest yaw; positive moves the camera to the right of the image."),
                degrees("pitch_min", -10.0, 89.0, "Smallest pitch; negative looks up from below."),
                degrees("pitch_max", 10.0, 89.0, "Largest pitch; positive looks down from above."),
                degrees("roll", 0.0, 180.0, "Turns the camera about its viewing direction.", **ADVANCED),
                distance("radius", "the networks were trained at 2.7", **ADVANCED),
                field_of_view("the networks were trained at 13.37", **ADVANCED),
                io.String.Input(
                    "keyframes",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=f"For kind keyframes: one pose per line as '{LAYOUT}', angles in degrees. The views are "
                    "spread evenly from the first line to the last, smoothly through those between. What a line "
                    "leaves out is taken from roll, radius and fov. Text after # is ignored.",
                ),
                io.Combo.Input(
                    "around",
                    options=list(CENTRES),
                    tooltip="What the cameras circle. pivot: the head's centre, so that yaw and pitch are the angles "
                    "at which the head is seen. eg3d: the world's origin behind it, as EG3D's own renders do; choose "
                    "it to match condition images that were made with EG3D.",
                    **ADDED,
                ),
            ],
            outputs=[
                Cameras.Output(
                    display_name="cameras", tooltip="For Render Camera Conditions, 3D-Aware Noise and others."
                )
            ],
        )

    @classmethod
    def execute(
        cls, kind, views, yaw_min, yaw_max, pitch_min, pitch_max, roll, radius, fov, keyframes="", around=CENTRES[0]
    ) -> io.NodeOutput:
        if kind == KEYFRAMES:
            poses = parse_keyframes(keyframes, roll, radius, exact_fov(fov))
            path = interpolate_keyframes(poses, views)  # {field: [views]}
            focal = focal_from_fov(path["fov"])
            labels = orbit_camera(path["yaw"], path["pitch"], path["roll"], path["distance"], focal, around=around)
        else:
            camera = {"roll": roll, "radius": radius, "focal": focal_from_fov(exact_fov(fov)), "around": around}
            labels = trajectory(kind, views, (yaw_min, yaw_max), (pitch_min, pitch_max), **camera)
        return io.NodeOutput({"labels": labels})


class RenderCameraConditions(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_RenderCameraConditions",
            display_name="Render Camera Conditions",
            category=CAMERAS,
            description="Renders one invented person at every camera: the images from which View ControlNet reads "
            "where the cameras are. They never show the portrait's person.",
            search_aliases=["camera condition images", "pose images"],
            inputs=[
                Cameras.Input("cameras", tooltip="From Camera Trajectory or Load Cameras."),
                resolution_input(
                    "Side of the images. 0: what control_net was trained at, 512 if it is not connected or does not "
                    "say. View ControlNet resizes the images to the views."
                ),
                whole(
                    "subject", (0, 0, 2**31 - 1), "Which invented person; views should not depend on it.", **ADVANCED
                ),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="From Load View ControlNet; only looked at: resolution 0 is what it was trained at.",
                ),
                io.Combo.Input(
                    "framing",
                    options=[RENDERED, EG3D],
                    tooltip="How large the head is. rendered heads: as the miniature saw it in training. EG3D: as in "
                    "EG3D's crops, for the released weights.",
                    **ADDED,
                ),
            ],
            outputs=[io.Image.Output(tooltip="One image per camera, for View ControlNet.")],
        )

    @classmethod
    def execute(cls, cameras, resolution, subject, control_net=None, framing=RENDERED) -> io.NodeOutput:
        side = chosen_resolution(resolution, control_net, "Render Camera Conditions")
        return io.NodeOutput(render_conditions(cameras["labels"], side, subject, framing))


class CameraFromViewer(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_CameraFromViewer",
            display_name="Camera from 3D Viewer",
            category=CAMERAS,
            description="Takes the camera of the host's own 3D nodes (Load 3D, Preview 3D, Create Camera Info): turn a "
            "model to the wanted view by hand.",
            search_aliases=["camera_info", "Load 3D camera", "viewport camera", "camera angle"],
            inputs=[
                io.Load3DCamera.Input("camera_info", tooltip="The camera of a 3D node; 0 degrees is the front."),
                io.Combo.Input(
                    "framing",
                    options=list(FRAMINGS),
                    tooltip="angles only: yaw, pitch and roll are taken, distance and lens are those the networks were "
                    "trained with. as it is: position and lens are taken, too; the model then needs the place and size "
                    "that heads have here (centre at 0, 0, 0.2; camera 2.7 away).",
                ),
            ],
            outputs=[
                Cameras.Output(
                    display_name="camera",
                    tooltip="One camera: a view to make, or the portrait's own for 3D-Aware Noise.",
                )
            ],
        )

    @classmethod
    def execute(cls, camera_info, framing) -> io.NodeOutput:
        return io.NodeOutput({"labels": viewer_camera(camera_info, framing)[None]})


class CameraToViewer(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_CameraToViewer",
            display_name="Cameras to 3D Viewer",
            category=CAMERAS,
            description="Gives cameras to the host's own 3D nodes (Preview 3D, Render Splat), one after the other, to "
            "look at a model or a splat of the head from where the views are.",
            search_aliases=["camera_info", "Render Splat camera", "Preview 3D camera"],
            inputs=[
                Cameras.Input("cameras", tooltip="From Camera Trajectory, Load Cameras or Align Portrait."),
                io.Combo.Input(
                    "world",
                    options=list(WORLDS),
                    tooltip="3D viewer: for Load 3D, Preview 3D and models in EG3D's world. splat: for Render Splat "
                    "and splats trained on a folder of Export Views.",
                ),
            ],
            outputs=[
                io.Load3DCamera.Output(
                    display_name="camera_info",
                    is_output_list=True,
                    tooltip="One for each camera: the node behind runs once for each. Rebatch Images makes one batch "
                    "of its images.",
                )
            ],
        )

    @classmethod
    def execute(cls, cameras, world) -> io.NodeOutput:
        return io.NodeOutput([viewer_info(label, world) for label in cameras["labels"]])


class ReferenceView(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ReferenceView",
            display_name="Reference View",
            category=CAMERAS,
            description="Says by hand from where the portrait was taken: turn the drawn head until it covers the "
            "portrait's. The image on the node follows at once when Load Image is connected, otherwise with every run.",
            search_aliases=["reference camera", "portrait pose", "head pose", "align head", "match camera"],
            is_output_node=True,
            inputs=[
                io.Image.Input("portrait", tooltip="The portrait, one image; a square is cut from its middle."),
                degrees(
                    "yaw",
                    0.0,
                    180.0,
                    "Positive: the camera is to the right of the image, and the face looks to the left of the image.",
                ),
                degrees("pitch", 0.0, 89.0, "Positive: seen from above."),
                degrees(
                    "roll",
                    0.0,
                    180.0,
                    "Positive: the camera is tilted clockwise, the head in the image counter-clockwise.",
                ),
                distance("distance", "2.7 fits portraits cropped the EG3D way"),
                field_of_view("13.37 fits portraits cropped the EG3D way"),
                io.Combo.Input(
                    "picture",
                    options=list(LAYOUTS),
                    tooltip="What the node shows: the head over the portrait, the two side by side, or all of it.",
                ),
                number(
                    "opacity",
                    (0.5, 0.0, 1.0, 0.05),
                    "How much of the drawn head is seen over the portrait.",
                    display_mode=io.NumberDisplay.slider,
                ),
                whole("resolution", (384, 64, 1024), "Height of the image in pixels.", step=64, **ADVANCED),
            ],
            outputs=[
                Cameras.Output(
                    display_name="reference camera",
                    tooltip="The portrait's camera, for reference_camera of 3D-Aware Noise.",
                ),
                io.Image.Output(display_name="picture", tooltip="What the node shows."),
            ],
        )

    @classmethod
    def execute(cls, portrait, yaw, pitch, roll, distance, fov, picture, opacity, resolution) -> io.NodeOutput:
        label = reference_camera(yaw, pitch, roll, distance, fov)
        shown = compare_with_head(portrait, label, picture, opacity, resolution)
        return io.NodeOutput({"labels": label[None]}, shown, ui=ui.PreviewImage(shown, cls=cls))


NODES = [CameraTrajectory, RenderCameraConditions, CameraFromViewer, CameraToViewer, ReferenceView]
