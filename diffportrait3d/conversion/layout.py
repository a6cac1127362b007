"""What the authors' checkpoint holds: its components, the keys that each must have, and what a file has instead.

Nothing is listed by hand that follows from our networks: the expected keys are the state dicts of the network classes
at the width found in the file, under the authors' prefixes (2937 keys, 2871 M values at SD1.5's width).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..networks import NETWORKS, AutoencoderConfig, NetworkSpec, UNetConfig
from ..networks.registry import VIEW_MODULES
from ..networks.sizes import Shapes, autoencoder_config, unet_sizes
from ..weights import text_encoder
from ..weights.checkpoints import listed
from ..weights.files import CheckpointError
from ..weights.identify import known_format
from ..weights.text_encoder import TextEncoderSizes

SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar",
)  # fmt: skip
NUM_TIMESTEPS = 1000
# Unknown keys that are harmless, and why they are left out.
KNOWN_SURPLUS = {
    "model_ema.": "running averages, which the authors' inference does not use",
    "cond_stage_model.transformer.text_model.embeddings.position_ids": "0, 1, 2, ...: every text encoder makes its own",
}


@dataclass(frozen=True)
class Component:
    """A part of the checkpoint; in a file of its own its keys lose the prefix."""

    title: str
    prefix: str

    def owns(self, key: str) -> bool:
        return key.startswith(self.prefix) if self.prefix else key in SCHEDULE_BUFFERS


@dataclass(frozen=True)
class NetworkComponent(Component):
    spec: NetworkSpec

    def owns(self, key: str) -> bool:
        return self.spec.owns(key)


def _network(kind: str) -> NetworkComponent:
    return NetworkComponent(NETWORKS[kind].title, NETWORKS[kind].prefix, NETWORKS[kind])


REFERENCE, CONTROL, VIEWS = map(_network, ("reference_encoder", "view_controlnet", "view_consistency"))
UNET, VAE = map(_network, ("unet", "autoencoder"))
TEXT = Component("text encoder", text_encoder.PREFIX)
SCHEDULE = Component("schedule buffers", "")

METHOD = (REFERENCE, CONTROL, VIEWS)  # have to be there
BASE = (UNET, VAE, TEXT)  # each may be absent as a whole
COMPONENTS = (*METHOD, *BASE, SCHEDULE)
UNUSED = REFERENCE.prefix + REFERENCE.spec.unused


@dataclass
class ComponentKeys:
    """A component as it was found: the keys that are there, those that are not, and those that do not belong."""

    component: Component
    expected: dict[str, tuple[int, ...]]
    present: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)

    @property
    def unused(self) -> list[str]:
        """Keys that are known to have no influence: they are not written."""
        return [name for name in self.present if name.startswith(UNUSED)]

    @property
    def written(self) -> list[str]:
        return [name for name in self.present if not name.startswith(UNUSED)]


@dataclass
class Inspection:
    """The layout of one checkpoint file."""

    config: UNetConfig
    parts: dict[Component, ComponentKeys]

    def surplus(self) -> list[str]:
        return [name for part in self.parts.values() for name in part.surplus]


def inspect(shapes: Shapes, path: object, drop_surplus: bool = False, contents: str = "") -> Inspection:
    """Compares the keys and shapes of a file with those of the authors' checkpoint.

    Args:
        shapes: key -> shape, wrappers already taken off.
        path: for messages.
        drop_surplus: accept keys that do not belong to the layout (they are reported and left out).
        contents: what the file has, for the message that it is something else.

    Raises:
        CheckpointError: another kind of file, or keys that are missing, unknown or of the wrong shape, by name.
    """
    lacking = [component for component in METHOD if not any(map(component.owns, shapes))]
    if lacking:
        raise CheckpointError(_another_file(shapes, lacking, path, contents))
    config = _unet_config(shapes, path)
    autoencoder = autoencoder_config(_without_prefix(shapes, VAE))
    expected = official_shapes(config, autoencoder, TextEncoderSizes.of(shapes))
    inspection = Inspection(config, _sorted_into(expected, shapes))
    _check(inspection, shapes, path, drop_surplus)
    return inspection


def _another_file(shapes: Shapes, lacking: list[NetworkComponent], path: object, contents: str) -> str:
    needed = "the authors' checkpoint (model_state-540000-001.th) holds the base model and three networks beside it"
    found = known_format(shapes)
    if found and len(lacking) > 1:
        return f"{path} is {found}; {needed}{contents and f' ({contents})'}."
    patterns = {c: f"{c.prefix}*{VIEW_MODULES}*" if c is VIEWS else f"{c.prefix}*" for c in lacking}
    titles = ", ".join(f"{component.title} ({pattern})" for component, pattern in patterns.items())
    return f"{path} has no keys of the {titles}; {needed}. Found: {contents or listed(sorted(shapes), 5)}."


def _without_prefix(shapes: Shapes, component: Component) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(component.prefix): shape for key, shape in shapes.items() if component.owns(key)}


def _unet_config(shapes: Shapes, path: object) -> UNetConfig:
    """Sizes from the tensors that show them; what the networks share is that of the view ControlNet."""
    sizes: dict[str, Any] = {}
    for component in (UNET, VIEWS, REFERENCE, CONTROL):
        sizes |= unet_sizes(_without_prefix(shapes, component))
    try:
        return UNetConfig(**sizes)
    except ValueError as error:
        raise CheckpointError(f"{path} is not of the SD1.5 family: {error}") from error


@lru_cache
def official_shapes(
    config: UNetConfig, autoencoder: AutoencoderConfig, text: TextEncoderSizes
) -> dict[Component, dict[str, tuple[int, ...]]]:
    """Every key of the checkpoint and its shape, per component, for any width. Cached: do not change it."""
    configs = dict.fromkeys((*METHOD, UNET), config) | {VAE: autoencoder}
    bare = {component: component.spec.shapes(sizes) for component, sizes in configs.items()}
    unused = REFERENCE.spec.unused
    bare[REFERENCE] |= {name: shape for name, shape in bare[CONTROL].items() if name.startswith(unused)}
    expected: dict[Component, dict[str, tuple[int, ...]]] = {
        component: {component.prefix + name: shape for name, shape in shapes.items()}
        for component, shapes in bare.items()
    }
    expected[TEXT] = text.shapes()
    expected[SCHEDULE] = dict.fromkeys(SCHEDULE_BUFFERS, (NUM_TIMESTEPS,))
    return {component: expected[component] for component in COMPONENTS}


def _sorted_into(
    expected: Mapping[Component, dict[str, tuple[int, ...]]], shapes: Shapes
) -> dict[Component, ComponentKeys]:
    """Every key of the file ends up in exactly one component; keys of none are surplus of the last."""
    parts = {component: ComponentKeys(component, names) for component, names in expected.items()}
    for key, shape in shapes.items():
        part = parts[next((component for component in COMPONENTS if component.owns(key)), SCHEDULE)]
        (part.present if key in part.expected else part.surplus).append(key)
        if shape != part.expected.get(key, shape):
            part.misshapen.append(key)
    for part in parts.values():
        part.missing = [name for name in part.expected if name not in shapes]
    return parts


def _check(inspection: Inspection, shapes: Shapes, path: object, drop_surplus: bool) -> None:
    problems = []
    for component, part in inspection.parts.items():
        missing = [name for name in part.missing if not name.startswith(UNUSED)]
        if missing and (component in METHOD or (part.present and component is not SCHEDULE)):
            problems.append(f"{len(missing)} keys of the {component.title} are missing: {listed(missing)}")
        if part.misshapen:
            described = [f"{n} {list(shapes[n])} instead of {list(part.expected[n])}" for n in part.misshapen]
            problems.append(f"{len(described)} keys of the {component.title} have another shape: {listed(described)}")
    unknown = [name for name in inspection.surplus() if not is_known_surplus(name)]
    if unknown and not drop_surplus:
        problems.append(
            f"{len(unknown)} keys do not belong to the release: {listed(unknown)} (--drop-surplus leaves them out)"
        )
    if problems:
        raise CheckpointError(f"{path} is not the release's layout: {'; '.join(problems)}.")


def is_known_surplus(name: str) -> bool:
    """Whether a key that does not belong may be left out without asking."""
    return name.startswith(tuple(KNOWN_SURPLUS))
