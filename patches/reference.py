"""Reference attention (paper eq. 4 and 5): every self-attention of F also reads the tokens of the portraits.

F_ref runs once per timestep, on the references alone, however the host batches, splits or windows the views. Where
another patch resizes the features of the views in the middle of the UNet (Deep Shrink), F_ref runs under that patch,
so that its tokens have the size, and are of the kind, that the attentions see there.
Its tokens are appended, before to_k and to_v, to the tokens of the positive conditions. The host hands one
batch to all conditions, so the others are padded with copies of their own first tokens: a softmax over every
token repeated equally often is the softmax over the tokens once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..host.compatibility import check_same_width
from ..host.loading import HostNetwork
from .feature_sizes import resize_features, resizing_patches
from .reference_inputs import References
from .run_state import RunPatch, RunState, SigmaRange, chunk_size, unused_key, views_per_call

KEY = "diffportrait3d.reference"
BLOCKS = ("input", "middle", "output")  # SD1.5 has 6, 1 and 9 self-attentions there

Bank = dict[tuple, Tensor]  # which self-attention -> its tokens [R, h, w, C]


class ReferenceRun(RunState):
    """The banks of one run, and what F_ref needs to fill them."""

    def __init__(self, guider, key: str, views: int, latents: Tensor, zero_timestep: bool):
        super().__init__(guider, key, views)
        self.latents = guider.model_patcher.model.process_latent_in(latents.float())  # [R, 4, h, w], scaled
        self.context = _first_context(guider)
        self.zero_timestep = zero_timestep
        self.sigma_limits: tuple[float, float] = (math.inf, 0.0)
        self.mask: Tensor | None = None  # [R, 1, h, w]
        self.warned = False
        self._banks: dict[torch.device, tuple[float, Bank]] = {}
        self._resizing = False  # whether a patch of this run resizes features
        self._visibility: dict[tuple, Tensor] = {}

    def bank(
        self, x: Tensor, timesteps: Tensor, context: Tensor, options: dict, features_resized: bool = False
    ) -> Bank:
        """Tokens for every self-attention at this timestep, from the cache if it holds them.

        Args:
            context: text tokens of the views, for a run whose positive condition has none.
            options: transformer options of the call.
            features_resized: read again, from now on under those patches in `options` that resize features.
        """
        step = timesteps[:1] * 0 if self.zero_timestep else timesteps[:1]  # [1]
        known = self._banks.get(x.device)
        if features_resized:
            self._resizing = True
        elif known is not None and known[0] == float(step):
            return known[1]
        own_options = _resizing_options(options) if self._resizing else {"patches": {}, "cond_or_uncond": [0]}
        text = (context if self.context is None else self.context.to(context))[:1]  # [1, L, C]
        bank = self._read(x, step, text, own_options)
        self._banks[x.device] = (float(step), bank)
        return bank

    def visibility(self, height: int, width: int, like: Tensor) -> Tensor | None:
        """How much of each token may be read [1, R*height*width, 1]; None: all of all."""
        if self.mask is None:
            return None
        key = (height, width, like.device, like.dtype)
        if key not in self._visibility:
            tokens = interpolate(self.mask, (height, width), mode="area")  # [R, 1, height, width]
            self._visibility[key] = tokens.reshape(1, -1, 1).to(like)
        return self._visibility[key]

    def _read(self, x: Tensor, step: Tensor, context: Tensor, options: dict) -> Bank:
        """Runs F_ref on the references; `options` are its own transformer options."""
        bank: Bank = {}

        def write(tokens, keys, values, options):
            bank[layer_key(options)] = tokens.unflatten(1, options["activations_shape"][-2:])
            return tokens, keys, values

        count = self.latents.shape[0]
        options["patches"]["attn1_patch"] = [write]
        text = context.expand(count, -1, -1)
        self.network(self.latents.to(x), step.expand(count), context=text, transformer_options=options)
        return bank


def _resizing_options(options: dict) -> dict:
    """Options for F_ref under the block patches of a call's `options`, as far as these resize features."""
    ranges = {name: options[name] for name in ("sigmas", "sample_sigmas") if name in options}
    return {**ranges, "patches": resizing_patches(options["patches"]), "cond_or_uncond": [0]}


@dataclass
class ReferenceCall:
    """What the self-attentions of one UNet call append, and for which conditions."""

    run: ReferenceRun
    bank: Bank
    positive: list[bool]  # which conditions are
    skipped: set[tuple]  # self-attentions that another patch computes
    read_again: Callable[[], Bank]  # the bank under the patches that resize features in this call
    fitted: bool = False  # whether the bank has been read again

    def tokens(self, where: tuple, height: int, width: int) -> Tensor:
        """Tokens of the references [1, R*height*width, C] at a self-attention that sees views of that size."""
        if self.bank[where].shape[1:3] != (height, width) and not self.fitted:
            self.bank, self.fitted = self.read_again(), True
        grid = resize_features(self.bank[where].movedim(-1, 1), height, width)  # [R, C, height, width]
        return grid.movedim(1, -1).flatten(0, 2)[None]


class ReferencePatch(RunPatch):
    """One Apply Reference Attention node."""

    label = "Reference attention"

    def __init__(
        self,
        key: str,
        references: References,
        strength: float,
        sigma_range: SigmaRange,
        blocks: frozenset[str],
        zero_timestep: bool,
    ):
        super().__init__(key)
        self.references, self.strength = references, strength
        self.sigma_range, self.blocks = sigma_range, blocks
        self.zero_timestep = zero_timestep

    def attach(self, model, network_patcher) -> None:
        super().attach(model, network_patcher)
        model.set_model_attn1_patch(self)

    def begin(self, guider, noise: Tensor) -> ReferenceRun:
        latents = self.references.encode(noise.shape[-2], noise.shape[-1])
        run = ReferenceRun(guider, self.key, noise.shape[0], latents, self.zero_timestep)
        run.mask = self.references.mask_at(noise.shape[-2], noise.shape[-1])
        self._read_after_tiling(guider.model_options["transformer_options"]["patches"]["attn1_patch"])
        run.sigma_limits = self.sigma_range.limits(guider.model_patcher.get_model_object("model_sampling"))
        return run

    def _read_after_tiling(self, patches: list) -> None:
        """Moves this patch after HyperTile's in a run's list: what is appended must not be cut into tiles."""
        tiling = [n for n, patch in enumerate(patches) if getattr(patch, "__qualname__", "").startswith("HyperTile.")]
        if tiling and patches.index(self) < tiling[-1]:
            patches.remove(self)
            patches.insert(tiling[-1], self)

    def extra_rows(self, run: ReferenceRun, model_options: dict) -> int:
        """F_ref's own batch, and keys and values of each view that are 1 + R times as long."""
        references = len(self.references)
        return references + math.ceil(views_per_call(run.views, model_options) * references / 4)

    def begin_call(self, run: ReferenceRun, unet, x, timesteps, context, options: dict) -> ReferenceCall | None:
        """Reads the tokens of this step."""
        positive = run.positive_chunks(options)
        if not any(positive) or not self._acts_at(run, options):
            return None
        _check_whole_views(run.latents, x)
        read_bank = partial(run.bank, x, timesteps, context, options)
        skipped = self._replaced(run, options)
        return ReferenceCall(run, read_bank(), positive, skipped, partial(read_bank, features_resized=True))

    def _acts_at(self, run: ReferenceRun, transformer_options: dict) -> bool:
        highest, lowest = run.sigma_limits
        return lowest <= float(transformer_options["sigmas"].flatten()[0]) <= highest

    def _replaced(self, run: ReferenceRun, transformer_options: dict) -> set[tuple]:
        """Self-attentions that another patch computes by itself; longer keys would break it (PAG, SAG)."""
        replaced = set(transformer_options.get("patches_replace", {}).get("attn1", {}))
        runs = [state for state in transformer_options.values() if isinstance(state, ReferenceRun)]
        if replaced and not any(state.warned for state in runs):  # once for all nodes of a run
            run.warned = True
            logging.warning(
                "Reference attention leaves out the self-attentions that another node replaces: %s",
                ", ".join(" ".join(map(str, where)) for where in sorted(replaced, key=str)),
            )
        return replaced

    def __call__(self, tokens: Tensor, keys: Tensor, values: Tensor, options: dict):
        """attn1_patch of the host: tokens [N, L, C] before to_q, to_k and to_v."""
        call: ReferenceCall | None = options.get(self.call_key)
        where = layer_key(options)
        if call is None:
            return tokens, keys, values
        height, width = options["activations_shape"][-2:]
        reference = call.tokens(where, height, width)  # also where nothing is read: what follows may depend on it
        if where[0] not in self.blocks or where in call.skipped or where[:2] in call.skipped:
            return tokens, keys, values
        visibility = call.run.visibility(height, width, keys)
        strength = self.strength if visibility is None else self.strength * visibility

        def append(own: Tensor) -> Tensor:
            own = own.reshape(tokens.shape[0], -1, own.shape[-1])  # HyperTile has cut the queries: so would the host
            rows = chunk_size(own.shape[0], options)
            return append_reference(own, reference, call.positive, rows, len(self.references), strength)

        appended = append(keys)
        return tokens, appended, appended if keys is values else append(values)


def layer_key(options: dict) -> tuple:
    """Which self-attention of the UNet: (input | middle | output, block number, transformer block)."""
    return (*options["block"], options["block_index"])


def append_reference(
    own: Tensor, reference: Tensor, positive: list[bool], rows: int, count: int, strength: float | Tensor
) -> Tensor:
    """Appends `count` references of M tokens each, or as many own tokens where the condition is not positive.

    Args:
        own: [N, L, C], chunk after chunk of `rows` rows; L >= M (more if another patch has appended already), or M is
            a multiple of L (tiles of a view).
        reference: [1, count*M, C].
        strength: 1 the reference as it is, 0 own tokens only, between: tokens blended; one for each token
            [1, count*M, 1], or for all.

    Returns:
        [N, L + count*M, C]
    """
    length = reference.shape[1] // count
    padding = own[:, :length].repeat(1, reference.shape[1] // min(length, own.shape[1]), 1)  # [N, count*M, C]
    chunks = []
    for chunk, is_positive in zip(padding.split(rows), positive, strict=True):
        chunks.append(torch.lerp(chunk, reference.to(own).expand_as(chunk), strength) if is_positive else chunk)
    return torch.cat([own, torch.cat(chunks)], dim=1)


def _check_whole_views(latents: Tensor, x: Tensor) -> None:
    """Raises ValueError if a call sees a part of the views only; the references were encoded at the whole's size."""
    if latents.shape[-2:] != x.shape[-2:]:
        raise ValueError(
            f"The reference has {math.prod(latents.shape[-2:])} tokens where a view has {math.prod(x.shape[-2:])}; "
            "area conditioning and tiled sampling do not go together with reference attention."
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
    references: References,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    blocks: Iterable[str] = BLOCKS,
):
    """A clone of MODEL `model` whose self-attentions read `references` (one person, any number) through F_ref.

    Args:
        blocks: which parts of the UNet read: "input", "middle", "output".

    Raises:
        ValueError: strength outside 0..1, an unknown part, or an encoder of another width than the model.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be between 0 and 1, not {strength}")
    chosen = frozenset(blocks)
    if not chosen <= set(BLOCKS):
        raise ValueError(f"blocks must be among {', '.join(BLOCKS)}, not {', '.join(sorted(chosen - set(BLOCKS)))}")
    check_same_width(model, encoder)
    sigma_range = SigmaRange(start_percent, end_percent)
    patched = model.clone()
    if strength > 0.0 and chosen:
        zero_timestep = encoder.metadata.get("reference_timestep", "current") == "zero"
        key = unused_key(model, KEY)
        patch = ReferencePatch(key, references, strength, sigma_range, chosen, zero_timestep)
        patch.attach(patched, encoder.patcher)
    return patched
