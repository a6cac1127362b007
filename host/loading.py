"""From our weight files to what the host works with: MODEL, VAE, CONTROL_NET and patchers of our own networks.

Weights keep the dtype the host chooses for the device. Our networks compute in it, too, or in the one that the host
casts such weights to layer by layer (fp8); what comes from a model of another dtype is cast where it enters them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management as model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..diffportrait3d.networks import AutoencoderConfig, CrossViewAttention, UNetConfig, title_of
from ..diffportrait3d.weights.files import CheckpointError, load_network, read_metadata, read_network

SD15_SIDE = 512  # pixels; for files without an image size, such as SD1.5's own


@dataclass
class HostNetwork:
    """One of our networks inside the host: its patcher (weights, devices) and the metadata of its file."""

    kind: str
    patcher: Any
    config: Any
    metadata: dict[str, Any]
    path: Path

    @property
    def name(self) -> str:
        """What an error calls it."""
        return str(self.path) if self.path.name else f"The {title_of(self.kind)}"


def set_trained_side(module: nn.Module, metadata: dict[str, Any]) -> None:
    """Keeps the image size in a network's file for `trained_side`: on the module, as the host copies what holds it."""
    if "image_size" in metadata:
        module.trained_side = int(metadata["image_size"])


def trained_side(network) -> int:
    """Side in pixels of the images that a VAE or CONTROL_NET was trained on; SD1.5's if its file has no size."""
    for name in ("first_stage_model", "control_model"):
        side = getattr(getattr(network, name, None), "trained_side", None)
        if side is not None:
            return side
    return SD15_SIDE


def host_unet_settings(config: UNetConfig) -> dict[str, Any]:
    """Arguments of the host's UNetModel and ControlNet classes for one of our configs."""
    depth = [int(level in config.attention_levels) for level in range(len(config.channel_mult))]
    blocks = config.num_res_blocks
    return {
        "image_size": 32,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_res_blocks": [blocks] * len(config.channel_mult),
        "transformer_depth": [d for d in depth for _ in range(blocks)],
        "transformer_depth_output": [d for d in depth for _ in range(blocks + 1)],
        "transformer_depth_middle": 1,
        "context_dim": config.context_dim,
        "num_heads": config.num_heads,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "use_checkpoint": False,
        "adm_in_channels": None,
        "legacy": False,
    }


def set_norm_groups(network: nn.Module, groups: int) -> None:
    """Gives every GroupNorm of a network of the host `groups` groups, where SD1.5 has 32; weights and names stay."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups


def build_model(tensors: dict[str, Tensor], config: UNetConfig, metadata: dict[str, Any], **kwargs):
    """A MODEL of any width of the SD1.5 family. Metadata may move the noise schedule (linear_start, linear_end)."""
    model_config = comfy.supported_models.SD15(host_unet_settings(config))
    model_config.unet_config["num_heads"] = config.num_heads
    settings = {name: metadata[name] for name in ("linear_start", "linear_end") if name in metadata}
    model_config.sampling_settings.update(settings)
    dtype, _ = _dtypes(tensors)
    cast = model_management.unet_manual_cast(dtype, model_management.get_torch_device())
    model_config.set_inference_dtype(dtype, cast)
    model = model_config.get_model({}, "", device=model_management.unet_offload_device())
    set_norm_groups(model.diffusion_model, config.norm_groups)
    patcher = _patcher(model, **kwargs)
    _load_strictly(model.diffusion_model, tensors, patcher)
    return patcher


def load_model(path: Path | str, autoencoder: Path | str | None = None, disable_dynamic: bool = False):
    """MODEL from a file of kind `unet`. Previews have the colours of the latents of the file `autoencoder`, if it says
    which (`latent_rgb`: {"factors": [C][3], "bias": [3]}), else SD1.5's."""
    tensors, metadata = read_network(path, "unet")
    config = UNetConfig.from_dict(metadata["config"])
    patcher = build_model(tensors, config, metadata, disable_dynamic=disable_dynamic)
    colours = None if autoencoder is None else read_metadata(autoencoder).get("latent_rgb")
    if colours is not None:  # neither SD1.5's colours nor its small decoder know latents of another autoencoder
        latents = patcher.model.latent_format  # this one model's
        latents.latent_rgb_factors, latents.latent_rgb_factors_bias = colours["factors"], colours["bias"]
        latents.taesd_decoder_name = None
    patcher.cached_patcher_init = (load_model, (path, autoencoder))  # how the host makes a second copy for itself
    return patcher


def load_vae(path: Path | str):
    """VAE from a file of kind `autoencoder`."""
    tensors, metadata = read_network(path, "autoencoder")
    config = AutoencoderConfig.from_dict(metadata["config"])
    settings = {
        "double_z": True,
        "z_channels": config.z_channels,
        "resolution": 256,
        "in_channels": config.patch_channels,
        "out_ch": config.patch_channels,
        "ch": config.ch,
        "ch_mult": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [],
    }
    vae = comfy.sd.VAE(
        sd={name: tensor.float() for name, tensor in tensors.items()},
        config={"params": {"ddconfig": settings, "embed_dim": config.z_channels}},
    )
    expected, found = set(vae.first_stage_model.state_dict()), set(tensors)
    if expected != found:
        raise CheckpointError(
            f"{path} does not fit its own config: missing {sorted(expected - found)[:3]}, "
            f"unknown {sorted(found - expected)[:3]}; download or convert it again."
        )
    set_norm_groups(vae.first_stage_model, config.norm_groups)
    set_trained_side(vae.first_stage_model, metadata)
    if config.patch_size > 1:
        _use_pixel_patches(vae.first_stage_model, config.patch_size)
    return vae


def _use_pixel_patches(autoencoder, size: int) -> None:
    """Gives this one autoencoder of the host `size` x `size` pixels as channels, as the miniature's has them.

    By hooks, which do not hold the autoencoder: it has to go with the last VAE that uses it.
    """
    autoencoder.encoder.register_forward_pre_hook(lambda _, args: (pixel_unshuffle(args[0], size), *args[1:]))
    autoencoder.decoder.register_forward_hook(lambda _, args, images: pixel_shuffle(images, size))


def build_reference_encoder(
    tensors: dict[str, Tensor], config: UNetConfig, metadata: dict[str, Any], path: Path | str = ""
) -> HostNetwork:
    """F_ref: the host's UNet without the output layer."""
    module = openaimodel.UNetModel(**host_unet_settings(config), **_layer_options(tensors))
    module.out = nn.Identity()
    set_norm_groups(module, config.norm_groups)
    return _host_network("reference_encoder", module, tensors, config, metadata, path)


def build_cross_view_attention(
    tensors: dict[str, Tensor], config: UNetConfig, metadata: dict[str, Any], path: Path | str = ""
) -> HostNetwork:
    """The cross-view modules of the core, made of the host's layers."""
    options = _layer_options(tensors)
    module = CrossViewAttention(config, operations=options["operations"]).to(options["dtype"])
    network = _host_network("view_consistency", module, tensors, config, metadata, path)
    module.join_projections()
    return network


def build_control_model(tensors: dict[str, Tensor], config: UNetConfig) -> nn.Module:
    """F_cam as the host's ControlNet module."""
    settings = host_unet_settings(config)
    del settings["out_channels"]
    module = comfy.cldm.cldm.ControlNet(**settings, hint_channels=config.hint_channels, **_layer_options(tensors))
    set_norm_groups(module, config.norm_groups)
    _load_strictly(module, tensors, None)
    return module.eval().requires_grad_(False)


def load_reference_encoder(path: Path | str) -> HostNetwork:
    tensors, metadata = read_network(path, "reference_encoder")
    return build_reference_encoder(tensors, UNetConfig.from_dict(metadata["config"]), metadata, path)


def load_cross_view_attention(path: Path | str) -> HostNetwork:
    tensors, metadata = read_network(path, "view_consistency")
    return build_cross_view_attention(tensors, UNetConfig.from_dict(metadata["config"]), metadata, path)


class FullLoadPatcher(comfy.model_patcher.ModelPatcher):
    """Loads all of a network of torch's own layers: the host would leave single layers on the CPU when short of
    memory, and can move and cast only layers of its own classes at run time."""

    def load(self, *args, **kwargs) -> None:
        super().load(*args, **{**kwargs, "full_load": True})


def load_novel_view(path: Path | str) -> HostNetwork:
    """S, in float32 (it is small and its rays want the precision)."""
    module, metadata = load_network(path, expect="novel_view")
    patcher = FullLoadPatcher(module, model_management.get_torch_device(), model_management.unet_offload_device())
    return HostNetwork("novel_view", patcher, getattr(module, "config", None), metadata, Path(path))


def _host_network(kind, module, tensors, config, metadata, path) -> HostNetwork:
    _, module.compute_dtype = _dtypes(tensors)
    patcher = _patcher(module.eval().requires_grad_(False))
    _load_strictly(module, tensors, patcher)
    return HostNetwork(kind, patcher, config, metadata, Path(path))


def _layer_options(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The host's layers for such weights: they look for a cast at every call only where there is one to do."""
    weights, compute = _dtypes(tensors)
    operations = comfy.ops.pick_operations(weights, compute)
    return {"dtype": weights, "device": model_management.unet_offload_device(), "operations": operations}


def _dtypes(tensors: dict[str, Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """In which the host would keep weights like these on its device, and in which it would compute with them."""
    floating = [t for t in tensors.values() if t.is_floating_point()]
    count = sum(t.numel() for t in floating)
    weights = model_management.unet_dtype(model_params=count, weight_dtype=floating[0].dtype)
    return weights, model_management.unet_manual_cast(weights, model_management.get_torch_device()) or weights


def _patcher(module: nn.Module, disable_dynamic: bool = False):
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return kind(module, model_management.get_torch_device(), model_management.unet_offload_device())


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], patcher) -> None:
    """load_state_dict that names the first keys in the way; assigns instead of copying where the host wants that."""
    assign = patcher is not None and patcher.is_dynamic()
    try:
        module.load_state_dict(tensors, strict=True, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(f"The weights do not fit their own config: {str(error)[:500]}") from error
