"""Cameras: where the views are taken from, and the pictures that tell the view ControlNet."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..diffportrait3d.cameras.keyframes import LAYOUT, interpolate_keyframes, parse_keyframes
from ..diffportrait3d.cameras.labels import CENTRES, RADIUS, TRAJECTORIES, focal_from_fov, orbit_camera, trajectory
from ..host.drawn_head import FOV, LAYOUTS, compare_with_head, exact_fov, reference_camera, render_conditions
from ..host.viewer_camera import FRAMINGS, viewer_camera
from .ranges import in_range
from .resolution import chosen_resolution, resolution_input
from .sockets import CAMERAS, Cameras

KEYFRAMES = "keyframes"


def angle(name: str, default: float, limit: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=-limit, max=limit, step=1.0, tooltip=tooltip)


class CameraTrajectory(io.ComfyNode):
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
                io.Int.Input("views", default=16, min=1, max=512, tooltip="How many views."),
                angle("yaw_min", -45.0, 180.0, "Smallest yaw; negative is the camera on the head's right-hand side."),
                angle("yaw_max", 45.0, 180.0, "Largest yaw; positive moves the camera to the right of the picture."),
                angle("pitch_min", -10.0, 89.0, "Smallest pitch; negative looks up from below."),
                angle("pitch_max", 10.0, 89.0, "Largest pitch; positive looks down from above."),
                io.Float.Input(
                    "roll",
                    default=0.0,
                    min=-180.0,
                    max=180.0,
                    step=1.0,
                    advanced=True,
                    tooltip="Turns the camera about its viewing direction.",
                ),
                io.Float.Input(
                    "radius",
                    default=RADIUS,
                    min=0.5,
                    max=20.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Distance to the head's centre in EG3D's units; the networks were trained at 2.7.",
                ),
                io.Float.Input(
                    "fov",
                    default=FOV,
                    min=1.0,
                    max=120.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Field of view in degrees; the networks were trained at 13.37.",
                ),
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
                    optional=True,
                    advanced=True,
                    tooltip="What the cameras circle. pivot: the head's centre, so that yaw and pitch are the angles "
                    "at which the head is seen. eg3d: the world's origin behind it, as EG3D's own renders do; choose "
                    "it to match condition images that were made with EG3D.",
                ),
            ],
            outputs=[
                Cameras.Output(display_name="cameras", tooltip="For Render Camera Conditions and 3D-Aware Noise."),
            ],
        )

    @classmethod
    @in_range
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


class RenderCameraConditions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_RenderCameraConditions",
            display_name="Render Camera Conditions",
            category=CAMERAS,
            description="Renders one invented person at every camera: the pictures from which View ControlNet reads "
            "where the cameras stand. They never show the portrait's person.",
            search_aliases=["camera condition images", "pose images"],
            inputs=[
                Cameras.Input("cameras", tooltip="From Camera Trajectory."),
                resolution_input(
                    "Side of the pictures. 0: what control_net was trained at, 512 if it is not connected or does not "
                    "say. View ControlNet resizes the pictures to the views."
                ),
                io.Int.Input(
                    "subject",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    advanced=True,
                    tooltip="Which invented person; the views should not depend on it.",
                ),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="From Load View ControlNet; only looked at: resolution 0 is what it was trained at.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="One picture per camera, for View ControlNet.")],
        )

    @classmethod
    @in_range
    def execute(cls, cameras, resolution, subject, control_net=None) -> io.NodeOutput:
        side = chosen_resolution(resolution, control_net, "Render Camera Conditions")
        return io.NodeOutput(render_conditions(cameras["labels"], side, subject))


class CameraFromViewer(io.ComfyNode):
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
                    "trained with. as it is: position and lens are taken, too; the model then has to stand and measure "
                    "as heads do here (centre at 0, 0, 0.2; camera 2.7 away).",
                ),
            ],
            outputs=[
                Cameras.Output(
                    display_name="camera",
                    tooltip="One camera: a view to make, or the portrait's own for 3D-Aware Noise.",
                ),
            ],
        )

    @classmethod
    @in_range
    def execute(cls, camera_info, framing) -> io.NodeOutput:
        return io.NodeOutput({"labels": viewer_camera(camera_info, framing)[None]})


class ReferenceView(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ReferenceView",
            display_name="Reference View",
            category=CAMERAS,
            description="Says by hand from where the portrait was taken: turn the drawn head until it lies on the "
            "portrait's. The picture on the node follows at once when Load Image is connected, otherwise with every "
            "run.",
            search_aliases=["reference camera", "portrait pose", "head pose", "align head", "match camera"],
            is_output_node=True,
            inputs=[
                io.Image.Input("portrait", tooltip="The portrait, one picture; a square is cut from its middle."),
                angle(
                    "yaw",
                    0.0,
                    180.0,
                    "Positive: the camera stands to the right of the picture, and the face looks to the left of it.",
                ),
                angle("pitch", 0.0, 89.0, "Positive: seen from above."),
                angle(
                    "roll",
                    0.0,
                    180.0,
                    "Positive: the camera is tilted clockwise, the head in the picture counter-clockwise.",
                ),
                io.Float.Input(
                    "distance",
                    default=RADIUS,
                    min=0.5,
                    max=20.0,
                    step=0.05,
                    tooltip="Distance to the head's centre in EG3D's units; 2.7 fits portraits cropped the EG3D way.",
                ),
                io.Float.Input(
                    "fov",
                    default=FOV,
                    min=1.0,
                    max=120.0,
                    step=0.01,
                    tooltip="Field of view in degrees; 13.37 fits portraits cropped the EG3D way.",
                ),
                io.Combo.Input(
                    "picture",
                    options=list(LAYOUTS),
                    tooltip="What the node shows: the head over the portrait, the two side by side, or all of it.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How much of the drawn head is seen over the portrait.",
                ),
                io.Int.Input(
                    "resolution",
                    default=384,
                    min=64,
                    max=1024,
                    step=64,
                    advanced=True,
                    tooltip="Height of the picture in pixels.",
                ),
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
    @in_range
    def execute(cls, portrait, yaw, pitch, roll, distance, fov, picture, opacity, resolution) -> io.NodeOutput:
        label = reference_camera(yaw, pitch, roll, distance, fov)
        shown = compare_with_head(portrait, label, picture, opacity, resolution)
        return io.NodeOutput({"labels": label[None]}, shown, ui=ui.PreviewImage(shown, cls=cls))


NODES = [CameraTrajectory, RenderCameraConditions, CameraFromViewer, ReferenceView]
