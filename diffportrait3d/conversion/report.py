"""What the converter prints: a table of the components, and the findings in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .layout import (
    BASE,
    CONTROL,
    KNOWN_SURPLUS,
    METHOD,
    REFERENCE,
    SCHEDULE,
    Component,
    ComponentKeys,
    is_known_surplus,
)
from .split import BASE_FILE, Comparison, Conversion

COLUMNS = ("network", "tensors", "values (M)", "missing", "surplus", "dtype", "result")
NUMBERS = COLUMNS[1:5]


def table(conversion: Conversion) -> str:
    """One line per component and the total, as aligned text."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    parts = conversion.inspection.parts
    for component, part in parts.items():
        values = f"{_millions(conversion, part.present):.3f}"
        counts = (str(len(part.present)), values, str(len(part.missing)), str(len(part.surplus)))
        rows.append((component.title, *counts, _dtypes(conversion, part), _result(conversion, part)))
    present = [name for part in parts.values() for name in part.present]
    rows.append(("in all", str(len(present)), f"{_millions(conversion, present):.3f}", "", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if column in NUMBERS else cell.ljust(width)
        for column, cell, width in zip(COLUMNS, row, widths, strict=True)
    ]
    return "  ".join(cells).rstrip()


def findings(conversion: Conversion) -> list[str]:
    """Everything beyond the table, one sentence each."""
    lines = [*conversion.checkpoint.notes, *_key_differences(conversion), _accounting(conversion)]
    unused = conversion.inspection.parts[REFERENCE].unused
    if unused:
        lines.append(
            f"{REFERENCE.title}: {len(unused)} tensors of input_hint_block ({_millions(conversion, unused):.3f} M "
            "values) have no influence in the authors' code and are left out"
        )
    zero = "all zero: it is the identity" if conversion.middle_is_zero else "trained (not zero)"
    lines.append(f"proj_out of the cross-view module in the middle block is {zero}")
    lines += [_compared(component.title, comparison) for component, comparison in conversion.comparisons.items()]
    if not conversion.comparisons:
        lines.append(
            "no --base given: whether the base model is plain SD1.5 was not looked at, so it is written as well"
        )
    lines += [
        f"{name}: all values add up to {before:.10g} in the checkpoint, {cast:.10g} after the cast, {after:.10g} here"
        for name, (before, cast, after) in conversion.sums.items()
    ]
    return lines


def next_steps(conversion: Conversion) -> list[str]:
    """Where the files go that do not stay where they are."""
    steps = [f"{CONTROL.spec.file_name} also works from models/controlnet, in the host's own ControlNet loader"]
    if BASE_FILE in (output.path.name for output in conversion.outputs):
        steps.append(f"move {BASE_FILE} to models/checkpoints and load it with Load Checkpoint")
    return steps


def _millions(conversion: Conversion, names: Iterable[str]) -> float:
    """Values of some tensors of the checkpoint, in millions."""
    return sum(math.prod(conversion.checkpoint.entries[name].shape) for name in names) / 1e6


def _dtypes(conversion: Conversion, part: ComponentKeys) -> str:
    names = {str(conversion.checkpoint.entries[name].dtype).removeprefix("torch.") for name in part.present}
    return "+".join(sorted(names)) or "-"


def _result(conversion: Conversion, part: ComponentKeys) -> str:
    component = part.component
    if not part.present:
        return "not in the checkpoint"
    if component is SCHEDULE:
        return "SD1.5's; not written"
    files: dict[Component, str] = {network: network.spec.file_name for network in METHOD}
    name = files.get(component, BASE_FILE)
    output = next((output for output in conversion.outputs if output.path.name == name), None)
    if output is None:
        return "equals --base; not written"
    return f"{name} (complete already)" if output.complete else name


def _key_differences(conversion: Conversion) -> list[str]:
    parts, surplus = conversion.inspection.parts.values(), conversion.inspection.surplus()
    present, expected, missing = (
        sum(len(names) for names in counted)
        for counted in zip(*((part.present, part.expected, part.missing) for part in parts), strict=True)
    )
    lines = [f"{present} of the {expected} keys of the release, {missing} missing, {len(surplus)} surplus"]
    for start, reason in KNOWN_SURPLUS.items():
        count = sum(name.startswith(start) for name in surplus)
        if count:
            lines.append(f"left out: {count} keys {start}* ({reason})")
    unknown = [name for name in surplus if not is_known_surplus(name)]
    if unknown:
        lines.append(f"left out as asked: {len(unknown)} keys that do not belong to the release, {unknown[0]} first")
    return lines


def _accounting(conversion: Conversion) -> str:
    """Where every value of the checkpoint went."""
    parts = conversion.inspection.parts
    written = {key for output in conversion.outputs for key in output.keys.values()}
    destinations = {
        "in the files": written,
        "equal to --base": [name for component in BASE for name in parts[component].present if name not in written],
        "without influence": parts[REFERENCE].unused,
        "noise schedule": parts[SCHEDULE].present,
        "surplus": conversion.inspection.surplus(),
    }
    shares = [f"{_millions(conversion, names):.6f} {where}" for where, names in destinations.items() if names]
    total = _millions(conversion, conversion.checkpoint.entries)
    return f"{total:.6f} M values in the checkpoint = {' + '.join(shares)}"


def _compared(title: str, comparison: Comparison) -> str:
    if comparison.equal:
        return f"{title}: equal to --base in every one of {comparison.total} tensors"
    if comparison.absent:
        return f"{title}: --base has none to compare with, or one of another shape"
    return (
        f"{title}: {comparison.different} of {comparison.total} tensors differ from --base, by up to "
        f"{comparison.largest:.3g}; the first is {comparison.first}"
    )
