"""Some of the views by themselves, and back among the others: to redo one, to reorder, to compare."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..diffportrait3d.cameras.labels import orbit_camera
from ..diffportrait3d.cameras.view_choice import left_over, nearest_views, parse_numbers, views_within
from ..patches.view_batches import JOIN, Selection, count_views, latent_to_redo, select_latent
from .input_checks import Node
from .sockets import VIEWS, Cameras, ViewSelection, degrees, switch, whole

CHOICES = ("numbers", "angles", "nearest")
SELECT = "Select Views"


def _blocked(node: str, name: str) -> ExecutionBlocker:
    """The output of an input that is not connected: an error at whatever node is connected to it, and only there."""
    return ExecutionBlocker(f"{node} gives no {name}: connect {name} to it.")


class SelectViews(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_SelectViews",
            display_name=SELECT,
            category=VIEWS,
            description="Takes some of the views, by number or by angle, out of latents, images and cameras alike; and "
            "gives the latents of all views ready for a sampler that redoes the chosen ones only.",
            search_aliases=["redo view", "regenerate view", "pick views", "reorder views", "split batch", "subset"],
            inputs=[
                io.Latent.Input("latent", optional=True, tooltip="One latent per view."),
                io.Image.Input(
                    "images", optional=True, tooltip="One image per view: the views, or their camera conditions."
                ),
                Cameras.Input("cameras", optional=True, tooltip="One camera per view; needed to choose by angle."),
                io.Combo.Input(
                    "choose",
                    options=list(CHOICES),
                    tooltip="numbers: those written below. angles: all views within the ranges of yaw and pitch. "
                    "nearest: the views that look most nearly from yaw and pitch.",
                ),
                io.String.Input(
                    "numbers",
                    default="0",
                    tooltip="For numbers: views counted from 0, with ranges, in the order wanted, e.g. 5, 0-2. "
                    "Negative numbers count from the end: -1 is the last view.",
                ),
                degrees(
                    "yaw_min",
                    -180.0,
                    180.0,
                    "For angles: the smallest yaw. Above yaw_max the range goes through the back of the head.",
                ),
                degrees("yaw_max", 180.0, 180.0, "For angles: the largest yaw."),
                degrees("pitch_min", -90.0, 90.0, "For angles: the smallest pitch."),
                degrees("pitch_max", 90.0, 90.0, "For angles: the largest pitch."),
                degrees("yaw", 0.0, 180.0, "For nearest: the yaw looked for."),
                degrees("pitch", 0.0, 89.0, "For nearest: the pitch looked for."),
                whole("count", (1, 1, 512), "For nearest: how many views, nearest first."),
                switch(
                    "invert",
                    False,
                    "Takes the views that were not chosen, in their order: the others, e.g. as further "
                    "portraits for Apply Reference Attention.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="The chosen views. Their noise stays what it was in the whole batch."
                ),
                io.Image.Output(display_name="images", tooltip="The images of the chosen views."),
                Cameras.Output(display_name="cameras", tooltip="The cameras of the chosen views."),
                io.Latent.Output(
                    display_name="redo",
                    tooltip="All views, with a noise mask under which a sampler changes the chosen ones only, while "
                    "they look at the others.",
                ),
                ViewSelection.Output(display_name="selection", tooltip="Which views were chosen, for Join Views."),
            ],
        )

    @classmethod
    def execute(
        cls,
        choose,
        numbers,
        yaw_min,
        yaw_max,
        pitch_min,
        pitch_max,
        yaw,
        pitch,
        count,
        invert,
        latent=None,
        images=None,
        cameras=None,
    ) -> io.NodeOutput:
        total = count_views(SELECT, latent=latent, images=images, cameras=cameras)
        try:
            if choose == "numbers":
                chosen = parse_numbers(numbers, total)
            elif cameras is None:
                raise ValueError(f"to choose by {choose}, connect cameras.")
            elif choose == "angles":
                chosen = views_within(cameras["labels"], (yaw_min, yaw_max), (pitch_min, pitch_max))
            else:
                chosen = nearest_views(cameras["labels"], orbit_camera(yaw, pitch), count)
        except ValueError as error:
            raise ValueError(f"{SELECT}: {error}") from None
        places = left_over(chosen, total) if invert else chosen
        if not places:
            raise ValueError(f"{SELECT}: all {total} views were chosen, so that none is left with invert on.")
        return io.NodeOutput(
            _blocked(SELECT, "latent") if latent is None else select_latent(latent, places),
            _blocked(SELECT, "images") if images is None else images[places],
            _blocked(SELECT, "cameras") if cameras is None else {**cameras, "labels": cameras["labels"][places]},
            _blocked(SELECT, "latent") if latent is None else latent_to_redo(latent, places),
            Selection(tuple(places), total),
        )


class JoinViews(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rest = "The other views, or the whole batch that they come from; they stay as they are, to the bit."
        return io.Schema(
            node_id="DP3D_JoinViews",
            display_name=JOIN,
            category=VIEWS,
            description="Puts selected views back among the others, each in its place: the inverse of Select Views, "
            "for latents, images and cameras.",
            search_aliases=["merge batch", "replace view", "insert view", "combine views", "put back"],
            inputs=[
                ViewSelection.Input("selection", tooltip="From Select Views: which views are put back where."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The selected views, or a whole batch of which the selected ones are taken.",
                ),
                io.Latent.Input("latent_rest", optional=True, tooltip=rest),
                io.Image.Input("images", optional=True, tooltip="The same for images; both sides of one size."),
                io.Image.Input("images_rest", optional=True, tooltip=rest),
                Cameras.Input("cameras", optional=True, tooltip="The same for cameras."),
                Cameras.Input("cameras_rest", optional=True, tooltip=rest),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="All views in the order of the whole batch."),
                io.Image.Output(display_name="images", tooltip="All images."),
                Cameras.Output(display_name="cameras", tooltip="All cameras."),
            ],
        )

    @classmethod
    def execute(
        cls, selection, latent=None, latent_rest=None, images=None, images_rest=None, cameras=None, cameras_rest=None
    ) -> io.NodeOutput:
        pairs = {"latent": (latent, latent_rest), "images": (images, images_rest), "cameras": (cameras, cameras_rest)}
        for name, (chosen, others) in pairs.items():
            if (chosen is None) != (others is None):
                missing = name if chosen is None else f"{name}_rest"
                raise ValueError(f"{JOIN} lacks {missing}; connect both {name} and {name}_rest, or neither.")
        if all(chosen is None for chosen, _ in pairs.values()):
            raise ValueError(f"{JOIN}: nothing is connected; connect latent, images or cameras, and its rest.")
        joined = {name: _blocked(JOIN, name) for name in pairs}
        if latent is not None:
            joined["latent"] = selection.join_latents(latent, latent_rest)
        if images is not None:
            joined["images"] = selection.join("images", images, images_rest)
        if cameras is not None:
            labels = selection.join("cameras", cameras["labels"], cameras_rest["labels"])
            joined["cameras"] = {**cameras_rest, "labels": labels}
        return io.NodeOutput(*joined.values())


NODES = [SelectViews, JoinViews]
