"""Photographs on the way in and out."""

from __future__ import annotations

from comfy_api.latest import io

from ..diffportrait3d.portraits.alignment import FRAMINGS
from ..diffportrait3d.portraits.warping import OUTSIDE
from ..host.photographs import ALIGN, PASTE, Placement, align_portrait, describe, paste_back, show_photograph
from .input_checks import Node
from .sockets import ADVANCED, LARGEST_SIDE, PORTRAIT, SMALLEST_SIDE, Cameras, Place, number, switch, whole

LANDMARKS = ("FACE_LANDMARKS", "POSE_KEYPOINT")  # the host's MediaPipe nodes; OpenPose's format: DWPose, SDPose


class AlignPortrait(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_AlignPortrait",
            display_name=ALIGN,
            category=PORTRAIT,
            description="Cuts out of any photograph the portrait that the networks know, and tells its camera. Where "
            "the face is say landmarks, five points dragged on the node, or dlib where it is installed.",
            search_aliases=["crop face", "face alignment", "FFHQ align", "EG3D crop", "face detection", "head pose"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The photograph, one image of any size."),
                whole("resolution", (512, SMALLEST_SIDE, LARGEST_SIDE), "Side of the portrait in pixels.", step=64),
                io.Combo.Input(
                    "framing",
                    options=list(FRAMINGS),
                    tooltip="How large the face is. EG3D: as in EG3D's crops, for the released weights. rendered "
                    "heads: smaller and lower, for the miniature and other weights trained on rendered heads.",
                ),
                whole("face", (0, 0, 99), "Which face where there are several: 0 is the largest."),
                switch(
                    "upright",
                    True,
                    "Turns the portrait until the head is upright, as in the views of Camera Trajectory. Off, the "
                    "camera has the roll.",
                ),
                io.Combo.Input(
                    "outside",
                    options=list(OUTSIDE),
                    tooltip="What the portrait shows where the photograph ends: its border repeated, its reflection, "
                    "or black (zeros). The mask is black there.",
                    **ADVANCED,
                ),
                io.String.Input(
                    "points",
                    default="",
                    tooltip="x y of the eye on the left of the image, the eye on its right, nose tip, mouth corner on "
                    "the left, on the right; or iBUG's 68 points. Pixels, or parts of the image. Dragging on the node "
                    "writes them; empty: dlib looks for faces.",
                ),
                io.MultiType.Input(
                    "landmarks",
                    [io.Custom(name) for name in LANDMARKS],
                    optional=True,
                    tooltip="Of another detector, in place of points: Detect Face Landmarks (MediaPipe), or keypoints "
                    "of DWPose, OpenPose or SDPose with a face.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The person in the photograph, of any matting node; white on the background (Load Image's "
                    "MASK of a cut-out) is inverted.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="portrait", tooltip="The aligned portrait, a square."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="White where the portrait shows the photograph; with a mask, the person in it.",
                ),
                Cameras.Output(
                    display_name="camera", tooltip="The portrait's camera, for reference_camera of 3D-Aware Noise."
                ),
                Place.Output(display_name="place", tooltip="Where the portrait was, for Paste Back."),
            ],
        )

    @classmethod
    def execute(
        cls, image, resolution, framing, face, upright, outside, points, landmarks=None, mask=None
    ) -> io.NodeOutput:
        aligned = align_portrait(image, landmarks, points, face, framing, upright, outside, resolution, mask)
        camera, place = {"labels": aligned.crop.label[None]}, Placement(image, aligned.crop.homography)
        shown = {"photograph": [show_photograph(image)], "alignment": [describe(aligned)]}
        return io.NodeOutput(aligned.portrait, aligned.mask, camera, place, ui=shown)


class PasteBack(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_PasteBack",
            display_name=PASTE,
            category=PORTRAIT,
            description="Lays a view over the photograph, where Align Portrait cut the portrait out, with a soft edge. "
            "Seamless for the view at the portrait's own camera.",
            search_aliases=["uncrop", "stitch", "composite face", "blend back"],
            inputs=[
                Place.Input("place", tooltip="From Align Portrait."),
                io.Image.Input("view", tooltip="The view, one image of any size, e.g. from Select Views."),
                number("feather", (0.1, 0.0, 0.5, 0.01), "Width of the soft edge in parts of the view's side."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Which part of the view is laid over the photograph (white)."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The photograph with the view, in its own size."),
                io.Mask.Output(display_name="mask", tooltip="What was laid over it."),
            ],
        )

    @classmethod
    def execute(cls, place, view, feather, mask=None) -> io.NodeOutput:
        return io.NodeOutput(*paste_back(place, view, feather, mask))


NODES = [AlignPortrait, PasteBack]
