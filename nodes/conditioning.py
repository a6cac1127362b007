"""What acts on the denoiser: the portrait, the cameras, the other views."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.masks import WHITE
from ..host.portrait_checks import from_own_file, portrait_warnings, warn
from ..patches.cross_view_attention import OVERLAP, apply_cross_view_attention
from ..patches.reference import BLOCKS, apply_reference_attention
from ..patches.reference_inputs import image_references
from ..patches.view_controlnet import apply_view_controlnet
from .input_checks import Node
from .sockets import ADDED, APPLY, OPTIONAL, ReferenceEncoder, ViewConsistency, number, percent_range, switch, whole

INVERTED = (
    "Reference mask {} is white on the background, as in Load Image's MASK: it was inverted, so that the person is "
    "read. If the background is meant, set mask_white to read."
)
EVERY_STEP = -1
BLOCK = "Whether the self-attentions in the UNet's {} part read the portrait; on is as trained."


def window_inputs() -> list[io.Input]:
    """The widgets that say how many views look at each other at once."""
    return [
        whole(
            "window_size",
            (0, 0, 512),
            "Views that look at each other at once. More views are made in overlapping windows of this size, "
            "placed elsewhere at every step, in the memory of one window. 0: as many as the module was trained with.",
            **ADDED,
        ),
        whole(
            "overlap",
            (OVERLAP, 0, 511),
            "Views that neighbouring windows share at least. More is smoother and slower.",
            **ADDED,
        ),
        switch(
            "closed_orbit",
            False,
            "On where the camera path ends where it began (orbit, figure eight): the last view is then the "
            "first one's neighbour.",
            **OPTIONAL,
        ),
    ]


class ApplyReferenceAttention(Node):
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
                    tooltip="The portrait, head centred as in the weights' training images. A batch counts as "
                    "several images of the same person.",
                ),
                number(
                    "strength",
                    (1.0, 0.0, 1.0, 0.01),
                    "1 reads the portrait as trained, 0 not at all; between, its tokens are blended with the "
                    "view's own.",
                ),
                *percent_range(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Which part of the portrait may be read (white); elsewhere the view's own tokens are used. "
                    "One mask for all images or one for each. Load Image's MASK of a cut-out is white on the "
                    "background: see mask_white.",
                ),
                switch("down_blocks", True, BLOCK.format("down"), **ADDED),
                switch("middle_block", True, BLOCK.format("middle"), **ADDED),
                switch("up_blocks", True, BLOCK.format("up"), **ADDED),
                io.Combo.Input(
                    "mask_white",
                    options=list(WHITE),
                    default="auto",
                    tooltip="What white means in the mask. read: what is read. background: what is left out, as in "
                    "Load Image's MASK of a cut-out. auto: read, unless the mask is 1 - alpha of the image, or black "
                    "in the middle and white in both upper corners; the node then says that it was inverted.",
                    **ADDED,
                ),
                whole(
                    "reference_timestep",
                    (EVERY_STEP, EVERY_STEP, 999),
                    "-1: the encoder reads the portrait as it was trained to, which is anew at every step for most. "
                    "0 to 999: once per run, as of this timestep; faster, and a loss unless it was trained so.",
                    **ADDED,
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            outputs=[io.Model.Output(tooltip="The model with the portrait; the one that came in is left as it was.")],
        )

    @classmethod
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
        mask_white="auto",
        reference_timestep=EVERY_STEP,
    ) -> io.NodeOutput:
        references, inverted = image_references(vae, image, mask, mask_white)
        node_id, prompt = (cls.hidden.unique_id, cls.hidden.prompt) if cls.hidden else (None, None)
        warnings = portrait_warnings(image, reference_encoder, from_own_file(prompt, node_id, "image"))
        if inverted:
            warnings.append(INVERTED.format(", ".join(map(str, inverted))))
        warn("Apply Reference Attention", node_id, warnings)
        switches = zip(BLOCKS, (down_blocks, middle_block, up_blocks), strict=True)
        blocks = [part for part, on in switches if on]
        timestep = None if reference_timestep == EVERY_STEP else reference_timestep
        settings = (strength, start_percent, end_percent, blocks, timestep)
        return io.NodeOutput(apply_reference_attention(model, reference_encoder, references, *settings))


class ViewControlNet(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ViewControlNet",
            display_name="View ControlNet",
            category=APPLY,
            description="Gives every view its camera, read from one image per view of somebody else at that camera. "
            "Acts on the positive side only, as the method was trained.",
            search_aliases=["camera control", "pose control"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The positive prompt; ControlNets already in it stay."),
                io.ControlNet.Input("control_net", tooltip="From Load View ControlNet."),
                io.Image.Input(
                    "image",
                    tooltip="Camera conditions, one image per view in the order of the latents, e.g. from Render "
                    "Camera Conditions, or a single one for all. They are resized to the views.",
                ),
                number("strength", (1.0, 0.0, 2.0, 0.01), "1 is as trained, 0 switches it off."),
                *percent_range(),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="For the sampler's positive side, not the negative."
                )
            ],
        )

    @classmethod
    def execute(cls, positive, control_net, image, strength, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(apply_view_controlnet(positive, control_net, image, strength, start_percent, end_percent))


class ApplyViewConsistency(Node):
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
    def execute(cls, model, view_consistency, window_size=0, overlap=OVERLAP, closed_orbit=False) -> io.NodeOutput:
        return io.NodeOutput(apply_cross_view_attention(model, view_consistency, window_size, overlap, closed_orbit))


NODES = [ApplyReferenceAttention, ViewControlNet, ApplyViewConsistency]
