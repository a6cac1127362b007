"""What a stage starts from: our own files, the converted release, and files that others have made.

Read are SD1.5 checkpoints (`model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.*`), ControlNets
(`control_model.*`), their networks alone, and AnimateDiff's motion modules (the layout of `mm_sd_v15`); as safetensors,
or as pickles, of which nothing is run (`diffportrait3d.conversion`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffportrait3d.conversion.layout import SD15_AUTOENCODER, TEXT
from diffportrait3d.networks import NETWORKS, AutoencoderKL, CrossViewAttention, UNet, UNetConfig, ViewControlNet
from diffportrait3d.weights.files import CheckpointError, load_network, read_kind
from diffportrait3d.weights.known_formats import describe_stranger
from diffportrait3d.weights.reader import Source, open_source

_FIRST = "input_blocks.0.0.weight"
_TEXT_KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_MOTION = re.compile(r"(?:.*\.)?(down|mid|up)_block(?:s\.(\d+))?\.motion_modules\.(\d+)\.(temporal_transformer\..+)")
_TABLE = ".pos_encoder.pe"


class Files:
    """The networks that a stage's ``inputs`` name, with their weights."""

    weights = True

    def __init__(self, inputs: Any):
        self.inputs = inputs

    def __call__(self, kind: str) -> tuple[nn.Module, dict[str, Any]]:
        """The network of a kind (in eval mode, without gradients) and its metadata.

        Raises:
            ValueError: no file was named. CheckpointError: the file does not hold such a network.
        """
        return load_input(getattr(self.inputs, kind), kind)

    def prompt(self, context_dim: int) -> Tensor:
        """The empty prompt [1, L, context_dim]; see ``empty_prompt``."""
        return empty_prompt(self.inputs.context, self.inputs.unet, context_dim)


def load_input(path: str | None, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network to build on, or to start from, out of a file of any of the layouts above.

    Raises:
        ValueError: no file was named. CheckpointError: the file does not hold such a network, by its keys.
    """
    if not path:
        raise ValueError(f"This stage builds on a trained {kind}: name its file with --set inputs.{kind}=FILE.")
    if is_own(path):
        return load_network(path, kind)
    source = open_source(path)
    if kind == "view_consistency":
        module = from_motion_modules(source)
    elif NETWORKS[kind].sd15_prefix:
        module = from_checkpoint(source, kind)
    else:
        raise CheckpointError(_not_a(path, kind, source, "train it, or convert the authors' checkpoint"))
    metadata = {"network": kind, "config": module.config.to_dict(), "initialised_from": Path(path).name}
    return module.eval().requires_grad_(False), metadata


def is_own(path: str) -> bool:
    """Whether a file is one of ours or the release's.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        return read_kind(path) is not None
    except CheckpointError:
        if Path(path).is_file():
            return False  # a pickle, or damaged: the reader of checkpoints says so
        raise


def from_checkpoint(source: Source, kind: str) -> nn.Module:
    """A network of SD1.5's topology, of any width, from a whole checkpoint or alone.

    Raises:
        CheckpointError: its keys are missing or have other shapes.
    """
    module = network_of(source.shapes, kind, source.path)
    prefix = _prefix(source.shapes, kind)
    load_tensors(module, source, {name: prefix + name for name in module.state_dict()}, kind)
    return module


def network_of(shapes: Mapping[str, tuple[int, ...]], kind: str, path: Any) -> nn.Module:
    """A network of the kind with the sizes in a file, untrained.

    Raises:
        CheckpointError: the file holds none.
    """
    prefix = _prefix(shapes, kind)
    if prefix is None:
        found = describe_stranger(shapes) or f"a file whose keys begin with {', '.join(sorted(shapes)[:3])}"
        spec = NETWORKS[kind]
        wanted = " or ".join(f"'{prefix}{spec.signature}'" for prefix in (spec.sd15_prefix, ""))
        raise CheckpointError(f"inputs.{kind}: {path} is {found}; a {kind} has the key {wanted}.")
    if kind == "autoencoder":
        width = shapes[prefix + "encoder.conv_in.weight"][0]
        return AutoencoderKL(replace(SD15_AUTOENCODER, ch=width, norm_groups=32))
    if prefix + _FIRST not in shapes or prefix + _TEXT_KEY not in shapes:
        raise CheckpointError(f"inputs.{kind}: {path} lacks {prefix + _FIRST} or {prefix + _TEXT_KEY}: not SD1.5's.")
    first, text = shapes[prefix + _FIRST], shapes[prefix + _TEXT_KEY]
    sizes: dict[str, int] = {"model_channels": first[0], "in_channels": first[1], "context_dim": text[-1]}
    if first[1] != UNetConfig.in_channels:
        raise CheckpointError(f"inputs.{kind}: {path} takes {first[1]} channels (inpainting?); SD1.5's UNet takes 4.")
    if kind == "view_controlnet":
        return ViewControlNet(UNetConfig(**sizes, hint_channels=shapes[prefix + "input_hint_block.0.weight"][1]))
    return UNet(UNetConfig(**sizes))


def _prefix(shapes: Mapping[str, Any], kind: str) -> str | None:
    spec = NETWORKS[kind]
    return next((prefix for prefix in (spec.sd15_prefix, "") if spec.is_signed(shapes, prefix)), None)


@torch.no_grad()
def load_tensors(module: nn.Module, source: Source, names: Mapping[str, str], what: str) -> None:
    """Copies tensors of a file into a network as float32, one at a time; ``names``: in the network -> in the file.

    A linear layer and a convolution of size 1 are the same.

    Raises:
        CheckpointError: missing, or of another shape.
    """
    own, shapes = module.state_dict(), source.shapes
    missing = [stored for stored in names.values() if stored not in shapes]
    misshapen = [
        f"{stored} {list(shapes[stored])} instead of {list(own[name].shape)}"
        for name, stored in names.items()
        if stored in shapes and _squeezed(shapes[stored]) != _squeezed(own[name].shape)
    ]
    for problem, keys in (("are missing", missing), ("have another shape", misshapen)):
        if keys:
            raise CheckpointError(
                f"inputs.{what}: {len(keys)} keys of {source.path} {problem}, {keys[0]} first; it is not of SD1.5's "
                "layout, or incomplete."
            )
    for name, stored in names.items():
        own[name].copy_(source.get(stored).float().reshape(own[name].shape))


def _squeezed(shape: Any) -> tuple[int, ...]:
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def from_motion_modules(source: Source) -> CrossViewAttention:
    """View attention that starts as AnimateDiff's motion modules (Guo et al. 2023, v1 or v2 for SD1.5).

    Modules without counterpart (after Downsamples, the second after Upsamples, v1: in the middle) start as the
    identity; they are printed. AnimateDiff acts before an Upsample, these modules behind it. The positional tables are
    the same formula, and ours stay.

    Raises:
        CheckpointError: no such keys, or keys of a module missing or of another shape.
    """
    keys = {name: match for name in source.entries if (match := _MOTION.fullmatch(name))}
    widths = [source.entries[n].shape[0] for n in keys if n.endswith("down_blocks.0.motion_modules.0"
              ".temporal_transformer.proj_in.weight")]  # fmt: skip
    if not widths:
        raise CheckpointError(_not_a(source.path, "view_consistency", source, "name one of ours or of AnimateDiff"))
    module = CrossViewAttention(UNetConfig(model_channels=widths[0]))
    places = {_place(match, module.config): stored for stored, match in keys.items() if _TABLE not in stored}
    wanted = {name.split(".temporal_transformer.")[0] for name in places}
    known = {name.split(".temporal_transformer.")[0] for name in module.state_dict()}
    if wanted - known:
        raise CheckpointError(f"inputs.view_consistency: {source.path} has modules of no place here: {min(wanted)}.")
    names = {n: places.get(n, f"the counterpart of {n}") for n in module.state_dict()
             if n.split(".temporal_transformer.")[0] in wanted and _TABLE not in n}  # fmt: skip
    load_tensors(module, source, names, "view_consistency")
    without = sorted(known - wanted)
    print(
        f"view_consistency: {len(wanted)} of {len(known)} modules start from {source.path.name}; without counterpart "
        f"there, so starting as the identity: {', '.join(without)}",
        flush=True,
    )
    return module


def _place(match: re.Match, config: UNetConfig) -> str:
    side, level, index, rest = match[1], int(match[2] or 0), int(match[3]), match[4]
    per_level = config.num_res_blocks + 1
    if side == "mid":
        return f"middle_block_motion_module.{index}.{rest}"
    if side == "down":
        return f"input_blocks_motion_module.{level * per_level + index}.0.{rest}"
    return f"output_blocks_motion_module.{level * per_level + index}.0.{rest}"


def empty_prompt(file: str | None, unet: str | None, context_dim: int) -> Tensor:
    """CLIP's states of the empty prompt [1, L, context_dim]: what F's text attention is given.

    From ``file`` (safetensors with one tensor [L, D] or [1, L, D]), else from the text encoder in the SD1.5 checkpoint
    that ``unet`` names. A UNet that was trained here knows no text: it is given zeros [1, 1, D].

    Raises:
        CheckpointError: the file does not fit, or the checkpoint has no text encoder.
    """
    if file:
        return _prompt_file(file, context_dim)
    if not unet or is_own(unet):
        return torch.zeros(1, 1, context_dim)
    states = encode_empty_prompt(open_source(unet))
    if states.shape[-1] != context_dim:
        raise CheckpointError(f"The text encoder in {unet} is {states.shape[-1]} wide, its UNet reads {context_dim}.")
    return states


def _prompt_file(file: str, context_dim: int) -> Tensor:
    source = open_source(file)
    if len(source.entries) != 1:
        raise CheckpointError(f"inputs.context: {file} holds {len(source.entries)} tensors; it must hold one.")
    states = source.get(next(iter(source.entries))).float()
    states = states[None] if states.ndim == 2 else states
    if states.ndim != 3 or states.shape[0] != 1 or states.shape[2] != context_dim:
        raise CheckpointError(
            f"inputs.context: {file} has shape {list(states.shape)}; the UNet reads [1, tokens, {context_dim}]."
        )
    return states.clone()


@torch.no_grad()
def encode_empty_prompt(source: Source) -> Tensor:
    """Last hidden states of an SD1.5 checkpoint's own text encoder for the empty prompt: [1, 77, 768].

    Raises:
        CheckpointError: it has none, or keys are missing.
    """
    shapes, prefix = source.shapes, TEXT.prefix
    if prefix + "embeddings.token_embedding.weight" not in shapes:
        raise CheckpointError(
            f"{source.path} has no text encoder ({prefix}*), and F needs the empty prompt: name a whole SD1.5 "
            "checkpoint, or a file of CLIP's states for the empty prompt with --set inputs.context=FILE."
        )
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as error:
        raise ValueError("The empty prompt needs transformers: pip install it, or set inputs.context=FILE.") from error
    vocabulary, width = shapes[prefix + "embeddings.token_embedding.weight"]
    positions = shapes[prefix + "embeddings.position_embedding.weight"][0]
    layers = 1 + max(int(n[len(prefix) :].split(".")[2]) for n in shapes if n.startswith(prefix + "encoder.layers."))
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=positions, hidden_act="quick_gelu",
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    own = [name for name in model.state_dict() if not name.endswith("position_ids")]
    load_tensors(model, source, {name: prefix + name.removeprefix("text_model.") for name in own}, "unet")
    start, end = vocabulary - 2, vocabulary - 1  # an empty prompt is padded with its end
    tokens = torch.tensor([[start] + [end] * (positions - 1)])
    return model(input_ids=tokens).last_hidden_state


def _not_a(path: Any, kind: str, source: Source, way_out: str) -> str:
    found = describe_stranger(source.entries) or f"a file whose keys begin with {', '.join(sorted(source.entries)[:3])}"
    return f"inputs.{kind}: {path} is {found}, not a {kind}; {way_out}."
