"""Sizes of the Stable Diffusion 1.5 family and of the networks that copy its topology."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class NetworkConfig:
    """Round trip of a frozen dataclass through JSON; unknown names are errors, not surprises."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """Builds the config from `to_dict()` output.

        Raises:
            ValueError: a name that this config does not have.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            names = ", ".join(sorted(known))
            raise ValueError(f"{cls.__name__} has no setting named {', '.join(unknown)}; it has {names}.")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Topology of the denoiser F and of everything that copies it (F_ref, F_cam, view attention).

    The defaults are SD1.5's; `model_channels` and `context_dim` alone make a miniature of it. A narrow one wants fewer
    `norm_groups`, too: with 32 channels in 32 groups every channel is normalised by itself, and the colour of even
    areas is forgotten in every block.
    """

    model_channels: int = 320
    context_dim: int = 768
    in_channels: int = 4
    out_channels: int = 4
    hint_channels: int = 3
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    num_heads: int = 8
    max_views: int = 32
    norm_groups: int = 32

    def __post_init__(self):
        if self.model_channels % 32:
            raise ValueError(
                f"model_channels must be a multiple of 32 (32 norm groups, 8 heads), not {self.model_channels}."
            )
        if self.norm_groups < 1 or 32 % self.norm_groups:
            raise ValueError(f"norm_groups must be 1, 2, 4, 8, 16 or 32, not {self.norm_groups}.")

    @property
    def embedding_channels(self) -> int:
        return 4 * self.model_channels

    def input_channels(self) -> list[int]:
        """Channels after each input block; they are also the channels of the skip connections."""
        channels = [self.model_channels]
        for level, mult in enumerate(self.channel_mult):
            channels += [mult * self.model_channels] * self.num_res_blocks
            if level < len(self.channel_mult) - 1:
                channels.append(mult * self.model_channels)  # Downsample
        return channels

    def output_channels(self) -> list[int]:
        """Channels after each output block."""
        return [m * self.model_channels for m in reversed(self.channel_mult) for _ in range(self.num_res_blocks + 1)]

    def upsample_blocks(self) -> list[int]:
        """Indices of the output blocks that end in an Upsample (2, 5, 8 in SD1.5)."""
        per_level = self.num_res_blocks + 1
        return [per_level * (i + 1) - 1 for i in range(len(self.channel_mult) - 1)]


@dataclass(frozen=True)
class AutoencoderConfig(NetworkConfig):
    """Topology of the KL autoencoder, 8 times smaller latents.

    SD1.5's is ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, patch_size=1, norm_groups=32. The defaults are the
    miniature's: it sees patches of 4x4 pixels as channels (pixel unshuffle), which spares a small CPU the layers at
    full resolution, and has few norm groups, because norms over one or two channels forget the colour of even areas.
    """

    ch: int = 64
    ch_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    z_channels: int = 4
    in_channels: int = 3
    patch_size: int = 4
    norm_groups: int = 4

    def __post_init__(self):
        if self.ch % 32 or self.ch % self.norm_groups:
            raise ValueError(f"ch must be a multiple of 32 and of norm_groups ({self.norm_groups}), not {self.ch}.")

    @property
    def downscale(self) -> int:
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    @property
    def patch_channels(self) -> int:
        return self.in_channels * self.patch_size**2
