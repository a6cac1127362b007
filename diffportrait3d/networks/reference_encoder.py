"""The appearance reference module F_ref (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from .config import UNetConfig
from .layers import Block, SpatialTransformer
from .unet import UNetEncoder, build_output_blocks


class ReferenceEncoder(UNetEncoder):
    """A copy of the UNet without its output layer; what it gives are the tokens its self-attentions read.

    The tokens of entry i are the hidden states after norm1 of the i-th transformer block, before to_k and to_v: F
    projects them with its own weights (paper eq. 4). Nothing after the last block's norm1 has any influence.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.output_blocks = build_output_blocks(config)

    def load_from_unet(self, state_dict: Mapping[str, Tensor]) -> None:
        """Initialises F_ref as a copy of F, as the paper does."""
        self.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith("out.")})

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        """Reads the reference images.

        Args:
            latents: clean scaled latents [R, 4, h, w].
            timesteps: [R]; the step being denoised, or zeros for an encoder trained that way.
            context: text tokens [R, L, context_dim].

        Returns:
            16 tensors [R, h*w at that block, C], in running order.
        """
        emb = self.embed(timesteps, latents.dtype)
        h, skips, bank = latents, [], []
        for block in self.input_blocks:
            h, tokens = block(h, emb, context)
            skips.append(h)
            bank.append(tokens)
        h, tokens = self.middle_block(h, emb, context)
        bank.append(tokens)
        for block in self.output_blocks[:-1]:
            h, tokens = block(torch.cat([h, skips.pop()], dim=1), emb, context)
            bank.append(tokens)
        resblock, transformer = cast(Block, self.output_blocks[-1])
        h = resblock(torch.cat([h, skips.pop()], dim=1), emb)
        bank.append(cast(SpatialTransformer, transformer).tokens(h))
        return [tokens for tokens in bank if tokens is not None]


def join_references(bank: Sequence[Tensor], people: int = 1) -> list[Tensor]:
    """Tokens of R references of each of P people [P*R, M, C], a person's in a row, as a bank [P, R*M, C] (eq. 5)."""
    return [rearrange(tokens, "(p r) m c -> p (r m) c", p=people) for tokens in bank]
