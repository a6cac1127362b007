"""What the converter tells its user: a table per network and the findings in sentences."""

from __future__ import annotations

import torch

from .layout import BASE_GROUPS, CONTROL, KNOWN_SURPLUS, METHOD_GROUPS, SCHEDULE, Group, Part, surplus_reason
from .split import BASE_FILE, Conversion

COLUMNS = ("network", "tensors", "values (M)", "missing", "surplus", "dtype", "result")
NUMBERS = COLUMNS[1:5]


def table(conversion: Conversion) -> str:
    """One line per network and the total, as aligned text."""
    rows = [COLUMNS]
    total_tensors = total_values = 0
    for part in conversion.inspection.parts.values():
        values = _values(conversion, part.present)
        total_tensors, total_values = total_tensors + len(part.present), total_values + values
        counts = (str(len(part.present)), f"{values / 1e6:.3f}", str(len(part.missing)), str(len(part.surplus)))
        rows.append((part.group.title, *counts, _dtypes(conversion, part), _result(conversion, part)))
    rows.append(("in all", str(total_tensors), f"{total_values / 1e6:.3f}", "", "", "", ""))
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
    lines = [*conversion.source.notes, *_key_differences(conversion)]
    dead = [part for part in conversion.inspection.parts.values() if part.dead]
    for part in dead:
        millions = _values(conversion, part.dead) / 1e6
        lines.append(
            f"{part.group.title}: {len(part.dead)} tensors of input_hint_block ({millions:.3f} M values) have no "
            "influence in the authors' code and are left out"
        )
    zero = "all zero: it is the identity" if conversion.middle_is_zero else "trained (not zero)"
    lines.append(f"proj_out of the cross-view module in the middle block is {zero}")
    lines += _base_findings(conversion)
    lines += [
        f"{name}: all values add up to {before:.10g} in the checkpoint, {cast:.10g} after the cast, {after:.10g} here"
        for name, (before, cast, after) in conversion.sums.items()
    ]
    return lines


def next_steps(conversion: Conversion) -> list[str]:
    """Where the files go that do not stay where they are."""
    names = [output.path.name for output in conversion.outputs]
    steps = [f"{CONTROL.file_name} also works from models/controlnet, in the host's own ControlNet loader"]
    if BASE_FILE in names:
        steps.append(f"move {BASE_FILE} to models/checkpoints and load it with Load Checkpoint")
    return steps


def _values(conversion: Conversion, names: list[str]) -> int:
    return sum(torch.Size(conversion.source.entries[name].shape).numel() for name in names)


def _dtypes(conversion: Conversion, part: Part) -> str:
    names = {str(conversion.source.entries[name].dtype).removeprefix("torch.") for name in part.present}
    return "+".join(sorted(names)) or "-"


def _result(conversion: Conversion, part: Part) -> str:
    group = part.group
    if part.absent:
        return "not in the checkpoint"
    if group is SCHEDULE:
        return "SD1.5's; not written"
    name = group.file_name if group in METHOD_GROUPS else BASE_FILE
    output = next((o for o in conversion.outputs if o.path.name == name), None)
    if output is None:
        return "equals --base; not written"
    return f"{name} (complete already)" if output.complete else name


def _key_differences(conversion: Conversion) -> list[str]:
    inspection = conversion.inspection
    missing = sum(len(part.missing) for part in inspection.parts.values())
    surplus = inspection.surplus()
    lines = [
        f"{inspection.present_count} of the {inspection.expected_count} keys of the release, {missing} missing, "
        f"{len(surplus)} surplus"
    ]
    for start, reason in KNOWN_SURPLUS.items():
        count = sum(name.startswith(start) for name in surplus)
        if count:
            lines.append(f"left out: {count} keys {start}* ({reason})")
    unknown = [name for name in surplus if surplus_reason(name) is None]
    if unknown:
        lines.append(f"left out as asked: {len(unknown)} keys that do not belong to the release, {unknown[0]} first")
    return [*lines, _accounting(conversion)]


def _accounting(conversion: Conversion) -> str:
    """Where every value of the checkpoint went."""
    parts = conversion.inspection.parts
    written = {key for output in conversion.outputs for key in output.keys.values()}
    dead = [name for part in parts.values() for name in part.dead]
    equal = [n for g in BASE_GROUPS for n in parts[g].present if n not in written]
    destinations = {
        "in the files": list(written),
        "equal to --base": equal,
        "without influence": dead,
        "noise schedule": parts[SCHEDULE].present,
        "surplus": conversion.inspection.surplus(),
    }
    shares = [f"{_values(conversion, n) / 1e6:.6f} {where}" for where, n in destinations.items() if n]
    total = _values(conversion, list(conversion.source.entries))
    return f"{total / 1e6:.6f} M values in the checkpoint = {' + '.join(shares)}"


def _base_findings(conversion: Conversion) -> list[str]:
    if not conversion.comparisons:
        return ["no --base given: whether the base model is plain SD1.5 was not looked at, so it is written as well"]
    return [_base_finding(conversion, group) for group in BASE_GROUPS if group in conversion.comparisons]


def _base_finding(conversion: Conversion, group: Group) -> str:
    comparison = conversion.comparisons[group]
    if comparison.equal:
        return f"{group.title}: equal to --base in every one of {comparison.total} tensors"
    if comparison.absent:
        return f"{group.title}: --base has none to compare with, or one of another shape"
    return (
        f"{group.title}: {comparison.different} of {comparison.total} tensors differ from --base, by up to "
        f"{comparison.largest:.3g}; the first is {comparison.first}"
    )
