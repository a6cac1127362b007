"""Loaders: one per network, and the miniature's base model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..host import loading, model_files, user_files
from ..patches import view_controlnet
from .input_checks import Node
from .sockets import LOAD, NovelView, ReferenceEncoder, ViewConsistency

WHERE = "Files are searched in models/diffportrait3d, then in this pack's weights folder."


class LoadMiniature(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_LoadMiniature",
            display_name="Load Miniature",
            category=LOAD,
            description="Loads the small base model that ships with the pack: an SD1.5-shaped UNet, its autoencoder, "
            "the empty prompt it was trained with, and a portrait to try it on. It knows rendered heads only.",
            search_aliases=["diffportrait3d checkpoint", "miniature checkpoint"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=model_files.miniature_names(),
                    tooltip="Folder with the base UNet and the autoencoder. " + WHERE,
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The base UNet, an ordinary MODEL of the SD1.5 family, only narrower."),
                io.Vae.Output(tooltip="The miniature's autoencoder, an ordinary VAE."),
                io.Conditioning.Output(
                    display_name="empty prompt",
                    tooltip="The only prompt the miniature knows: none. For the positive and the negative side.",
                ),
                io.Image.Output(
                    display_name="portrait",
                    tooltip="The portrait.png in the folder: a rendered person whom the miniature has never seen.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return model_files.check_name(name, "unet", model_files.miniature_names())

    @classmethod
    def fingerprint_inputs(cls, name: str | None) -> str:
        names = model_files.miniature_names() if name is None else [name]  # None: comes by a link, may be any
        networks = [model_files.miniature_path(each, kind) for each in names for kind in ("unet", "autoencoder")]
        portraits = map(model_files.miniature_portrait, names)
        return model_files.fingerprint([*networks, *(portrait for portrait in portraits if portrait.exists())])

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        unet, autoencoder = (model_files.miniature_path(name, kind) for kind in ("unet", "autoencoder"))
        model, vae = loading.load_model(unet, autoencoder), loading.load_vae(autoencoder)
        context_dim = model.model.model_config.unet_config["context_dim"]
        return io.NodeOutput(model, vae, [[torch.zeros(1, 1, context_dim), {}]], cls._portrait(name))

    @classmethod
    def _portrait(cls, name: str):
        """IMAGE [1, H, W, 3]; without the file, nodes that take the portrait fail with this message. A miniature of
        the user's own works without it."""
        path = model_files.miniature_portrait(name)
        if path.exists():
            return user_files.load_image(path)
        return ExecutionBlocker(
            f"Load Miniature: there is no {path}; put a portrait there, or take yours from Load Image."
        )


class NetworkLoader:
    """Shared by the loaders below: one list of files, one output."""

    KIND: str
    NAMES: tuple[str, str]  # node id, display name
    ABOUT: str
    ALIASES: list[str]
    WEIGHTS: str
    SOCKET: io.Output
    READ: Callable

    @classmethod
    def define_schema(cls) -> io.Schema:
        tooltip = f"Weights of the {cls.WEIGHTS} {WHERE}"
        names = io.Combo.Input("name", options=model_files.network_names(cls.KIND), tooltip=tooltip)
        about = {"description": cls.ABOUT, "search_aliases": cls.ALIASES}
        return io.Schema(*cls.NAMES, category=LOAD, inputs=[names], outputs=[cls.SOCKET], **about)

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return model_files.check_name(name, cls.KIND, model_files.network_names(cls.KIND))

    @classmethod
    def fingerprint_inputs(cls, name: str | None) -> str:
        names = model_files.network_names(cls.KIND) if name is None else [name]  # None: comes by a link, may be any
        return model_files.fingerprint(model_files.network_path(each, cls.KIND) for each in names)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(cls.READ(model_files.network_path(name, cls.KIND)))


class LoadReferenceEncoder(NetworkLoader, Node):
    KIND = "reference_encoder"
    NAMES = ("DP3D_LoadReferenceEncoder", "Load Reference Encoder")
    ABOUT = "Loads the network that reads the portrait (the paper's appearance reference module)."
    ALIASES = ["appearance reference", "reference unet", "F_ref"]
    WEIGHTS = "reference encoder; they belong to one base model."
    SOCKET = ReferenceEncoder.Output(display_name="reference encoder", tooltip="For Apply Reference Attention.")
    READ = staticmethod(loading.load_reference_encoder)


class LoadViewControlNet(NetworkLoader, Node):
    KIND = "view_controlnet"
    NAMES = ("DP3D_LoadViewControlNet", "Load View ControlNet")
    ABOUT = "Loads the ControlNet that reads the camera from an image of somebody else."
    ALIASES = ["camera controlnet", "pose controlnet", "F_cam"]
    WEIGHTS = "view ControlNet. Also searched in models/controlnet."
    SOCKET = io.ControlNet.Output(
        tooltip="For View ControlNet; the host's Apply ControlNet takes it, too (leave the negative side alone)."
    )
    READ = staticmethod(view_controlnet.load_view_controlnet)


class LoadViewConsistency(NetworkLoader, Node):
    KIND = "view_consistency"
    NAMES = ("DP3D_LoadViewConsistency", "Load View Consistency")
    ABOUT = "Loads the attention modules through which the views of one batch look at each other."
    ALIASES = ["cross-view attention", "motion module", "view attention"]
    WEIGHTS = "view consistency module; they belong to one base model."
    SOCKET = ViewConsistency.Output(
        display_name="view consistency", tooltip="For View-Consistency Sampler or Apply View Consistency."
    )
    READ = staticmethod(loading.load_cross_view_attention)


class LoadNovelView(NetworkLoader, Node):
    KIND = "novel_view"
    NAMES = ("DP3D_LoadNovelView", "Load Novel-View Model")
    ABOUT = "Loads S, the small 3D network whose blurred but consistent views start the 3D-aware noise."
    ALIASES = ["novel view synthesis", "proxy views", "3D-aware noise model"]
    WEIGHTS = "novel-view model S."
    SOCKET = NovelView.Output(display_name="novel view", tooltip="For 3D-Aware Noise.")
    READ = staticmethod(loading.load_novel_view)


NODES = [LoadMiniature, LoadReferenceEncoder, LoadViewControlNet, LoadViewConsistency, LoadNovelView]
