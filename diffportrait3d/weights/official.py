"""The authors' release: what its networks do that their tensors do not show, and how they are told by their keys.

The converter writes these facts into every file. `recognise` finds them for a network that somebody has cut out of the
checkpoint with another tool, so that it runs as it was trained or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..networks import NETWORKS, UNetConfig, title_of

Shapes = Mapping[str, tuple[int, ...]]

SIZES = UNetConfig()
OFFICIAL = {kind: spec for kind, spec in NETWORKS.items() if spec.official}
_TABLE = "input_blocks_motion_module.0.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"


@dataclass(frozen=True)
class Recognised:
    """A network of the release in a file that does not say so.

    kind: as in `networks.NETWORKS`. config: its sizes.
    keys: name of each tensor in the network -> its name in the file.
    """

    kind: str
    config: UNetConfig
    keys: dict[str, str]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the converter would have written."""
        return {"network": self.kind, "config": self.config.to_dict(), **OFFICIAL[self.kind].conventions}


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
        kinds = " and ".join(title_of(kind) for kind, _ in found)
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
    """(kind, prefix) of every network whose signature is among `names`; what files of others have needs the prefix."""
    places = [(kind, spec.prefix) for kind, spec in OFFICIAL.items()]
    places += [(kind, "") for kind, spec in OFFICIAL.items() if spec.sd15_prefix is None]
    return [(kind, prefix) for kind, prefix in places if OFFICIAL[kind].is_signed(names, prefix)]


def _belongs(kind: str, name: str, prefix: str) -> bool:
    unused = OFFICIAL[kind].unused
    return OFFICIAL[kind].owns(name, prefix) and not (unused and name.startswith(prefix + unused))


def _check_width(kind: str, present: Shapes) -> None:
    first = OFFICIAL[kind].signature if kind == "view_consistency" else "input_blocks.0.0.weight"
    width = present.get(first, (SIZES.model_channels,))[0]
    if width != SIZES.model_channels:
        raise ValueError(
            f"has the keys of a {title_of(kind)} that is {width} channels wide, but no metadata: the number of its "
            f"attention heads is known for the release's {SIZES.model_channels} channels only"
        )


def _expected(kind: str, config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in OFFICIAL[kind].module(config).state_dict().items()}


def _compare(kind: str, expected: Shapes, present: Shapes) -> None:
    problems = {
        "are missing": [name for name in expected if name not in present],
        "are unknown": [name for name in present if name not in expected],
        "have another shape": [n for n in expected if n in present and present[n] != expected[n]],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"has keys of the release's {title_of(kind)}, but {len(names)} {problem}, {names[0]} first; cut it out "
                "of the checkpoint with `python -m diffportrait3d.convert`"
            )
