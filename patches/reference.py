"""Reference attention (paper eq. 4 and 5): every self-attention of F also reads the tokens of the portraits.

F_ref runs once per timestep, on the references alone, however the host batches, splits or windows the views.
Its tokens are appended, before to_k and to_v, to the tokens of the positive conditions. The host hands one
batch to all conditions, so the others are padded with copies of their own first tokens: a softmax over every
token repeated equally often is the softmax over the tokens once.
"""
from __future__ import annotations

import logging
import math

import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..diffportrait3d.networks import join_references
from .loading import HostNetwork, check_same_width
from .run_state import RunPatch, RunState, SigmaRange, chunk_size, unused_key

KEY = "diffportrait3d.reference"
SELF_ATTENTIONS = 16  # SD1.5: 6 in the input blocks, 1 in the middle, 9 in the output blocks


class ReferenceLatents:
    """References given as latents in the host's convention (not scaled) [R, 4, h, w]."""

    def __init__(self, samples: Tensor):
        self.samples = samples

    def __len__(self) -> int:
        return self.samples.shape[0]

    def encode(self, height: int, width: int) -> Tensor:
        """Latents [R, 4, height, width]; those of another size are resampled."""
        if self.samples.shape[-2:] == (height, width):
            return self.samples
        return comfy.utils.common_upscale(self.samples, width, height, "bicubic", "center")


class ReferenceImages:
    """References given as images [R, H, W, 3] in [0, 1], encoded at the size of the views once that is known."""

    def __init__(self, vae, images: Tensor):
        if not torch.isfinite(images).all():
            raise ValueError("The reference image contains NaN or infinity; check the node it comes from.")
        self.vae, self.images = vae, images[..., :3]
        self._encoded: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return self.images.shape[0]

    def encode(self, height: int, width: int) -> Tensor:
        """Latents [R, 4, height, width] of the images, cropped to the views' aspect and resized."""
        if (height, width) not in self._encoded:
            scale = self.vae.spacial_compression_encode()
            pixels = resize_images(self.images, height * scale, width * scale)
            self._encoded = {(height, width): self.vae.encode(pixels)}
        return self._encoded[height, width]


def resize_images(images: Tensor, height: int, width: int) -> Tensor:
    """Images [N, H, W, 3] -> [N, height, width, 3]: centre crop to the aspect, then area (smaller) or bicubic."""
    if images.shape[1:3] == (height, width):
        return images
    method = "area" if min(images.shape[1], images.shape[2]) > min(height, width) else "bicubic"
    resized = comfy.utils.common_upscale(images.movedim(-1, 1), width, height, method, "center")
    return resized.movedim(1, -1).clamp(0.0, 1.0)


class ReferenceRun(RunState):
    """The banks of one run, and what F_ref needs to fill them."""

    def __init__(self, guider, key: str, latents: Tensor, zero_timestep: bool):
        super().__init__(guider, key)
        self.latents = guider.model_patcher.model.process_latent_in(latents.float())  # [R, 4, h, w], scaled
        self.context = _first_context(guider)
        self.zero_timestep = zero_timestep
        self.sigma_limits: tuple[float, float] = (math.inf, 0.0)
        self.warned = False
        self._banks: dict[torch.device, tuple[float, dict[tuple, Tensor]]] = {}

    def bank(self, x: Tensor, timesteps: Tensor, context: Tensor) -> dict[tuple, Tensor]:
        """Tokens [1, R*M, C] for every self-attention at this timestep, from the cache if it holds them."""
        step = timesteps[:1] * 0 if self.zero_timestep else timesteps[:1]  # [1]
        known = self._banks.get(x.device)
        if known is None or known[0] != float(step):
            known = (float(step), self._read(x, step, context))
            self._banks[x.device] = known
        return known[1]

    def _read(self, x: Tensor, step: Tensor, context: Tensor) -> dict[tuple, Tensor]:
        bank: dict[tuple, Tensor] = {}

        def write(tokens, keys, values, options):
            bank[place(options)] = join_references([tokens])[0]
            return tokens, keys, values

        count = self.latents.shape[0]
        context = context if self.context is None else self.context.to(context)
        self.network(
            self.latents.to(x),
            step.expand(count),
            context=context[:1].expand(count, -1, -1),
            transformer_options={"patches": {"attn1_patch": [write]}, "cond_or_uncond": [0]},
        )
        return bank


class StepReading:
    """What the self-attentions of one UNet call append, and for which conditions."""

    def __init__(self, bank: dict[tuple, Tensor], positive: list[bool], skipped: set[tuple]):
        self.bank, self.positive, self.skipped = bank, positive, skipped


class ReferencePatch(RunPatch):
    """One Apply Reference Attention node."""

    label = "Reference attention"

    def __init__(self, key: str, references, strength: float, sigma_range: SigmaRange, zero_timestep: bool):
        super().__init__(key)
        self.references, self.strength = references, strength
        self.sigma_range, self.zero_timestep = sigma_range, zero_timestep

    def attach(self, model, network_patcher) -> None:
        super().attach(model, network_patcher)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, self.key, self._prepare_sampling)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, self.key, self._around_unet)
        model.set_model_attn1_patch(self)

    def begin(self, guider, noise: Tensor) -> ReferenceRun:
        latents = self.references.encode(noise.shape[-2], noise.shape[-1])
        run = ReferenceRun(guider, self.key, latents, self.zero_timestep)
        run.sigma_limits = self.sigma_range.limits(guider.model_patcher.get_model_object("model_sampling"))
        return run

    def _prepare_sampling(self, executor, model, noise_shape, *args, **kwargs):
        """Budgets memory: F_ref's own batch, and keys and values of each view that are 1 + R times as long."""
        references, shape = len(self.references), list(noise_shape)
        shape[0] += references + math.ceil(shape[0] * references / 4)
        return executor(model, shape, *args, **kwargs)

    def _around_unet(self, executor, x, timesteps=None, context=None, y=None, control=None,
                     transformer_options=None, *args, **kwargs):
        """Puts the tokens of this step into the call's options, where the attentions find them."""
        run = self.state(transformer_options)
        positive = run.positive_chunks(transformer_options)
        if any(positive) and self._acts_at(run, transformer_options):
            transformer_options[self._reading] = StepReading(
                run.bank(x, timesteps, context), positive, self._replaced(run, transformer_options)
            )
        try:
            return executor(x, timesteps, context, y, control, transformer_options, *args, **kwargs)
        finally:
            transformer_options.pop(self._reading, None)

    @property
    def _reading(self) -> str:
        return self.key + ".reading"

    def _acts_at(self, run: ReferenceRun, transformer_options: dict) -> bool:
        highest, lowest = run.sigma_limits
        return lowest <= float(transformer_options["sigmas"].flatten()[0]) <= highest

    def _replaced(self, run: ReferenceRun, transformer_options: dict) -> set[tuple]:
        """Self-attentions that another patch computes by itself; longer keys would break it (PAG, SAG)."""
        replaced = set(transformer_options.get("patches_replace", {}).get("attn1", {}))
        if replaced and not run.warned:
            run.warned = True
            logging.warning(
                "Reference attention leaves out the self-attentions that another node replaces: %s",
                ", ".join(" ".join(map(str, where)) for where in sorted(replaced, key=str)),
            )
        return replaced

    def __call__(self, tokens: Tensor, keys: Tensor, values: Tensor, options: dict):
        """attn1_patch of the host: tokens [N, L, C] before to_q, to_k and to_v."""
        reading: StepReading | None = options.get(self._reading)
        where = place(options)
        if reading is None or where in reading.skipped or where[:2] in reading.skipped:
            return tokens, keys, values
        reference = reading.bank[where]
        _check_token_count(reference, len(self.references), options)
        rows = chunk_size(keys.shape[0], options)
        same = keys is values
        keys = append_reference(keys, reference, reading.positive, rows, len(self.references), self.strength)
        if same:
            return tokens, keys, keys
        return tokens, keys, append_reference(
            values, reference, reading.positive, rows, len(self.references), self.strength
        )


def place(options: dict) -> tuple:
    """Which self-attention of the UNet: (input | middle | output, block number, transformer block)."""
    return (*options["block"], options["block_index"])


def append_reference(
    own: Tensor, reference: Tensor, positive: list[bool], rows: int, count: int, strength: float
) -> Tensor:
    """Appends `count` references of M tokens each, or as many own tokens where the condition is not positive.

    Args:
        own: [N, L, C], chunk after chunk of `rows` rows; L >= M (more if another patch has appended already).
        reference: [1, count*M, C].
        strength: 1 the reference as it is, 0 own tokens only, between: tokens blended.

    Returns:
        [N, L + count*M, C]
    """
    padding = own[:, : reference.shape[1] // count].repeat(1, count, 1)  # [N, count*M, C]
    chunks = []
    for chunk, is_positive in zip(padding.split(rows), positive, strict=True):
        chunks.append(torch.lerp(chunk, reference.to(own).expand_as(chunk), strength) if is_positive else chunk)
    return torch.cat([own, torch.cat(chunks)], dim=1)


def _check_token_count(reference: Tensor, count: int, options: dict) -> None:
    height, width = options["activations_shape"][-2:]
    if reference.shape[1] != count * height * width:
        raise ValueError(
            f"The reference has {reference.shape[1] // count} tokens where a view has {height * width}; "
            "area conditioning and tiled attention do not go together with reference attention."
        )


def _first_context(guider) -> Tensor | None:
    """Text tokens of the run's first positive condition; F_ref reads the references with them."""
    for cond in guider.conds.get("positive", ()):
        if cond.get("cross_attn") is not None:
            return cond["cross_attn"]
    return None


def apply_reference_attention(
    model,
    encoder: HostNetwork,
    references: ReferenceLatents | ReferenceImages,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
):
    """A clone of MODEL `model` whose self-attentions read `references` (one person, any number) through F_ref.

    Raises:
        ValueError: strength outside 0..1, no reference, or an encoder of another width than the model.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be between 0 and 1, not {strength}")
    if len(references) < 1:
        raise ValueError("Reference attention needs at least one reference image, got an empty batch.")
    check_same_width(model, encoder)
    sigma_range = SigmaRange(start_percent, end_percent)
    patched = model.clone()
    if strength > 0.0:
        zero_timestep = encoder.metadata.get("reference_timestep", "current") == "zero"
        patch = ReferencePatch(unused_key(model, KEY), references, strength, sigma_range, zero_timestep)
        patch.attach(patched, encoder.patcher)
    return patched
