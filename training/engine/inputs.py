"""What a stage builds on and starts from: our own files, the authors' networks, and files of other software.

The latter are SD1.5 checkpoints, ControlNets and AnimateDiff's motion modules (`diffportrait3d.weights.sd15`), as
safetensors, or as pickles, of which no code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffportrait3d.weights.checkpoints import open_checkpoint
from diffportrait3d.weights.files import CheckpointError, holds_network, load_network
from diffportrait3d.weights.sd15 import load_foreign
from diffportrait3d.weights.text_encoder import encode_empty_prompt


class InputNetworks:
    """The networks that a stage's `inputs` name, with their weights."""

    weights = True

    def __init__(self, inputs: Any):
        self.inputs = inputs

    def __call__(self, kind: str) -> tuple[nn.Module, dict[str, Any]]:
        """See `load_input`."""
        return load_input(getattr(self.inputs, kind), kind)

    def prompt(self, context_dim: int) -> Tensor:
        """See `empty_prompt`."""
        return empty_prompt(self.inputs.context, self.inputs.unet, context_dim)


def load_input(path: str | None, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network to build on, or to start from, out of a file of any of the layouts above (in eval mode, without
    gradients), and its metadata.

    Raises:
        ValueError: no file was named. CheckpointError: the file does not hold such a network, by its keys.
    """
    if not path:
        raise ValueError(f"This stage builds on a trained {kind}: name its file with --set inputs.{kind}=FILE.")
    try:
        if holds_network(path):
            return load_network(path, kind)
        module = load_foreign(open_checkpoint(path), kind)
    except CheckpointError as error:
        raise CheckpointError(f"inputs.{kind}: {error}") from error
    metadata = {"network": kind, "config": module.config.to_dict(), "initialised_from": Path(path).name}
    return module.eval().requires_grad_(False), metadata


def empty_prompt(file: str | None, unet: str | None, context_dim: int) -> Tensor:
    """CLIP's states of the empty prompt [1, L, context_dim]: what F's text attention is given.

    From `file` (safetensors with one tensor [L, D] or [1, L, D]), else from the text encoder in the SD1.5 checkpoint
    that `unet` names. A UNet that was trained here knows no text: it is given zeros [1, 1, D].

    Raises:
        CheckpointError: the file does not fit, or the checkpoint has no text encoder.
    """
    if file:
        return _prompt_file(file, context_dim)
    if not unet or holds_network(unet):
        return torch.zeros(1, 1, context_dim)
    try:
        states = encode_empty_prompt(open_checkpoint(unet))
    except (CheckpointError, ImportError) as error:
        way_out = "Or name a file of CLIP's states for the empty prompt with --set inputs.context=FILE."
        raise CheckpointError(f"inputs.unet: {error} {way_out}") from error
    if states.shape[-1] != context_dim:
        raise CheckpointError(f"The text encoder in {unet} is {states.shape[-1]} wide, its UNet reads {context_dim}.")
    return states


def _prompt_file(file: str, context_dim: int) -> Tensor:
    checkpoint = open_checkpoint(file)
    if len(checkpoint.entries) != 1:
        raise CheckpointError(f"inputs.context: {file} holds {len(checkpoint.entries)} tensors; it must hold one.")
    states = checkpoint.get(next(iter(checkpoint.entries))).float()
    states = states[None] if states.ndim == 2 else states
    if states.ndim != 3 or states.shape[0] != 1 or states.shape[2] != context_dim:
        raise CheckpointError(
            f"inputs.context: {file} has shape {list(states.shape)}; the UNet reads [1, tokens, {context_dim}]."
        )
    return states.clone()
