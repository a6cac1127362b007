"""What acts on the denoiser: the portrait, the cameras, the other views."""

from __future__ import annotations

import logging

from comfy_api.latest import io
from server import PromptServer

from ..host.masks import WHITE
from ..patches.reference import BLOCKS, apply_reference_attention
from ..patches.reference_inputs import ReferenceImages
from ..patches.view_consistency import OVERLAP, apply_view_consistency
from ..patches.view_controlnet import apply_view_controlnet
from .ranges import in_range
from .sockets import APPLY, ReferenceEncoder, ViewConsistency

PERCENT = {"min": 0.0, "max": 1.0, "step": 0.01, "advanced": True}
START = "Where in the sampling it begins: 0 is the first step."
END = "Where in the sampling it ends: 1 is the last step."
SWITCH = {"default": True, "optional": True, "advanced": True}
BLOCK = "Whether the self-attentions in the UNet's {} part read the portrait; on is as trained."


def window_inputs() -> list[io.Input]:
    """The widgets that say how many views look at each other at once."""
    return [
        io.Int.Input(
            "window_size",
            default=0,
            min=0,
            max=512,
            optional=True,
            advanced=True,
            tooltip="Views that look at each other at once. More views are made in overlapping windows of this size, "
            "laid out anew at every step, in the memory of one window. 0: as many as the module was trained with.",
        ),
        io.Int.Input(
            "overlap",
            default=OVERLAP,
            min=0,
            max=511,
            optional=True,
            advanced=True,
            tooltip="Views that neighbouring windows share at least. More is smoother and slower.",
        ),
        io.Boolean.Input(
            "closed_orbit",
            default=False,
            optional=True,
            tooltip="On where the camera path ends where it began (orbit, figure eight): the last view is then the "
            "first one's neighbour.",
        ),
    ]


def _say_turned(node_id: str | None, references: ReferenceImages) -> None:
    """In the log, and on the node where there is one."""
    numbers = ", ".join(map(str, references.turned))
    text = (
        f"Reference mask {numbers} is white on the background, as Load Image gives it for a cut-out: turned round, so "
        "that the person is read. If the background is meant, set mask_white to read."
    )
    logging.warning("Apply Reference Attention: %s", text)
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)


class ApplyReferenceAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ApplyReferenceAttention",
            display_name="Apply Reference Attention",
            category=APPLY,
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
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Which part of the portrait may be read (white); elsewhere the view's own tokens stand in. "
                    "One mask for all pictures or one for each. Load Image's MASK of a cut-out is white on the "
                    "background: see mask_white.",
                ),
                io.Boolean.Input("down_blocks", tooltip=BLOCK.format("down"), **SWITCH),
                io.Boolean.Input("middle_block", tooltip=BLOCK.format("middle"), **SWITCH),
                io.Boolean.Input("up_blocks", tooltip=BLOCK.format("up"), **SWITCH),
                io.Boolean.Input(
                    "reuse_across_runs",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Keeps the portrait's tokens in main memory for the next run. Helps with encoders trained "
                    "at timestep zero; those trained at the current timestep read anew at every step anyway.",
                ),
                io.Combo.Input(
                    "mask_white",
                    options=list(WHITE),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="What white means in the mask. read: what is read. background: what is left out, as in "
                    "Load Image's MASK of a cut-out. auto: read, unless the mask is 1 - alpha of the image, or black "
                    "in the middle and white in both upper corners; the node then says that it was turned round.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="The model with the portrait; the one that came in is left as it was.")],
        )

    @classmethod
    @in_range
    def execute(
        cls,
        model,
        reference_encoder,
        vae,
        image,
        strength,
        start_percent,
        end_percent,
        mask=None,
        down_blocks=True,
        middle_block=True,
        up_blocks=True,
        reuse_across_runs=False,
        mask_white="auto",
    ) -> io.NodeOutput:
        references = ReferenceImages(vae, image, mask, mask_white)
        if references.turned:
            _say_turned(cls.hidden.unique_id if cls.hidden else None, references)
        switches = zip(BLOCKS, (down_blocks, middle_block, up_blocks), strict=True)
        blocks = [part for part, on in switches if on]
        return io.NodeOutput(
            apply_reference_attention(
                model, reference_encoder, references, strength, start_percent, end_percent, blocks, reuse_across_runs
            )
        )


class ViewControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ViewControlNet",
            display_name="View ControlNet",
            category=APPLY,
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
                io.Conditioning.Output(
                    display_name="positive", tooltip="For the sampler's positive side, not the negative."
                )
            ],
        )

    @classmethod
    @in_range
    def execute(cls, positive, control_net, image, strength, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(apply_view_controlnet(positive, control_net, image, strength, start_percent, end_percent))


class ApplyViewConsistency(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ApplyViewConsistency",
            display_name="Apply View Consistency",
            category=APPLY,
            description="Lets the views of a batch look at each other, for use with the host's own samplers. "
            "View-Consistency Sampler does the same by itself. Any number of views from 2 up: above window_size they "
            "are made in overlapping windows.",
            search_aliases=["cross-view attention"],
            inputs=[
                io.Model.Input("model", tooltip="The base model the module was trained with."),
                ViewConsistency.Input("view_consistency", tooltip="From Load View Consistency."),
                *window_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with cross-view attention; needs at least 2 views in the batch.")
            ],
        )

    @classmethod
    @in_range
    def execute(cls, model, view_consistency, window_size=0, overlap=OVERLAP, closed_orbit=False) -> io.NodeOutput:
        return io.NodeOutput(apply_view_consistency(model, view_consistency, window_size, overlap, closed_orbit))


NODES = [ApplyReferenceAttention, ViewControlNet, ApplyViewConsistency]
