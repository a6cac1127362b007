"""What acts on the denoiser: the portrait, the cameras, the other views."""
from __future__ import annotations

from comfy_api.latest import io

from ..patches.reference import ReferenceImages, apply_reference_attention
from ..patches.view_consistency import apply_view_consistency
from ..patches.view_controlnet import apply_view_controlnet
from .sockets import CATEGORY, ReferenceEncoder, ViewConsistency

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01, "advanced": True}
START = "Where in the sampling it begins: 0 is the first step."
END = "Where in the sampling it ends: 1 is the last step."


class ApplyReferenceAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ApplyReferenceAttention",
            display_name="Apply Reference Attention",
            category=CATEGORY,
            description="Lets every view read the portrait: all self-attentions of the model also attend to the "
            "portrait's tokens. Several portraits of one person go in as one batch, or through several of these nodes "
            "in a row.",
            search_aliases=["reference only", "appearance", "portrait", "identity"],
            inputs=[
                io.Model.Input("model", tooltip="The base model the reference encoder was trained with."),
                ReferenceEncoder.Input("reference_encoder", tooltip="From Load Reference Encoder."),
                io.Vae.Input("vae", tooltip="The base model's VAE; encodes the portrait at the size of the views."),
                io.Image.Input(
                    "image",
                    tooltip="The portrait, head centred as in the weights' training pictures. A batch counts as "
                    "several pictures of the same person.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 reads the portrait as trained, 0 not at all; between, its tokens are blended with the "
                    "view's own.",
                ),
                io.Float.Input("start_percent", default=0.0, tooltip=START, **PERCENT),
                io.Float.Input("end_percent", default=1.0, tooltip=END, **PERCENT),
            ],
            outputs=[io.Model.Output(tooltip="The model with the portrait; the one that came in is left as it was.")],
        )

    @classmethod
    def execute(cls, model, reference_encoder, vae, image, strength, start_percent, end_percent) -> io.NodeOutput:
        references = ReferenceImages(vae, image)
        return io.NodeOutput(
            apply_reference_attention(model, reference_encoder, references, strength, start_percent, end_percent)
        )


class ViewControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ViewControlNet",
            display_name="View ControlNet",
            category=CATEGORY,
            description="Gives every view its camera, read from one picture per view of somebody else at that camera. "
            "Acts on the positive side only, as the method was trained.",
            search_aliases=["camera control", "pose control"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The positive prompt; ControlNets already in it stay."),
                io.ControlNet.Input("control_net", tooltip="From Load View ControlNet."),
                io.Image.Input(
                    "image",
                    tooltip="Camera conditions, one picture per view in the order of the latents, e.g. from Render "
                    "Camera Conditions. They are resized to the views.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.01, tooltip="1 is as trained, 0 switches it off."
                ),
                io.Float.Input("start_percent", default=0.0, tooltip=START, **PERCENT),
                io.Float.Input("end_percent", default=1.0, tooltip=END, **PERCENT),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler's positive side, not the "
                "negative.")
            ],
        )

    @classmethod
    def execute(cls, positive, control_net, image, strength, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(
            apply_view_controlnet(positive, control_net, image, strength, start_percent, end_percent)
        )


class ApplyViewConsistency(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ApplyViewConsistency",
            display_name="Apply View Consistency",
            category=CATEGORY,
            description="Lets the views of a batch look at each other, for use with the host's own samplers. "
            "View-Consistency Sampler does the same by itself.",
            search_aliases=["cross-view attention"],
            inputs=[
                io.Model.Input("model", tooltip="The base model the module was trained with."),
                ViewConsistency.Input("view_consistency", tooltip="From Load View Consistency."),
            ],
            outputs=[io.Model.Output(tooltip="The model with cross-view attention; needs at least 2 views in the "
            "batch.")],
        )

    @classmethod
    def execute(cls, model, view_consistency) -> io.NodeOutput:
        return io.NodeOutput(apply_view_consistency(model, view_consistency))


NODES = [ApplyReferenceAttention, ViewControlNet, ApplyViewConsistency]
