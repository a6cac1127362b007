"""What colours the latents of an autoencoder stand for: `python -m training.latent_colours FILE --out FILE`.

Hosts show latents while they are denoised as a linear map from the 4 channels to RGB. They know the one that fits
SD1.5's latents; an autoencoder trained from scratch has latents of its own and other colours. `training.autoencoder`
fits the map to its validation images; this command fits it to freshly rendered people, for a file without one, and
writes the file with it: the tensors stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffportrait3d.cameras.labels import orbit_camera
from diffportrait3d.synthetic_heads import IctHeads, portrait_scene, render_views
from diffportrait3d.weights.files import facts_of, load_network, read_tensors, save_network

from .engine.command import exit_status

YAWS = (-40.0, 0.0, 40.0)  # degrees; every person is seen from three sides


def fit_latent_colours(latents: Tensor, images: Tensor) -> dict[str, list]:
    """The linear map from latents to colours that is best in least squares.

    Args:
        latents: scaled latents [N, C, h, w], as the UNet sees them.
        images: what they stand for, [N, 3, H, W] in [-1, 1].

    Returns:
        {"factors": [C][3], "bias": [3]}: the RGB value of a cell in [-1, 1] is latent @ factors + bias.
    """
    cells = F.adaptive_avg_pool2d(images.float(), latents.shape[-2:]).movedim(1, -1).reshape(-1, 3)  # [N*h*w, 3]
    known = latents.float().movedim(1, -1).reshape(len(cells), -1)  # [N*h*w, C]
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    *factors, bias = torch.linalg.lstsq(known.double(), cells.double()).solution.tolist()
    return {
        "factors": [[round(value, 4) for value in row] for row in factors],
        "bias": [round(value, 4) for value in bias],
    }


def shown_colours(latents: Tensor, colours: dict[str, list]) -> Tensor:
    """Latents [N, C, h, w] -> the RGB images [N, 3, h, w] in [-1, 1] that a preview shows of them."""
    weight = torch.tensor(colours["factors"]).T[..., None, None]  # [3, C, 1, 1]
    return F.conv2d(latents.float(), weight, torch.tensor(colours["bias"])).clamp(-1.0, 1.0)


def rendered_people(count: int, first_seed: int, resolution: int, provider: str | IctHeads) -> Tensor:
    """Images [3 * count, 3, H, W] in [-1, 1] of people `first_seed`, `first_seed` + 1, ... from three sides."""
    labels, seeds = orbit_camera(YAWS, 0.0), range(first_seed, first_seed + count)
    return torch.cat([render_views(portrait_scene(k, provider), labels, resolution).image for k in seeds]) * 2 - 1


def add_colours(options: argparse.Namespace) -> None:
    """Writes the autoencoder file with the fitted map in its metadata, and prints how far its colours are off."""
    if options.people < 1:
        raise ValueError(f"--people must be at least 1, not {options.people}.")
    autoencoder, metadata = load_network(options.file, "autoencoder")
    provider = "analytic" if options.ict is None else IctHeads(options.ict)
    images = rendered_people(options.people, options.seed, int(metadata.get("image_size", 256)), provider)
    with torch.inference_mode():
        latents = torch.cat([autoencoder.encode(chunk) for chunk in images.split(4)])
    colours = fit_latent_colours(latents, images)
    cells = F.adaptive_avg_pool2d(images, latents.shape[-2:])
    error = float((shown_colours(latents, colours) - cells).abs().mean() * 127.5)
    dtype = next(tensor.dtype for tensor in read_tensors(options.file).values() if tensor.is_floating_point())
    save_network(options.out, autoencoder, "autoencoder", dtype, **{**facts_of(metadata), "latent_rgb": colours})
    print(f"factors {colours['factors']}, bias {colours['bias']}: {error:.1f} of 255 from the images' colours")
    print(f"written to {options.out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.latent_colours", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, help="autoencoder.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="the file to write; may be the same")
    parser.add_argument("--people", type=int, default=16, help="how many people to render")
    parser.add_argument("--seed", type=int, default=0, help="the first of them; those of training begin at 0")
    parser.add_argument("--ict", type=Path, help="ICT face model (.npz); without it the people are analytic")
    options = parser.parse_args(argv)
    return exit_status(lambda: add_colours(options))


if __name__ == "__main__":
    raise SystemExit(main())
