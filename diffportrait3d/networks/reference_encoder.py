"""The appearance reference module F_ref (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import UNetConfig
from .layers import set_norm_groups, timestep_embedding
from .unet import build_input_blocks, build_middle_block, build_output_blocks, build_time_embed


class ReferenceEncoder(nn.Module):
    """A copy of the UNet without its output layer; what it gives are the tokens its self-attentions read.

    The tokens of entry i are the hidden states after norm1 of the i-th transformer block, before to_k and to_v: F
    projects them with its own weights (paper eq. 4). Nothing after the last block's norm1 has any influence.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_embed = build_time_embed(config)
        self.input_blocks = build_input_blocks(config)
        self.middle_block = build_middle_block(config)
        self.output_blocks = build_output_blocks(config)
        set_norm_groups(self, config.norm_groups)

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
        bank: list[Tensor] = []
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(latents.dtype))
        h, skips = latents, []
        for block in self.input_blocks:
            h = block(h, emb, context, bank.append)
            skips.append(h)
        h = self.middle_block(h, emb, context, bank.append)
        for block in self.output_blocks[:-1]:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context, bank.append)
        self._read_last(torch.cat([h, skips.pop()], dim=1), emb, bank)
        return bank

    def _read_last(self, h: Tensor, emb: Tensor, bank: list[Tensor]) -> None:
        """The last block only up to its norm1: the rest of it is dead weight."""
        resblock, transformer = self.output_blocks[-1]
        h = transformer.proj_in(transformer.norm(resblock(h, emb)))
        bank.append(transformer.transformer_blocks[0].norm1(rearrange(h, "n c h w -> n (h w) c")))


def join_references(bank: Sequence[Tensor]) -> list[Tensor]:
    """Joins the tokens of R references of one person into one bank (paper eq. 5).

    Args:
        bank: tensors [R, M, C].

    Returns:
        tensors [1, R*M, C], references in order.
    """
    return [rearrange(tokens, "r m c -> 1 (r m) c") for tokens in bank]
