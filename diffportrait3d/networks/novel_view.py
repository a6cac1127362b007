"""S, the small novel-view model whose blurry but 3D-consistent renders seed the 3D-aware noise.

Paper section 3.4 and supplement A.1: a network lifts the portrait to a 3D feature volume, volume rendering
along the rays of the target camera gathers the volume to a 2D feature map, and a 2D network decodes that map.

Design choices the paper leaves open:

* The volume is an axis-aligned box in WORLD space, not the source camera's frustum. Labels put every head in
  the same canonical pose, so a voxel is the same anatomical place for every subject and source view: the 3D
  convolutions and a learned prior volume can complete unseen sides, and wide relative rotations never leave
  the volume. A frustum would need no lifting, but its cells mean something else for each source camera.
* Lifting is by projection: a voxel gathers the source features its centre projects to, and the 3D
  convolutions decide how much of that is surface.
* Ray samples also read the source's feature map directly, weighted by a gate from the volume (where the
  source saw the surface). Without this, texture cannot be finer than a voxel.
* The background is at infinity: its features are fetched by rotation alone and fade to a global vector
  outside the source's field of view, so backgrounds turn with the camera instead of smearing over the head.

Cameras are 25-number EG3D labels (OpenCV axes: x right, y down, z forward; world y up).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..cameras.labels import PIVOT
from ..cameras.projection import pixel_centres, project_to_unit, world_rays
from .config import NetworkConfig
from .layers import Checkpointed, zero_init

DENSITY_SCALE = 10.0  # opacity per world unit of softplus(logit - 1); heads are about 0.3 units wide


@dataclass(frozen=True)
class NovelViewConfig(NetworkConfig):
    """Sizes of S. Lengths are in EG3D world units (camera radius 2.7).

    image_size / render_size must be a power of two of at least 2; render_size a multiple of 4;
    volume_size a multiple of 4. The defaults are the CPU preset (128 px).
    """

    image_size: int = 128
    render_size: int = 32  # rays per side, also the resolution of the 2D feature maps
    base_channels: int = 40
    feature_channels: int = 16  # carried along rays; the first three are colour
    volume_size: int = 20  # voxels per side
    volume_channels: int = 16
    prior_channels: int = 8
    samples_per_ray: int = 24
    box_center: tuple[float, float, float] = PIVOT  # heads sit where the cameras look
    box_half_size: float = 0.36  # at the pivot's depth the frame is 0.32 wide to each side

    def __post_init__(self):
        ratio = self.image_size // self.render_size
        if ratio < 2 or ratio * self.render_size != self.image_size or ratio & (ratio - 1):
            raise ValueError(
                f"image_size / render_size must be a power of two of at least 2, "
                f"got {self.image_size} / {self.render_size}"
            )
        if self.render_size % 4 or self.volume_size % 4:
            raise ValueError(
                f"render_size and volume_size must be multiples of 4, got {self.render_size} and {self.volume_size}"
            )
        if self.feature_channels < 4:
            raise ValueError(f"feature_channels must be at least 4 (colour and one more), got {self.feature_channels}")


def ray_box(origins: Tensor, directions: Tensor, center: Tensor, half_size: float) -> tuple[Tensor, Tensor]:
    """Distances [N, R] at which rays enter and leave the box; equal where they miss it (or it is behind)."""
    safe = torch.where(directions.abs() < 1e-6, torch.full_like(directions, 1e-6), directions)
    first = (center - half_size - origins) / safe  # [N, R, 3]
    second = (center + half_size - origins) / safe
    enter = torch.minimum(first, second).amax(-1).clamp(min=0)
    leave = torch.maximum(first, second).amin(-1)
    return enter, torch.maximum(enter, leave)


def sample_volume(volume: Tensor, points: Tensor, center: Tensor, half_size: float) -> Tensor:
    """Trilinear reading. volume [N, C, D, H, W] (z, y, x), points [N, R, S, 3] world -> [N, C, R, S].

    Voxel k spans [k, k+1] / size of the box, so its value sits at the half-voxel (align_corners=False).
    """
    grid = (points - center) / half_size  # [N, R, S, 3] in [-1, 1], order x, y, z as grid_sample expects
    return F.grid_sample(volume, grid[:, None], padding_mode="border", align_corners=False)[:, :, 0]


def sample_map(features: Tensor, image: Tensor) -> Tensor:
    """Bilinear reading of a feature map. features [N, C, H, W], image [N, P, 2] in [0, 1] -> [N, C, P]."""
    grid = (2 * image - 1).clamp(-4, 4)[:, None]  # [N, 1, P, 2]; far outside is as good as the border
    return F.grid_sample(features, grid, padding_mode="border", align_corners=False)[:, :, 0]


def composite_weights(logits: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha compositing front to back. Density logits [N, R, S], step length [N, R].

    Returns each sample's weight [N, R, S] and the light left for the background [N, R]; they sum to one.
    """
    optical = F.softplus(logits - 1) * DENSITY_SCALE * step[..., None]  # [N, R, S]
    through = torch.exp(-torch.cumsum(optical, dim=-1))  # transmittance behind each sample
    before = torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], dim=-1)
    return before - through, through[..., -1]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResidualBlock(Checkpointed):
    """GroupNorm, SiLU, convolution, twice, plus the input. Starts as the identity (zero last convolution)."""

    def __init__(self, channels: int, out_channels: int | None = None, dimensions: int = 2):
        super().__init__()
        out_channels = out_channels or channels
        conv = nn.Conv3d if dimensions == 3 else nn.Conv2d
        self.norm1, self.conv1 = _norm(channels), conv(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_channels), conv(out_channels, out_channels, 3, padding=1)
        self.skip = conv(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        zero_init(self.conv2)

    def compute(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class GlobalAttention(nn.Module):
    """Self-attention over all positions of a small 2D map, so one side of the face can inform the other."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = _norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        q, k, v = rearrange(self.qkv(self.norm(x)), "n (t e c) h w -> t n e (h w) c", t=3, e=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "n e (h w) c -> n (e c) h w", w=size))


class ImageEncoder(nn.Module):
    """Portrait [N, 3, H, W] in [-1, 1] -> feature map [N, base, r, r] and a global vector [N, 4*base]."""

    def __init__(self, cfg: NovelViewConfig):
        super().__init__()
        c, halvings = cfg.base_channels, int(math.log2(cfg.image_size // cfg.render_size)) - 1
        widths = [max(c >> k, 8) for k in range(halvings, -1, -1)]  # up to c at render_size
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, widths[0], 3, padding=1),
            *[
                layer
                for a, b in zip(widths, widths[1:], strict=False)
                for layer in (_norm(a), nn.SiLU(), nn.Conv2d(a, b, 3, stride=2, padding=1))
            ],
        )
        self.fine = ResidualBlock(c)
        self.down1 = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.middle1 = ResidualBlock(2 * c)
        self.down2 = nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1)
        self.bottom = nn.Sequential(ResidualBlock(4 * c), GlobalAttention(4 * c), ResidualBlock(4 * c))
        self.up2 = nn.Conv2d(4 * c, 2 * c, 1)
        self.middle2 = ResidualBlock(2 * c)
        self.up1 = nn.Conv2d(2 * c, c, 1)
        self.out = ResidualBlock(c)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(self.stem(image))  # [N, c, r, r]
        half = self.middle1(self.down1(fine))  # [N, 2c, r/2, r/2]
        bottom = self.bottom(self.down2(half))  # [N, 4c, r/4, r/4]
        half = self.middle2(half + F.interpolate(self.up2(bottom), scale_factor=2))
        return self.out(fine + F.interpolate(self.up1(half), scale_factor=2)), bottom.mean(dim=(2, 3))


class VolumeNetwork(nn.Module):
    """3D residual U-Net over the lifted volume [N, in, D, D, D] -> [N, volume_channels, D, D, D]."""

    def __init__(self, in_channels: int, cfg: NovelViewConfig):
        super().__init__()
        c = cfg.volume_channels
        self.enter = nn.Conv3d(in_channels, c, 1)
        self.down1 = nn.Conv3d(c, 2 * c, 2, stride=2)
        self.down2 = nn.Conv3d(2 * c, 4 * c, 2, stride=2)
        self.bottom = nn.Sequential(ResidualBlock(4 * c, dimensions=3), ResidualBlock(4 * c, dimensions=3))
        self.up2 = nn.Conv3d(4 * c, 2 * c, 1)
        self.middle2 = ResidualBlock(2 * c, dimensions=3)
        self.up1 = nn.Conv3d(2 * c, c, 1)
        self.leave = nn.Sequential(_norm(c), nn.SiLU(), nn.Conv3d(c, c, 3, padding=1))

    def forward(self, x: Tensor, global_vector: Tensor) -> Tensor:
        """global_vector [N, 4 * volume_channels] is added at the coarsest level."""
        x = self.enter(x)
        half = self.down1(x)
        bottom = self.bottom(self.down2(half) + global_vector[:, :, None, None, None])
        half = self.middle2(half + F.interpolate(self.up2(bottom), scale_factor=2.0, mode="trilinear"))
        x = x + F.interpolate(self.up1(half), scale_factor=2.0, mode="trilinear")
        return x + self.leave(x)


class ImageDecoder(nn.Module):
    """Rendered features [N, feature_channels + 1, r, r] -> image [N, 3, H, W]; colour passes straight up."""

    def __init__(self, cfg: NovelViewConfig):
        super().__init__()
        c, doublings = cfg.base_channels, int(math.log2(cfg.image_size // cfg.render_size)) - 1
        self.enter = nn.Conv2d(cfg.feature_channels + 1, c, 3, padding=1)
        self.coarse = nn.Sequential(ResidualBlock(c), ResidualBlock(c))
        layers, width = [], c
        for _ in range(doublings):
            narrow = max(width // 2, 16)
            layers += [nn.Upsample(scale_factor=2), ResidualBlock(width, narrow)]
            width = narrow
        self.fine = nn.Sequential(*layers)
        self.out = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))
        zero_init(self.out[2])

    def forward(self, rendered: Tensor, alpha: Tensor) -> Tensor:
        detail = self.out(self.fine(self.coarse(self.enter(torch.cat([rendered, alpha], dim=1)))))
        colour = F.interpolate(rendered[:, :3], size=detail.shape[-2:], mode="bilinear", align_corners=False)
        return colour + detail


class NovelViewModel(nn.Module):
    """S: portrait, its camera and a target camera -> the portrait as that camera would roughly see it."""

    voxels: Tensor
    center: Tensor

    def __init__(self, cfg: NovelViewConfig):
        super().__init__()
        self.config = cfg
        c, f, v, d = cfg.base_channels, cfg.feature_channels, cfg.volume_channels, cfg.volume_size
        self.encoder = ImageEncoder(cfg)
        self.lift = nn.Conv2d(c, v, 1)
        self.pixel_features = nn.Conv2d(c, f - 3, 1)
        self.background_features = nn.Sequential(ResidualBlock(c), nn.Conv2d(c, f - 3, 1))
        self.background_colour = nn.Conv2d(c, 3, 1)  # where the head hides it, not the source's colour
        self.background_outside = nn.Linear(4 * c, f)  # beyond the source's field of view
        self.background_falloff = nn.Parameter(torch.tensor(0.5))  # per field of view
        self.prior = nn.Parameter(0.1 * torch.randn(1, cfg.prior_channels, d, d, d))
        self.volume = VolumeNetwork(v + cfg.prior_channels + 2, cfg)
        self.volume_global = nn.Linear(4 * c, 4 * v)
        self.volume_out = nn.Conv3d(v, f + 2, 1)  # density, gate, features
        self.decoder = ImageDecoder(cfg)
        for layer in (self.volume_out, self.background_colour, self.background_outside):
            nn.init.normal_(zero_init(layer).weight, std=0.02)
        list(self.volume_out.parameters())[1].data[1] = 2.0  # training starts from the source's texture on a ball
        self.register_buffer("voxels", self._voxel_centres(), persistent=False)
        self.register_buffer("center", torch.tensor(cfg.box_center), persistent=False)  # of the volume, [3]
        self.density_prior = nn.Parameter(self._initial_density())

    def _voxel_centres(self) -> Tensor:
        """World positions [D*D*D, 3] in (z, y, x) order of the volume's memory."""
        size = self.config.volume_size
        axis = ((torch.arange(size) + 0.5) / size * 2 - 1) * self.config.box_half_size
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        return torch.stack([x, y, z], dim=-1).reshape(-1, 3) + torch.tensor(self.config.box_center)

    def _initial_density(self) -> Tensor:
        """A soft ball the size of a head: training starts from a solid, not from fog or a flat board."""
        size = self.config.volume_size
        distance = (self.voxels - self.center).norm(dim=-1)
        return (20 * (0.2 - distance)).clamp(-4, 4).reshape(1, 1, size, size, size)

    def rays(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Through the centres of the feature map's pixels: origins [N, 1, 3], unit directions [N, r*r, 3]."""
        size = self.config.render_size
        return label[:, None, 3:12:4], world_rays(pixel_centres(size, size, label), label)

    def build_volume(self, features: Tensor, global_vector: Tensor, source_label: Tensor) -> Tensor:
        """Features [N, base, r, r] -> density and gate logits, features [N, 2 + F, D, D, D] (z, y, x)."""
        n, d = features.shape[0], self.config.volume_size
        image, depth = project_to_unit(self.voxels.expand(n, -1, -1), source_label)  # [N, D^3, 2], [N, D^3]
        seen = ((image > 0) & (image < 1)).all(-1).to(features.dtype)  # [N, D^3]
        lifted = sample_map(self.lift(features), image) * seen[:, None]  # [N, v, D^3]
        distance = depth - (source_label[:, None, 3:12:4] - self.center).norm(dim=-1)
        extra = torch.stack([seen, distance / self.config.box_half_size], dim=1)  # [N, 2, D^3]
        lifted = torch.cat([lifted, extra], dim=1).reshape(n, -1, d, d, d)
        lifted = torch.cat([lifted, self.prior.expand(n, -1, -1, -1, -1)], dim=1)
        volume = self.volume_out(self.volume(lifted, self.volume_global(global_vector)))
        return torch.cat([volume[:, :1] + self.density_prior, volume[:, 1:]], dim=1)

    def background(
        self, colour: Tensor, features: Tensor, global_vector: Tensor, source_label: Tensor, directions: Tensor
    ) -> Tensor:
        """Features of the background at infinity along world directions [N, R, 3] -> [N, F, R].

        colour [N, 3, r, r] is the source at render resolution.
        """
        image, depth = project_to_unit(directions, source_label, at_infinity=True)
        colour = colour + self.background_colour(features)
        maps = torch.cat([colour, self.background_features(features)], dim=1)  # [N, F, r, r]
        outside = (image - image.clamp(0, 1)).norm(dim=-1)  # [N, R], in fields of view
        weight = torch.exp(-F.softplus(self.background_falloff) * outside) * (depth > 0)
        beyond = self.background_outside(global_vector)[:, :, None]  # [N, F, 1]
        return beyond + (sample_map(maps, image) - beyond) * weight[:, None]

    def render(
        self,
        volume: Tensor,
        pixel_map: Tensor,
        source_label: Tensor,
        target_label: Tensor,
        background: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Volume rendering. volume [N, 2 + F, D, D, D], pixel_map [N, F, r, r] (source's), labels [N, 25].

        Returns features [N, F, r, r] over the background [N, F, r*r] (zeros if None) and opacity [N, 1, r, r].
        """
        size, samples = self.config.render_size, self.config.samples_per_ray
        origins, directions = self.rays(target_label)
        enter, leave = ray_box(origins, directions, self.center, self.config.box_half_size)
        step = (leave - enter) / samples  # [N, R]
        centres = torch.arange(samples, device=step.device, dtype=step.dtype) + 0.5
        distance = enter[..., None] + step[..., None] * centres  # [N, R, S]
        points = origins[:, :, None] + directions[:, :, None] * distance[..., None]  # [N, R, S, 3]
        read = sample_volume(volume, points, self.center, self.config.box_half_size)  # [N, 2 + F, R, S]
        logits, gates, features = read.split([1, 1, read.shape[1] - 2], dim=1)
        weights, through = composite_weights(logits[:, 0].float(), step)
        image, _ = project_to_unit(points.flatten(1, 2), source_label)
        pixels = sample_map(pixel_map, image).unflatten(2, (-1, samples))  # [N, F, R, S]
        from_source = torch.sigmoid(gates) * weights[:, None]  # [N, 1, R, S]
        from_volume = weights[:, None] - from_source
        rendered = (pixels * from_source).sum(-1) + (features * from_volume).sum(-1)  # [N, F, R]
        if background is not None:
            rendered = rendered + background * through[:, None]
        alpha = 1 - through  # [N, R]
        return rendered.unflatten(-1, (size, size)), alpha.unflatten(-1, (1, size, size))

    def forward(self, source: Tensor, source_label: Tensor, target_label: Tensor) -> Tensor:
        """source [N, 3, H, W] in [-1, 1], its label [N, 25], target_label [N, 25] -> [N, 3, H, W] in [-1, 1].

        Clamped in evaluation mode only, so that training has gradients at the ends of the range.
        """
        size = self.config.image_size
        if source.ndim != 4 or source.shape[1:] != (3, size, size):
            raise ValueError(f"S expects images [N, 3, {size}, {size}], got {tuple(source.shape)}")
        if not len(source) == len(source_label) == len(target_label):
            raise ValueError(
                f"S needs a source and a target label per image, got {len(source)} images, "
                f"{len(source_label)} and {len(target_label)} labels"
            )
        features, global_vector = self.encoder(source)
        colour = F.adaptive_avg_pool2d(source, self.config.render_size)  # [N, 3, r, r]
        volume = self.build_volume(features, global_vector, source_label)
        pixel_map = torch.cat([colour, self.pixel_features(features)], dim=1)  # [N, F, r, r]
        _, directions = self.rays(target_label)
        background = self.background(colour, features, global_vector, source_label, directions)
        rendered, alpha = self.render(volume, pixel_map, source_label, target_label, background)
        image = self.decoder(rendered, alpha)
        return image if self.training else image.clamp(-1, 1)
