"""Networks of any width in files of other software: SD1.5 checkpoints, ControlNets, AnimateDiff's motion modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..networks import NETWORKS, CrossViewAttention, UNetConfig
from ..networks.sizes import Shapes, autoencoder_config, unet_sizes
from .checkpoints import Checkpoint
from .files import CheckpointError
from .identify import describe

_MOTION_MODULE = re.compile(r"(?:.*\.)?(down|mid|up)_block(?:s\.(\d+))?\.motion_modules\.(\d+)\.(temporal_.+)")
_FIRST_PROJECTION = "input_blocks_motion_module.0.0.temporal_transformer.proj_in.weight"
_TABLE = ".pos_encoder.pe"


def load_foreign(checkpoint: Checkpoint, kind: str) -> nn.Module:
    """A network out of a file of other software, float32, in train mode.

    Raises:
        CheckpointError: the file holds none, or keys are missing or have other shapes.
    """
    if kind == "view_consistency":
        return _from_motion_modules(checkpoint)
    module = network_of(checkpoint.shapes, kind, checkpoint.path)
    prefix = _prefix(checkpoint.shapes, kind) or ""
    copy_tensors(module, checkpoint, {name: prefix + name for name in module.state_dict()})
    return module


def network_of(shapes: Shapes, kind: str, path: object) -> nn.Module:
    """A network of SD1.5's topology with the sizes in a file, untrained.

    Args:
        path: for messages.

    Raises:
        CheckpointError: the file holds none.
    """
    spec, prefix = NETWORKS[kind], _prefix(shapes, kind)
    if prefix is None:
        way_out = "train it, or convert the authors' checkpoint"
        if spec.sd15_prefix:
            way_out = f"it has the key '{spec.sd15_prefix}{spec.signature}' or '{spec.signature}'"
        raise CheckpointError(f"{path} is {describe(shapes)}, not a {spec.title}; {way_out}.")
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    if kind == "autoencoder":
        return spec.module(autoencoder_config(own))
    sizes = unet_sizes(own)
    if not {"model_channels", "context_dim"} <= sizes.keys():
        raise CheckpointError(f"{path} lacks tensors that show the width of its {spec.title}: it is not SD1.5's.")
    if sizes["in_channels"] != UNetConfig.in_channels:
        raise CheckpointError(f"{path} takes {sizes['in_channels']} channels (inpainting?); SD1.5's UNet takes 4.")
    sizes["out_channels"] = UNetConfig.out_channels
    return spec.module(UNetConfig(**sizes))


def _prefix(shapes: Shapes, kind: str) -> str | None:
    spec = NETWORKS[kind]
    prefixes = (spec.sd15_prefix, "") if spec.sd15_prefix else ()
    return next((prefix for prefix in prefixes if spec.is_signed(shapes, prefix)), None)


@torch.no_grad()
def copy_tensors(module: nn.Module, checkpoint: Checkpoint, keys: Mapping[str, str]) -> None:
    """Copies tensors of a file into a network as float32, one at a time; `keys`: in the network -> in the file.

    A linear layer and a convolution of size 1 are the same.

    Raises:
        CheckpointError: missing, or of another shape.
    """
    own, shapes = module.state_dict(), checkpoint.shapes
    missing = [key for key in keys.values() if key not in shapes]
    misshapen = [
        f"{key} {list(shapes[key])} instead of {list(own[name].shape)}"
        for name, key in keys.items()
        if key in shapes and _squeezed(shapes[key]) != _squeezed(own[name].shape)
    ]
    for problem, names in (("are missing", missing), ("have another shape", misshapen)):
        if names:
            raise CheckpointError(
                f"{len(names)} keys of {checkpoint.path} {problem}, {names[0]} first; it is not of SD1.5's layout, or "
                "incomplete."
            )
    for name, key in keys.items():
        own[name].copy_(checkpoint.get(key).float().reshape(own[name].shape))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def _from_motion_modules(checkpoint: Checkpoint) -> CrossViewAttention:
    """Cross-view attention that starts as AnimateDiff's motion modules (Guo et al. 2023, v1 or v2 for SD1.5).

    Modules without counterpart (after Downsamples, the second after Upsamples, v1: in the middle) start as the
    identity; they are printed. AnimateDiff acts before an Upsample, these modules behind it. The positional tables are
    the same formula, and ours stay.
    """
    matches = {key: match for key in checkpoint.entries if (match := _MOTION_MODULE.fullmatch(key))}
    found = {_our_name(match): key for key, match in matches.items() if _TABLE not in key}
    if _FIRST_PROJECTION not in found:
        title = NETWORKS["view_consistency"].title
        raise CheckpointError(
            f"{checkpoint.path} is {describe(checkpoint.entries)}, not a {title}; name one of ours or of AnimateDiff."
        )
    width = checkpoint.shapes[found[_FIRST_PROJECTION]][0]
    module = CrossViewAttention(UNetConfig(model_channels=width))
    names = module.state_dict()
    theirs, ours = {_module_of(name) for name in found}, {_module_of(name) for name in names}
    if theirs - ours:
        raise CheckpointError(f"{checkpoint.path} has modules of no place here: {min(theirs - ours)}.")
    wanted = [name for name in names if _module_of(name) in theirs and _TABLE not in name]
    copy_tensors(module, checkpoint, {name: found.get(name, f"the counterpart of {name}") for name in wanted})
    print(
        f"view_consistency: {len(theirs)} of {len(ours)} modules start from {checkpoint.path.name}; without "
        f"counterpart there, so starting as the identity: {', '.join(sorted(ours - theirs))}",
        flush=True,
    )
    return module


def _module_of(name: str) -> str:
    return name.split(".temporal_transformer.")[0]


def _our_name(match: re.Match) -> str:
    side, level, index, rest = match[1], int(match[2] or 0), int(match[3]), match[4]
    if side == "mid":
        return f"middle_block_motion_module.{index}.{rest}"
    block = level * (UNetConfig.num_res_blocks + 1) + index
    return f"{'input' if side == 'down' else 'output'}_blocks_motion_module.{block}.0.{rest}"
