"""What the authors' checkpoint holds: its groups, the keys each must have, and what a file has instead.

Nothing is listed by hand that follows from our networks: the expected keys are the state dicts of the network classes
at the width found in the file, under the prefixes of the release (2937 keys, 2871 M values at SD1.5's width).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from ..networks import NETWORKS, AutoencoderConfig, UNetConfig
from ..networks.registry import VIEW_MODULES
from ..networks.view_controlnet import build_hint_block
from ..weights.files import CheckpointError
from ..weights.known_formats import describe_stranger

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar",
)  # fmt: skip
NUM_TIMESTEPS = 1000
SD15_AUTOENCODER = AutoencoderConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, patch_size=1)
# Surplus that is known to be harmless, and why it is left out.
KNOWN_SURPLUS = {
    "model_ema.": "running averages, which the authors' inference does not use",
    "cond_stage_model.transformer.text_model.embeddings.position_ids": "0, 1, 2, ...: every text encoder makes its own",
}


@dataclass(frozen=True)
class Group:
    """One network of the checkpoint; in a file of its own its keys lose the prefix.

    kind: in `NETWORKS`; None for what is no network of this pack.
    required: the method's own networks have to be there; the rest may be absent as a whole.
    """

    title: str
    prefix: str
    kind: str | None = None
    required: bool = True

    @property
    def file_name(self) -> str:
        return f"{self.kind}.safetensors"


@dataclass(frozen=True)
class TextEncoderSizes:
    """Sizes of CLIP's text transformer; SD1.5's by default."""

    vocabulary: int = 49408
    width: int = 768
    positions: int = 77
    hidden: int = 3072
    layers: int = 12


def _network_group(kind: str) -> Group:
    spec = NETWORKS[kind]
    return Group(spec.title, spec.prefix, kind, spec.official)


UNET, VAE = _network_group("unet"), _network_group("autoencoder")
REFERENCE, CONTROL = _network_group("reference_encoder"), _network_group("view_controlnet")
VIEWS = _network_group("view_consistency")
TEXT = Group("text encoder", "cond_stage_model.transformer.text_model.", required=False)
SCHEDULE = Group("schedule buffers", "", required=False)

METHOD_GROUPS = (REFERENCE, CONTROL, VIEWS)
BASE_GROUPS = (UNET, VAE, TEXT)
GROUPS = (*METHOD_GROUPS, *BASE_GROUPS, SCHEDULE)


@dataclass
class Part:
    """A group as it was found: the keys that are there, those that are not, and those that do not belong."""

    group: Group
    expected: dict[str, Shape]
    present: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)  # present, known to have no influence: not written

    @property
    def absent(self) -> bool:
        return not self.present

    @property
    def written(self) -> list[str]:
        dead = set(self.dead)
        return [name for name in self.present if name not in dead]


@dataclass
class Inspection:
    """The layout of one checkpoint file."""

    config: UNetConfig
    parts: dict[Group, Part]

    @property
    def expected_count(self) -> int:
        return sum(len(part.expected) for part in self.parts.values())

    @property
    def present_count(self) -> int:
        return sum(len(part.present) for part in self.parts.values())

    def surplus(self) -> list[str]:
        return [name for part in self.parts.values() for name in part.surplus]


def inspect(shapes: Shapes, path: object, drop_surplus: bool = False, contents: str = "") -> Inspection:
    """Compares the keys and shapes of a file with the release's.

    Args:
        shapes: key -> shape, wrappers already taken off.
        path: for messages.
        drop_surplus: accept keys that do not belong to the layout (they are reported and left out).
        contents: what the file has, for the message that it is something else.

    Raises:
        CheckpointError: another kind of file, or keys that are missing, unknown or of the wrong shape, by name.
    """
    found = {group: _belongs(shapes, group) for group in METHOD_GROUPS}
    if any(not names for names in found.values()):
        _raise_not_the_release(shapes, found, path, contents)
    config = _unet_config(shapes, path)
    expected = release_shapes(config, _autoencoder_config(shapes), _text_encoder_sizes(shapes))
    parts = _parts(shapes, expected)
    _check(parts, shapes, path, drop_surplus)
    return Inspection(config, parts)


def _raise_not_the_release(shapes: Shapes, found: Mapping[Group, list[str]], path: object, contents: str) -> None:
    needed = "the authors' checkpoint (model_state-540000-001.th) holds the base model and three networks beside it"
    stranger = describe_stranger(shapes)
    if stranger and sum(bool(names) for names in found.values()) < 2:
        raise CheckpointError(f"{path} is {stranger}; {needed}{contents and f' ({contents})'}.")
    lacking = ", ".join(f"{g.title} ({_key_pattern(g)})" for g, names in found.items() if not names)
    raise CheckpointError(
        f"{path} has no keys of the {lacking}; {needed}. Found: {contents or _sample(sorted(shapes), 5)}."
    )


def _key_pattern(group: Group) -> str:
    return f"{group.prefix}*{VIEW_MODULES}*" if group is VIEWS else f"{group.prefix}*"


def _belongs(names: Iterable[str], group: Group) -> list[str]:
    """The keys of a group by their prefix. A group without a prefix takes none."""
    if group.kind:
        return [n for n in names if NETWORKS[group.kind].owns(n)]
    return [n for n in names if group.prefix and n.startswith(group.prefix)]


def _unet_config(shapes: Shapes, path: object) -> UNetConfig:
    """Widths from the tensors that show them. The number of heads leaves no trace in shapes: the release has 8."""
    views = VIEWS.prefix + "input_blocks_motion_module.0.0.temporal_transformer.transformer_blocks.0"
    first = _dimensions(shapes, REFERENCE.prefix + "input_blocks.0.0.weight", 4, path)
    text = _dimensions(shapes, REFERENCE.prefix + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 2, path)
    hint = _dimensions(shapes, CONTROL.prefix + "input_hint_block.0.weight", 4, path)
    table = _dimensions(shapes, views + ".attention_blocks.0.pos_encoder.pe", 3, path)
    out_channels = shapes.get(UNET.prefix + "out.2.weight", (UNetConfig.out_channels,))[0]
    try:
        return UNetConfig(
            model_channels=first[0],
            in_channels=first[1],
            context_dim=text[1],
            out_channels=out_channels,
            hint_channels=hint[1],
            max_views=table[1],
        )
    except ValueError as error:
        raise CheckpointError(f"{path} is not of the SD1.5 family: {error}") from error


def _dimensions(shapes: Shapes, key: str, count: int, path: object) -> Shape:
    if key not in shapes:
        raise CheckpointError(f"{path} lacks {key}, from which the networks' width is read: the file is incomplete.")
    if len(shapes[key]) != count:
        raise CheckpointError(f"{path}: {key} has shape {list(shapes[key])}; the release has {count} dimensions there.")
    return shapes[key]


@lru_cache
def release_shapes(
    config: UNetConfig, autoencoder: AutoencoderConfig, text: TextEncoderSizes
) -> dict[Group, dict[str, Shape]]:
    """Every key of the release and its shape, per group, for networks of any width. Cached: do not change it."""
    with torch.device("meta"):
        configs = dict.fromkeys((*METHOD_GROUPS, UNET), config) | {VAE: autoencoder}
        networks = {group: NETWORKS[group.kind].module(sizes) for group, sizes in configs.items()}
        expected = {group: _named_shapes(group.prefix, module) for group, module in networks.items()}
        expected[REFERENCE] |= _named_shapes(_dead_prefix(), build_hint_block(config))
    expected[TEXT] = _text_encoder_shapes(text)
    expected[SCHEDULE] = {name: (NUM_TIMESTEPS,) for name in SCHEDULE_BUFFERS}
    return {group: expected[group] for group in GROUPS}


def _dead_prefix() -> str:
    return REFERENCE.prefix + NETWORKS["reference_encoder"].unused


def _named_shapes(prefix: str, module: torch.nn.Module) -> dict[str, Shape]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _autoencoder_config(shapes: Shapes) -> AutoencoderConfig:
    """The autoencoder's sizes from the file; SD1.5's where it has none."""
    stem = VAE.prefix + "encoder."
    ch = shapes.get(stem + "conv_in.weight", (128,))[0]
    mults: list[int] = []
    while (key := f"{stem}down.{len(mults)}.block.0.conv1.weight") in shapes:
        mults.append(shapes[key][0] // ch)
    blocks = 0
    while f"{stem}down.0.block.{blocks}.conv1.weight" in shapes:
        blocks += 1
    if ch % 32 or not mults:
        return SD15_AUTOENCODER
    return AutoencoderConfig(ch=ch, ch_mult=tuple(mults), num_res_blocks=blocks, patch_size=1)


def _text_encoder_sizes(shapes: Shapes) -> TextEncoderSizes:
    """The text encoder's sizes from the file; SD1.5's where it has none."""
    sizes = TextEncoderSizes()
    token_embedding = shapes.get(TEXT.prefix + "embeddings.token_embedding.weight")
    if token_embedding is None or len(token_embedding) != 2:
        return sizes
    vocabulary, width = token_embedding
    positions = shapes.get(TEXT.prefix + "embeddings.position_embedding.weight", (sizes.positions,))[0]
    hidden = shapes.get(TEXT.prefix + "encoder.layers.0.mlp.fc1.weight", (4 * width,))[0]
    layers = 0
    while f"{TEXT.prefix}encoder.layers.{layers}.layer_norm1.weight" in shapes:
        layers += 1
    return TextEncoderSizes(vocabulary, width, positions, hidden, layers or sizes.layers)


def _text_encoder_shapes(sizes: TextEncoderSizes) -> dict[str, Shape]:
    width, hidden = sizes.width, sizes.hidden
    expected: dict[str, Shape] = {
        TEXT.prefix + "embeddings.token_embedding.weight": (sizes.vocabulary, width),
        TEXT.prefix + "embeddings.position_embedding.weight": (sizes.positions, width),
    }
    for layer in range(sizes.layers):
        stem = f"{TEXT.prefix}encoder.layers.{layer}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            expected |= _weight_and_bias(f"{stem}self_attn.{name}", width, width)
        expected |= _weight_and_bias(f"{stem}mlp.fc1", hidden, width)
        expected |= _weight_and_bias(f"{stem}mlp.fc2", width, hidden)
        expected |= _weight_and_bias(f"{stem}layer_norm1", width) | _weight_and_bias(f"{stem}layer_norm2", width)
    return expected | _weight_and_bias(TEXT.prefix + "final_layer_norm", width)


def _weight_and_bias(stem: str, out_features: int, *in_features: int) -> dict[str, Shape]:
    return {f"{stem}.weight": (out_features, *in_features), f"{stem}.bias": (out_features,)}


def _parts(shapes: Shapes, expected: Mapping[Group, dict[str, Shape]]) -> dict[Group, Part]:
    """Every key of the file lands in exactly one part; keys of no group are surplus of the last."""
    parts = {}
    unclaimed = dict(shapes)
    for group, names in expected.items():
        part = parts[group] = Part(group, names)
        own = names if group is SCHEDULE else _belongs(unclaimed, group)
        for name in own:
            shape = unclaimed.pop(name, None)
            if shape is None:
                continue
            (part.present if name in names else part.surplus).append(name)
            if name in names and shape != names[name]:
                part.misshapen.append(name)
        part.missing = [name for name in names if name not in shapes]
        part.dead = [name for name in part.present if group is REFERENCE and name.startswith(_dead_prefix())]
    parts[SCHEDULE].surplus += unclaimed
    return parts


def _check(parts: Mapping[Group, Part], shapes: Shapes, path: object, drop_surplus: bool) -> None:
    problems = []
    for part in parts.values():
        missing = [n for n in part.missing if not n.startswith(_dead_prefix())]
        if missing and (part.group.required or (part.present and part.group is not SCHEDULE)):
            problems.append(f"{len(missing)} keys of the {part.group.title} are missing: {_sample(missing)}")
        if part.misshapen:
            described = [f"{n} {list(shapes[n])} instead of {list(part.expected[n])}" for n in part.misshapen]
            problems.append(f"{len(described)} keys of the {part.group.title} have another shape: {_sample(described)}")
    surplus = [n for part in parts.values() for n in part.surplus if surplus_reason(n) is None]
    if surplus and not drop_surplus:
        problems.append(
            f"{len(surplus)} keys do not belong to the release: {_sample(surplus)} (--drop-surplus leaves them out)"
        )
    if problems:
        raise CheckpointError(f"{path} is not the release's layout: {'; '.join(problems)}.")


def surplus_reason(name: str) -> str | None:
    """Why a surplus key may be left out without asking; None if it is unknown."""
    return next((reason for start, reason in KNOWN_SURPLUS.items() if name.startswith(start)), None)


def _sample(names: Iterable[str], count: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
