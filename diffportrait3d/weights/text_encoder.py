"""The text encoder in an SD1.5 checkpoint, CLIP's: its sizes, its keys, and its states of the empty prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..networks.sizes import Shapes, consecutive
from .checkpoints import Checkpoint
from .files import CheckpointError
from .sd15 import copy_tensors

PREFIX = "cond_stage_model.transformer.text_model."
TOKENS = PREFIX + "embeddings.token_embedding.weight"
POSITIONS = PREFIX + "embeddings.position_embedding.weight"


@dataclass(frozen=True)
class TextEncoderSizes:
    """Sizes of CLIP's text transformer; SD1.5's by default."""

    vocabulary: int = 49408
    width: int = 768
    positions: int = 77
    hidden: int = 3072
    layers: int = 12

    @classmethod
    def of(cls, shapes: Shapes) -> TextEncoderSizes:
        """Those in a checkpoint; SD1.5's where it has no text encoder."""
        if len(shapes.get(TOKENS, ())) != 2:
            return cls()
        vocabulary, width = shapes[TOKENS]
        positions = shapes.get(POSITIONS, (cls.positions,))[0]
        hidden = shapes.get(PREFIX + "encoder.layers.0.mlp.fc1.weight", (4 * width,))[0]
        layers = consecutive(shapes, PREFIX + "encoder.layers.{}.layer_norm1.weight")
        return cls(vocabulary, width, positions, hidden, layers or cls.layers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key in a checkpoint, and its shape."""
        width, hidden = self.width, self.hidden
        linear = {f"self_attn.{name}_proj": (width, width) for name in ("k", "v", "q", "out")}
        linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        layer = {**linear, "layer_norm1": (width,), "layer_norm2": (width,)}
        modules = {f"encoder.layers.{n}.{name}": shape for n in range(self.layers) for name, shape in layer.items()}
        shapes: dict[str, tuple[int, ...]] = {TOKENS: (self.vocabulary, width), POSITIONS: (self.positions, width)}
        for name, shape in {**modules, "final_layer_norm": (width,)}.items():
            shapes |= {f"{PREFIX}{name}.weight": shape, f"{PREFIX}{name}.bias": shape[:1]}
        return shapes


@torch.no_grad()
def encode_empty_prompt(checkpoint: Checkpoint) -> Tensor:
    """Last hidden states of a checkpoint's own text encoder for the empty prompt: [1, 77, 768] in SD1.5.

    Raises:
        CheckpointError: it has none, or keys are missing.
    """
    if TOKENS not in checkpoint.shapes:
        raise CheckpointError(
            f"{checkpoint.path} has no text encoder ({PREFIX}*), and F needs the empty prompt: name a whole SD1.5 "
            "checkpoint."
        )
    from transformers import CLIPTextConfig, CLIPTextModel  # takes seconds, and few need it

    sizes = TextEncoderSizes.of(checkpoint.shapes)
    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=max(1, sizes.width // 64),
        max_position_embeddings=sizes.positions, hidden_act="quick_gelu",
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    own = [name for name in model.state_dict() if not name.endswith("position_ids")]
    copy_tensors(model, checkpoint, {name: PREFIX + name.removeprefix("text_model.") for name in own})
    start, end = sizes.vocabulary - 2, sizes.vocabulary - 1  # an empty prompt is padded with its end
    tokens = torch.tensor([[start] + [end] * (sizes.positions - 1)])
    return model(input_ids=tokens).last_hidden_state
