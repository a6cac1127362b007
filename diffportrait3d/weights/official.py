"""The authors' release: what its networks do that their tensors do not show, and how they are told by their keys.

The converter writes these facts into every file. `recognise` finds them for a network that somebody has cut out of the
checkpoint with another tool, so that it runs as it was trained or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..networks import ReferenceEncoder, UNetConfig, ViewConsistency, ViewControlNet

Shapes = Mapping[str, tuple[int, ...]]

SIZES = UNetConfig()
# Under these the release's checkpoint keeps the networks of the method.
PREFIXES = {
    "reference_encoder": "control_model.",
    "view_controlnet": "pose_control_model.",
    "view_consistency": "model.diffusion_model.",
}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "reference_encoder": {"reference_timestep": "current"},
    "view_controlnet": {"hint_range": [-1, 1]},
    "view_consistency": {"middle_view_attention": "unconditional", "trained_views": 8},
}
VIEW_MODULES = "motion_module."  # in every key of the view consistency, and in no other
DEAD_KEYS = "input_hint_block."  # the authors' class of F_ref builds these layers and never calls them

_CLASSES: dict[str, type[nn.Module]] = {
    "reference_encoder": ReferenceEncoder,
    "view_controlnet": ViewControlNet,
    "view_consistency": ViewConsistency,
}
# A key that gives a network away, without its prefix, and keys that it cannot have: those of other UNets.
_SIGNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "reference_encoder": ("output_blocks.0.0.in_layers.0.weight", ("out.2.weight", "label_emb.0.0.weight")),
    "view_controlnet": ("zero_convs.0.0.weight", ()),
    "view_consistency": ("input_blocks_motion_module.0.0.temporal_transformer.norm.weight", ()),
}
_TABLE = "input_blocks_motion_module.0.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"


@dataclass(frozen=True)
class Recognised:
    """A network of the release in a file that does not say so.

    kind: as in `checkpoints.NETWORK_KINDS`. config: its sizes.
    keys: name of each tensor in the network -> its name in the file.
    """

    kind: str
    config: UNetConfig
    keys: dict[str, str]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the converter would have written."""
        return {"network": self.kind, "config": self.config.to_dict(), **CONVENTIONS[self.kind]}


def recognise(shapes: Shapes) -> Recognised | None:
    """One network of the release by keys and shapes; None if it is none of them.

    A ControlNet is recognised by the release's prefix alone: without it, it looks like any other of SD1.5.

    Raises:
        ValueError: several networks in one file, keys missing, unknown or of another shape, or another width than
            SD1.5's, where nothing tells the number of attention heads. The message goes after the file's name.
    """
    found = _candidates(shapes)
    if not found:
        return None
    if len(found) > 1:
        kinds = " and ".join(_spoken(kind) for kind, _ in found)
        raise ValueError(f"holds {kinds} in one; split it with `python -m diffportrait3d.convert`")
    kind, prefix = found[0]
    stored = {name.removeprefix(prefix): name for name in shapes if _belongs(kind, name, prefix)}
    present = {name: shapes[key] for name, key in stored.items()}
    _check_width(kind, present)
    config = replace(SIZES, max_views=present[_TABLE][1]) if _TABLE in present else SIZES
    expected = _expected(kind, config)
    _compare(kind, expected, present)
    return Recognised(kind, config, {name: stored[name] for name in expected})


def kind_by_keys(names: Collection[str]) -> str | None:
    """The same by a look at a few keys: quick, for lists of files; what a file lacks is found when it is read."""
    found = _candidates(names)
    return found[0][0] if len(found) == 1 else None


def _candidates(names: Collection[str]) -> list[tuple[str, str]]:
    """(kind, prefix) of every network whose signs are among `names`."""
    bare = [(kind, "") for kind in PREFIXES if kind != "view_controlnet"]
    return [(kind, prefix) for kind, prefix in (*PREFIXES.items(), *bare) if _has_signs(kind, prefix, names)]


def _has_signs(kind: str, prefix: str, names: Collection[str]) -> bool:
    own, foreign = _SIGNS[kind]
    return prefix + own in names and not any(prefix + key in names for key in foreign)


def _belongs(kind: str, name: str, prefix: str) -> bool:
    if kind == "view_consistency":
        return name.startswith(prefix) and VIEW_MODULES in name
    return name.startswith(prefix) and not (kind == "reference_encoder" and name.startswith(prefix + DEAD_KEYS))


def _check_width(kind: str, present: Shapes) -> None:
    first = _SIGNS[kind][0] if kind == "view_consistency" else "input_blocks.0.0.weight"
    width = present.get(first, (SIZES.model_channels,))[0]
    if width != SIZES.model_channels:
        raise ValueError(
            f"has the keys of a {_spoken(kind)} that is {width} channels wide, but no metadata: the number of its "
            f"attention heads is known for the release's {SIZES.model_channels} channels only"
        )


def _expected(kind: str, config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in _CLASSES[kind](config).state_dict().items()}


def _compare(kind: str, expected: Shapes, present: Shapes) -> None:
    problems = {
        "are missing": [name for name in expected if name not in present],
        "are unknown": [name for name in present if name not in expected],
        "have another shape": [n for n in expected if n in present and present[n] != expected[n]],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"has keys of the release's {_spoken(kind)}, but {len(names)} {problem}, {names[0]} first; cut it out "
                "of the checkpoint with `python -m diffportrait3d.convert`"
            )


def _spoken(kind: str) -> str:
    return kind.replace("_", " ").replace("controlnet", "ControlNet")
