"""Reference attention (paper eq. 4 and 5): every self-attention of F also reads the tokens of the portraits.

F_ref runs once per timestep, on the references alone, however the host batches, splits or windows the views. Where
another patch resizes the features of the views in the middle of the UNet (Deep Shrink), F_ref runs under that patch,
so that its tokens have the size, and are of the kind, that the attentions see there.
Keys and values of its tokens are made once per step, by F's own to_k and to_v, and appended to those of the views of
the positive conditions inside of the attention (`LongerAttention`); the other conditions of a batch keep their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..host.compatibility import check_same_width
from ..host.loading import HostNetwork
from .feature_sizes import resize_features, resizing_patches
from .longer_attention import LongerAttention, Reading, layer_key, longer_attention
from .reference_inputs import References
from .run_state import RunPatch, RunState, SigmaRange, views_per_call

KEY = "diffportrait3d.reference"
BLOCKS = ("input", "middle", "output")  # SD1.5 has 6, 1 and 9 self-attentions there

Bank = dict[tuple, Tensor]  # which self-attention -> its tokens [R, h, w, C]


class Settings(NamedTuple):
    """Of one Apply Reference Attention node; see `apply_reference_attention`."""

    strength: float
    sigma_range: SigmaRange
    blocks: frozenset[str]
    timestep: int | None


class ReferenceRun(RunState):
    """The banks of one run on latents like `noise` [V, 4, h, w], and what F_ref needs to fill them."""

    def __init__(self, guider, key: str, noise: Tensor, references: References, settings: Settings):
        super().__init__(guider, key, len(noise))
        self.settings = settings
        latents = references.encode(*noise.shape[-2:]).float()
        self.latents = guider.model_patcher.model.process_latent_in(latents)  # [R, 4, h, w], scaled
        self.mask = references.mask_at(*noise.shape[-2:])  # [R, 1, h, w] or None
        texts = (cond.get("cross_attn") for cond in guider.conds.get("positive", ()))
        self.context = next((text for text in texts if text is not None), None)  # F_ref reads the references with it
        self.acts = True  # at this step
        self._acts_at = settings.sigma_range.test(guider.model_patcher.get_model_object("model_sampling"))
        self.skipped: frozenset[tuple] = frozenset()  # self-attentions that another patch computes in this call
        self.warned = False
        self._banks: dict[torch.device, Bank] = {}
        self._resizing = False  # whether a patch of this run resizes features
        self._visibility: dict[tuple, Tensor] = {}
        self._patcher, self._hooks = guider.model_patcher, None
        self._projected: dict[tuple, tuple[Tensor, Tensor]] = {}  # keys and values of this step

    def begin_evaluation(self, sigma: Tensor) -> None:
        self._projected.clear()
        if self.settings.timestep is None:
            self._banks.clear()
        self.acts = self._acts_at(sigma)

    def begin_unet_call(self, transformer_options: dict) -> None:
        """Also drops keys and values that were made with other hooks on the weights (LoRA of one condition)."""
        super().begin_unet_call(transformer_options)
        hooks = self._patcher.model.current_patcher.current_hooks
        if hooks is not self._hooks:
            self._hooks = hooks
            self._projected.clear()
        self.skipped = self._replaced(transformer_options)

    def _replaced(self, transformer_options: dict) -> frozenset[tuple]:
        """Self-attentions that another patch computes by itself; longer keys would break it (PAG, SAG)."""
        replaced = frozenset(transformer_options.get("patches_replace", {}).get("attn1", {}))
        runs = [state for state in transformer_options.values() if isinstance(state, ReferenceRun)]
        if replaced and not any(state.warned for state in runs):  # once for all nodes of a run
            self.warned = True
            logging.warning(
                "Reference attention leaves out the self-attentions that another node replaces: %s",
                ", ".join(" ".join(map(str, where)) for where in sorted(replaced, key=str)),
            )
        return replaced

    def bank(
        self, x: Tensor, timesteps: Tensor, context: Tensor, options: dict, features_resized: bool = False
    ) -> Bank:
        """Tokens for every self-attention at this timestep, from the cache if it holds them.

        Args:
            context: text tokens of the views, for a run whose positive condition has none.
            options: transformer options of the call.
            features_resized: read again, from now on under those patches in `options` that resize features.
        """
        if features_resized:
            self._resizing = True
        elif x.device in self._banks:
            return self._banks[x.device]
        fixed, own_options = self.settings.timestep, {"patches": {}, "cond_or_uncond": [0]}
        step = timesteps[:1] if fixed is None else torch.full_like(timesteps[:1], fixed)  # [1]
        if self._resizing:
            own_options["patches"] = resizing_patches(options["patches"])
            own_options |= {name: options[name] for name in ("sigmas", "sample_sigmas") if name in options}
        text = (context if self.context is None else self.context.to(context))[:1]  # [1, L, C]
        self._banks[x.device] = self._read(x, step, text, own_options)
        self._projected.clear()
        return self._banks[x.device]

    def project(self, attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, N, C] that a self-attention of F makes of tokens of the references [1, N, C]."""
        key = (attention, tokens.shape[1], tokens.dtype, tokens.device)
        if key not in self._projected:
            self._projected[key] = attention.to_k(tokens), attention.to_v(tokens)
        return self._projected[key]

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

        options["patches"]["attn1_patch"] = [write]
        latents = self.latents.to(x.device, self.network.compute_dtype)
        text = context.to(latents.dtype).expand(len(latents), -1, -1)
        self.network(latents, step.expand(len(latents)), context=text, transformer_options=options)
        return bank


@dataclass
class ReferenceCall:
    """What the self-attentions of one UNet call append, and for which conditions."""

    run: ReferenceRun
    bank: Bank
    read_again: Callable[[], Bank] | None  # under the patches that resize features; None: the bank is that one

    def tokens(self, where: tuple, height: int, width: int) -> Tensor:
        """Tokens of the references [1, R*height*width, C] at a self-attention that sees views of that size."""
        if self.read_again and self.bank[where].shape[1:3] != (height, width):
            self.bank, self.read_again = self.read_again(), None
        grid = resize_features(self.bank[where].movedim(-1, 1), height, width)  # [R, C, height, width]
        return grid.movedim(1, -1).flatten(0, 2)[None]


class ReferencePatch(RunPatch):
    """One Apply Reference Attention node."""

    label = "Reference attention"

    def __init__(self, key: str, references: References, settings: Settings):
        super().__init__(key)
        self.references, self.settings = references, settings

    def attach(self, model, network_patcher) -> None:
        super().attach(model, network_patcher)
        model.set_model_attn1_patch(self)

    def begin(self, guider, noise: Tensor) -> ReferenceRun:
        return ReferenceRun(guider, self.key, noise, self.references, self.settings)

    def extra_rows(self, run: ReferenceRun, model_options: dict) -> int:
        """F_ref's own batch, and keys and values of each view that are 1 + R times as long."""
        references = self.references.count
        return references + math.ceil(views_per_call(run.views, model_options) * references / 4)

    def begin_call(self, run: ReferenceRun, unet, x, timesteps, context, options: dict) -> ReferenceCall | None:
        """Reads the tokens of this step.

        Raises:
            ValueError: the call sees a part of the views only; the references were encoded at the whole's size.
        """
        if not any(run.positive) or not run.acts:
            return None
        if run.latents.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                f"The reference has {math.prod(run.latents.shape[-2:])} tokens where a view has "
                f"{math.prod(x.shape[-2:])}; area conditioning and tiled sampling do not go together with reference "
                "attention."
            )
        read_bank = partial(run.bank, x, timesteps, context, options)
        return ReferenceCall(run, read_bank(), partial(read_bank, features_resized=True))

    def _wrap_unet(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, *args, **kwargs
    ):
        arguments = x, timesteps, context, y, control, transformer_options, *args
        with longer_attention(transformer_options, executor.class_obj):
            return super()._wrap_unet(executor, *arguments, **kwargs)

    def __call__(self, tokens: Tensor, keys: Tensor, values: Tensor, options: dict):
        """attn1_patch of the host: the attention that follows is to read the references, too."""
        call: ReferenceCall | None = options.get(self.call_key)
        if call is None:
            return tokens, keys, values
        run, where, (height, width) = call.run, layer_key(options), options["activations_shape"][-2:]
        reference = call.tokens(where, height, width)  # also where nothing is read: what follows may depend on it
        if where[0] in run.settings.blocks and where not in run.skipped and where[:2] not in run.skipped:
            attention: LongerAttention = options[LongerAttention.KEY]
            projected = run.project(attention.module(where), reference.to(keys))
            visibility = run.visibility(height, width, keys)
            strength = run.settings.strength * (1.0 if visibility is None else visibility)
            attention.read(Reading(*projected, len(run.latents), strength), run.positive)
        return tokens, keys, values


def apply_reference_attention(
    model,
    encoder: HostNetwork,
    references: References,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    blocks: Iterable[str] = BLOCKS,
    reference_timestep: int | None = None,
):
    """A clone of MODEL `model` whose self-attentions read `references` (one person, any number) through F_ref.

    Args:
        blocks: which parts of the UNet read: "input", "middle", "output".
        reference_timestep: F_ref is read once per run, as of this timestep; None: as it was trained, which is anew at
            every step, or once as of timestep 0.

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
        if reference_timestep is None and encoder.metadata.get("reference_timestep", "current") == "zero":
            reference_timestep = 0
        keys = (f"{KEY}.{number}" for number in count())
        key = next(key for key in keys if key not in model.additional_models)  # several nodes in a row
        settings = Settings(strength, sigma_range, chosen, reference_timestep)
        ReferencePatch(key, references, settings).attach(patched, encoder.patcher)
    return patched
