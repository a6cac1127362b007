"""The view control module F_cam (paper section 3.3): a ControlNet v1 that is shown somebody else's portrait."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .config import UNetConfig
from .layers import zero_init
from .unet import UNetEncoder


def build_hint_block(config: UNetConfig) -> nn.Sequential:
    """Eight convolutions from the image to its latent size (8 times smaller); the last is zero-initialised."""
    widths = [(16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2)]
    layers: list[nn.Module] = []
    channels = config.hint_channels
    for width, stride in widths:
        layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, zero_init(nn.Conv2d(channels, config.model_channels, 3, padding=1)))


class ViewControlNet(UNetEncoder):
    """Reads the camera from a portrait of another person at the target view.

    The layout is the SD1.5 ControlNet's, so ControlNet loaders take its file.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.input_hint_block = build_hint_block(config)
        channels = config.input_channels()
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_init(nn.Conv2d(c, c, 1))) for c in channels)
        self.middle_block_out = nn.Sequential(zero_init(nn.Conv2d(channels[-1], channels[-1], 1)))

    def load_from_unet(self, state_dict: Mapping[str, Tensor]) -> None:
        """Initialises the encoder half as a copy of F; hint block and zero convolutions stay as they are."""
        own = self.state_dict()
        self.load_state_dict({k: state_dict.get(k, v) for k, v in own.items()})

    def forward(self, x: Tensor, camera_images: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        """Gives the residuals that F adds to its skip connections.

        Args:
            x: the same noisy latents that F gets [N, 4, h, w].
            camera_images: somebody else at the views' cameras [N, 3, 8h, 8w] in [-1, 1].
            timesteps: [N], 0..999.
            context: text tokens [N, L, context_dim].

        Returns:
            12 skip residuals in block order and the middle one.
        """
        expected = (8 * x.shape[2], 8 * x.shape[3])
        if tuple(camera_images.shape[2:]) != expected:
            found = f"The camera images have {tuple(camera_images.shape[2:])} pixels"
            raise ValueError(f"{found}; latents {tuple(x.shape[2:])} need {expected}.")
        emb = self.embed(timesteps, x.dtype)
        camera = self.input_hint_block(camera_images)  # [N, C, h, w]
        h, residuals = x, []
        for index, (block, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h, _ = block(h, emb, context)
            if index == 0:
                h = h + camera
            residuals.append(zero_conv(h))
        h, _ = self.middle_block(h, emb, context)
        return [*residuals, self.middle_block_out(h)]
