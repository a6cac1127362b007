"""Reference attention (paper eq. 4 and 5): every self-attention of F also reads the tokens of the portraits.

F_ref runs once per timestep, on the references alone, however the host batches, splits or windows the views. Where
another patch resizes the features of the views in the middle of the UNet (Deep Shrink), F_ref runs under that patch,
so that its tokens have the size, and are of the kind, that the attentions meet there.
Its tokens are appended, before to_k and to_v, to the tokens of the positive conditions. The host hands one
batch to all conditions, so the others are padded with copies of their own first tokens: a softmax over every
token repeated equally often is the softmax over the tokens once.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..host.loading import HostNetwork, check_same_width
from .feature_sizes import resize_features, resizing_patches
from .reference_inputs import References
from .run_state import RunPatch, RunState, SigmaRange, chunk_size, unused_key, views_per_call

KEY = "diffportrait3d.reference"
BLOCKS = ("input", "middle", "output")  # SD1.5 has 6, 1 and 9 self-attentions there

Bank = dict[tuple, Tensor]  # which self-attention -> its tokens [R, h, w, C]


class KeptBanks:
    """The last banks of every encoder, in main memory, for as long as the encoder lives.

    Known by everything a bank at timestep 0 depends on: weights, latents, text tokens and dtype.
    """

    def __init__(self, count: int = 2):
        self.count = count
        self._banks: WeakKeyDictionary[nn.Module, OrderedDict[tuple, Bank]] = WeakKeyDictionary()

    def get(self, network: nn.Module, key: tuple, device: torch.device) -> Bank | None:
        bank = self._banks.get(network, {}).get(key)
        return None if bank is None else {where: tokens.to(device) for where, tokens in bank.items()}

    def put(self, network: nn.Module, key: tuple, bank: Bank) -> None:
        kept = self._banks.setdefault(network, OrderedDict())
        kept[key] = {where: tokens.cpu() for where, tokens in bank.items()}
        while len(kept) > self.count:
            kept.popitem(last=False)


KEPT = KeptBanks()


def _digest(tensor: Tensor) -> tuple:
    data = tensor.detach().float().cpu().contiguous().numpy().tobytes()
    return tuple(tensor.shape), hashlib.sha256(data).hexdigest()


class ReferenceRun(RunState):
    """The banks of one run, and what F_ref needs to fill them."""

    def __init__(self, guider, key: str, views: int, latents: Tensor, zero_timestep: bool, reuse: bool):
        super().__init__(guider, key, views)
        self.latents = guider.model_patcher.model.process_latent_in(latents.float())  # [R, 4, h, w], scaled
        self.context = _first_context(guider)
        self.zero_timestep, self.reuse = zero_timestep, reuse and zero_timestep
        self.weights = guider.model_patcher.get_additional_models_with_key(key)[0].patches_uuid
        self.sigma_limits: tuple[float, float] = (math.inf, 0.0)
        self.mask: Tensor | None = None  # [R, 1, h, w]
        self.warned = False
        self._banks: dict[torch.device, tuple[float, Bank]] = {}
        self._resizing = False  # whether a patch of this run resizes features
        self._readable: dict[tuple, Tensor] = {}

    def bank(self, x: Tensor, timesteps: Tensor, context: Tensor, options: dict) -> Bank:
        """Tokens for every self-attention at this timestep, from the cache if it holds them."""
        step = self._step(timesteps)  # [1]
        known = self._banks.get(x.device)
        if known is not None and known[0] == float(step):
            return known[1]
        if self._resizing:
            return self.resized_bank(x, timesteps, context, options)
        return self._remember(x.device, step, self._kept_or_read(x, step, self._tokens(context)))

    def resized_bank(self, x: Tensor, timesteps: Tensor, context: Tensor, options: dict) -> Bank:
        """The same, read anew under those patches in a call's `options` that resize features."""
        self._resizing = True
        step = self._step(timesteps)
        return self._remember(x.device, step, self._read(x, step, self._tokens(context), _resizing_options(options)))

    def _step(self, timesteps: Tensor) -> Tensor:
        return timesteps[:1] * 0 if self.zero_timestep else timesteps[:1]

    def _tokens(self, context: Tensor) -> Tensor:
        """Text tokens [1, L, C]; `context` is that of the views."""
        return (context if self.context is None else self.context.to(context))[:1]

    def _remember(self, device: torch.device, step: Tensor, bank: Bank) -> Bank:
        self._banks[device] = (float(step), bank)
        return bank

    def readable(self, height: int, width: int, like: Tensor) -> Tensor | None:
        """How much of each token may be read [1, R*height*width, 1]; None: all of all."""
        if self.mask is None:
            return None
        key = (height, width, like.device, like.dtype)
        if key not in self._readable:
            tokens = interpolate(self.mask, (height, width), mode="area")  # [R, 1, height, width]
            self._readable[key] = tokens.reshape(1, -1, 1).to(like)
        return self._readable[key]

    def _kept_or_read(self, x: Tensor, step: Tensor, context: Tensor) -> Bank:
        if not self.reuse:
            return self._read(x, step, context)
        key = (self.weights, x.dtype, _digest(self.latents), _digest(context))
        bank = KEPT.get(self.network, key, x.device)
        if bank is None:
            bank = self._read(x, step, context)
            KEPT.put(self.network, key, bank)
        return bank

    def _read(self, x: Tensor, step: Tensor, context: Tensor, options: dict | None = None) -> Bank:
        bank: Bank = {}
        options = options or {"patches": {}, "cond_or_uncond": [0]}

        def write(tokens, keys, values, options):
            bank[place(options)] = tokens.unflatten(1, options["activations_shape"][-2:])
            return tokens, keys, values

        count = self.latents.shape[0]
        options["patches"]["attn1_patch"] = [write]
        self.network(
            self.latents.to(x),
            step.expand(count),
            context=context.expand(count, -1, -1),
            transformer_options=options,
        )
        return bank


def _resizing_options(options: dict) -> dict:
    """Options for F_ref under the block patches of a call's `options`, as far as these resize features."""
    ranges = {name: options[name] for name in ("sigmas", "sample_sigmas") if name in options}
    return {**ranges, "patches": resizing_patches(options["patches"]), "cond_or_uncond": [0]}


class StepReading:
    """What the self-attentions of one UNet call append, and for which conditions.

    Args:
        read_again: gives the bank under the patches that resize features in this call.
    """

    def __init__(
        self, run: ReferenceRun, bank: Bank, positive: list[bool], skipped: set[tuple], read_again: Callable[[], Bank]
    ):
        self.run, self.bank, self.positive, self.skipped = run, bank, positive, skipped
        self._read_again: Callable[[], Bank] | None = read_again

    def tokens(self, where: tuple, height: int, width: int) -> Tensor:
        """Tokens of the references [1, R*height*width, C] at a self-attention that sees views of that size."""
        if self.bank[where].shape[1:3] != (height, width) and self._read_again is not None:
            self.bank, self._read_again = self._read_again(), None
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
        reuse: bool,
    ):
        super().__init__(key)
        self.references, self.strength = references, strength
        self.sigma_range, self.blocks = sigma_range, blocks
        self.zero_timestep, self.reuse = zero_timestep, reuse

    def attach(self, model, network_patcher) -> None:
        super().attach(model, network_patcher)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, self.key, self._prepare_sampling)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, self.key, self._around_unet)
        model.set_model_attn1_patch(self)

    def begin(self, guider, noise: Tensor) -> ReferenceRun:
        latents = self.references.encode(noise.shape[-2], noise.shape[-1])
        run = ReferenceRun(guider, self.key, noise.shape[0], latents, self.zero_timestep, self.reuse)
        run.mask = self.references.mask_at(noise.shape[-2], noise.shape[-1])
        self._read_after_tiling(guider.model_options["transformer_options"]["patches"]["attn1_patch"])
        run.sigma_limits = self.sigma_range.limits(guider.model_patcher.get_model_object("model_sampling"))
        return run

    def _read_after_tiling(self, patches: list) -> None:
        """Puts this patch behind HyperTile's in a run's list: what is appended must not be cut into tiles."""
        tiling = [n for n, patch in enumerate(patches) if getattr(patch, "__qualname__", "").startswith("HyperTile.")]
        if tiling and patches.index(self) < tiling[-1]:
            patches.remove(self)
            patches.insert(tiling[-1], self)

    def _prepare_sampling(self, executor, model, noise_shape, *args, **kwargs):
        """Budgets memory: F_ref's own batch, and keys and values of each view that are 1 + R times as long."""
        options = kwargs["model_options"]
        views = views_per_call(self.state(options["transformer_options"]).views, options)
        references, shape = len(self.references), list(noise_shape)
        shape[0] += references + math.ceil(views * references / 4)
        return executor(model, shape, *args, **kwargs)

    def _around_unet(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, *args, **kwargs
    ):
        """Puts the tokens of this step into the call's options, where the attentions find them."""
        run = self.state(transformer_options)
        positive = run.positive_chunks(transformer_options)
        if any(positive) and self._acts_at(run, transformer_options):
            _check_whole_views(run.latents, x)
            call = (x, timesteps, context, transformer_options)
            replaced = self._replaced(run, transformer_options)
            transformer_options[self._reading] = StepReading(
                run, run.bank(*call), positive, replaced, lambda: run.resized_bank(*call)
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
        reading: StepReading | None = options.get(self._reading)
        where = place(options)
        if reading is None:
            return tokens, keys, values
        height, width = options["activations_shape"][-2:]
        reference = reading.tokens(where, height, width)  # also where nothing is read: what follows may depend on it
        if where[0] not in self.blocks or where in reading.skipped or where[:2] in reading.skipped:
            return tokens, keys, values
        readable = reading.run.readable(height, width, keys)
        strength = self.strength if readable is None else self.strength * readable

        def append(own: Tensor) -> Tensor:
            own = own.reshape(tokens.shape[0], -1, own.shape[-1])  # HyperTile has cut the queries: so would the host
            rows = chunk_size(own.shape[0], options)
            return append_reference(own, reference, reading.positive, rows, len(self.references), strength)

        appended = append(keys)
        return tokens, appended, appended if keys is values else append(values)


def place(options: dict) -> tuple:
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
    reuse: bool = False,
):
    """A clone of MODEL `model` whose self-attentions read `references` (one person, any number) through F_ref.

    Args:
        blocks: which parts of the UNet read: "input", "middle", "output".
        reuse: keep the tokens from run to run; of use with encoders trained at timestep 0 only, whose tokens are the
            same at every step.

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
        patch = ReferencePatch(key, references, strength, sigma_range, chosen, zero_timestep, reuse)
        patch.attach(patched, encoder.patcher)
    return patched
