"""The networks' own keys in a file that training code has wrapped: nested mappings, prefixes, wrapper modules.

Nothing depends on a wrapper's name. Of the mappings in a file, and of the prefixes in each, those are taken that make
the most keys begin as those of known networks do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..networks import NETWORKS

# Modules that trainers put around others and that leave their names in the keys: DataParallel, torch.compile, FSDP,
# activation checkpointing, Lightning Fabric.
WRAPPER_MODULES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# How the keys of known networks begin: in the release, in SD1.5's checkpoints, and of each network alone.
KNOWN = (
    *(spec.prefix for spec in NETWORKS.values() if spec.prefix), "cond_stage_model.", "model_ema.", "alphas_cumprod",
    "betas", "input_blocks", "middle_block", "output_blocks", "time_embed.", "out.", "zero_convs.",
    "input_hint_block.", "down_blocks.", "mid_block.", "up_blocks.", "encoder.", "decoder.", "quant_conv.",
    "post_quant_conv.",
)  # fmt: skip
AVERAGES = {"ema", "average", "averaged"}  # in the path of a mapping
DEPTH = 3  # parts of the longest prefix that is looked for


class Unwrapped(NamedTuple):
    """One mapping of a file."""

    mapping: str  # its path, each part ending in a dot
    keys: dict[str, str]  # own name -> name in the file
    note: str | None  # what was done to the keys


def unwrap(names: Sequence[str], mappings: Sequence[str]) -> Unwrapped:
    """Choose among the mappings of a file.

    Args:
        names: of all its tensors, the keys of nested mappings joined by dots.
        mappings: paths of the mappings that hold tensors, the outermost ("") first; each part ends in a dot.
    """
    return max((_unwrapped(names, mapping) for mapping in mappings), key=_rank)


def _unwrapped(names: Sequence[str], mapping: str) -> Unwrapped:
    stored = [name for name in names if name.startswith(mapping)]
    found = [name[len(mapping) :] for name in stored]
    own = _own_names(found)
    return Unwrapped(mapping, dict(zip(own, stored, strict=True)), _note(found, own))


def _rank(found: Unwrapped) -> tuple:
    """Averages are second to the weights themselves; of equal mappings the innermost is the network's."""
    fitting = _fitting(list(found.keys))
    average = not AVERAGES.isdisjoint(re.split(r"[._]", found.mapping.lower()))
    return fitting, not average, 0 if fitting else len(found.keys), found.mapping.count(".")


def _own_names(found: list[str]) -> list[str]:
    """The keys without wrapper modules and without the prefix that hides what they are."""
    bare = [".".join(part for part in name.split(".") if part not in WRAPPER_MODULES) for name in found]
    bare = bare if len(set(bare)) == len(found) else found
    stripped = [[name.removeprefix(prefix) for name in bare] for prefix in _prefixes(bare)]
    candidates = [bare, *(names for names in stripped if len(set(names)) == len(names))]
    return max(candidates, key=_fitting)  # of equals the first: as little as possible is taken off


def _prefixes(names: list[str]) -> list[str]:
    """Prefixes that at least half of the keys share, short ones first."""
    counts = Counter(
        ".".join(parts[:depth]) + "."
        for parts in (name.split(".") for name in names)
        for depth in range(1, min(DEPTH, len(parts) - 1) + 1)
    )
    return sorted((prefix for prefix, count in counts.items() if 2 * count >= len(names)), key=len)


def _fitting(names: list[str]) -> int:
    return sum(name.startswith(KNOWN) for name in names)


def _note(found: list[str], own: list[str]) -> str | None:
    changed = [(before, after) for before, after in zip(found, own, strict=True) if before != after]
    if not changed:
        return None
    before, after = changed[0]
    prefix = before.removesuffix(after)
    if len(changed) == len(found) and all(name == prefix + short for name, short in changed):
        return f"every key begins with '{prefix}', which is taken off"
    return f"{len(changed)} keys carry names of wrappers, which are taken out: {before} is {after}"
