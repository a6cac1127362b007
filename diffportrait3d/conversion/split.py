"""Splits the authors' checkpoint into the files this pack loads; one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..diffusion import Schedule
from ..networks import NETWORKS
from ..weights.files import CheckpointError, network_metadata
from ..weights.known_formats import describe_stranger
from ..weights.reader import SafetensorsSource, Source, open_source
from ..weights.tensor_files import TensorInfo, file_size, write_safetensors
from .layout import (
    BASE_GROUPS,
    FLOATING,
    METHOD_GROUPS,
    SCHEDULE,
    UNET,
    VIEWS,
    Group,
    Inspection,
    inspect,
)

BASE_FILE = "base_checkpoint.safetensors"
# Raised when what is written for the same source changes, so that older outputs are not taken for complete.
CONVERTER_VERSION = 1
# Coarsest last: of two dtypes a comparison is made in the coarser one.
PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """How to convert.

    out: folder of the results.
    base: SD1.5 checkpoint to compare base UNet, autoencoder and text encoder with.
    dtype: of the results; None keeps the file's (float64 becomes float32).
    overwrite: replace results of another checkpoint or dtype.
    drop_surplus: leave out keys that do not belong to the layout instead of refusing the file.
    verify: read everything back and compare it with the checkpoint.
    """

    out: Path
    base: Path | None = None
    dtype: torch.dtype | None = None
    overwrite: bool = False
    drop_surplus: bool = False
    verify: bool = False


@dataclass
class Output:
    """One file to write: stored name -> key in the checkpoint."""

    path: Path
    keys: dict[str, str]
    metadata: dict[str, str]
    complete: bool = False  # an earlier run has written it from the same checkpoint


@dataclass
class Comparison:
    """A base group against the SD1.5 file: how many of its tensors differ there, and the largest difference."""

    different: int
    total: int
    largest: float
    first: str | None
    absent: bool = False  # the SD1.5 file has no such network

    @property
    def equal(self) -> bool:
        return not self.absent and self.different == 0


@dataclass
class Conversion:
    """What was found and done, for the report."""

    source: Source
    inspection: Inspection
    outputs: list[Output]
    comparisons: dict[Group, Comparison]
    middle_is_zero: bool
    sums: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # see `verify`


def convert(checkpoint: Path, options: Options) -> Conversion:
    """Writes one file per network, and the base model if it is not the SD1.5 of `options.base`.

    Everything that can be wrong with the checkpoint is looked for before the first file is written. Files that an
    earlier run completed from the same checkpoint in the same dtype are left as they are.

    Raises:
        CheckpointError: the checkpoint or the base is not usable, results are in the way, or the disk is too small.
    """
    source = open_source(checkpoint)
    _refuse_own_files(source)
    inspection = inspect(source.shapes, source.path, options.drop_surplus, source.contents())
    _check_dtypes(source, inspection)
    _check_schedule(source, inspection)
    comparisons = compare_with_base(source, inspection, options.base) if options.base else {}
    middle_is_zero = _middle_is_zero(source)
    outputs = _outputs(source, inspection, comparisons, middle_is_zero, options)
    _check_targets(outputs, options.overwrite)
    _check_space(source, outputs, options)
    pending = [output for output in outputs if not output.complete]
    total = sum(_bytes_of(source, output, options.dtype) for output in pending)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Converting", disable=not pending) as progress:
        for output in pending:
            progress.set_postfix_str(output.path.name)
            _write(source, output, options.dtype, progress.update)
    conversion = Conversion(source, inspection, outputs, comparisons, middle_is_zero)
    if options.verify:
        conversion.sums = {output.path.name: verify(source, output) for output in outputs}
    return conversion


def _refuse_own_files(source: Source) -> None:
    if isinstance(source, SafetensorsSource) and source.metadata.get("format") == json.dumps("diffportrait3d"):
        raise CheckpointError(f"{source.path} is a network file of this pack already; there is nothing to convert.")


def _check_dtypes(source: Source, inspection: Inspection) -> None:
    for part in inspection.parts.values():
        wrong = [n for n in part.present if source.entries[n].dtype not in FLOATING]
        if wrong:
            dtype = source.entries[wrong[0]].dtype
            raise CheckpointError(
                f"{source.path}: {len(wrong)} tensors of the {part.group.title} are no floating-point numbers, e.g. "
                f"{wrong[0]} ({dtype}); a quantised checkpoint cannot be converted."
            )


def _check_schedule(source: Source, inspection: Inspection) -> None:
    """The host computes the noise schedule itself: it has to be the one that the weights were trained with."""
    schedule = Schedule()
    for name, expected in (("betas", schedule.betas), ("alphas_cumprod", schedule.alphas_cumprod)):
        if name not in inspection.parts[SCHEDULE].present:
            continue
        found = source.get(name)
        tolerance = 2 * float(torch.finfo(found.dtype).eps)
        difference = float((found.double() - expected.double()).abs().max())
        if not difference <= tolerance:
            raise CheckpointError(
                f"{source.path} has another noise schedule than SD1.5: {name} differs by up to {difference:.3g}."
            )


def compare_with_base(source: Source, inspection: Inspection, path: Path) -> dict[Group, Comparison]:
    """Compares every tensor of the base groups with an SD1.5 file, exactly, in the coarser dtype of the two.

    Raises:
        CheckpointError: the file has no UNet of this shape.
    """
    base = open_source(path)
    unet = inspection.parts[UNET].expected
    if any(base.shapes.get(name) != shape for name, shape in unet.items()):
        found = f"{describe_stranger(base.shapes) or 'no checkpoint that is known'} ({base.contents()})"
        raise CheckpointError(f"--base {path} is no SD1.5 checkpoint of the same width; it looks like {found}.")
    parts = [inspection.parts[group] for group in BASE_GROUPS if inspection.parts[group].present]
    comparisons = {}
    with tqdm(total=sum(len(p.present) for p in parts), unit="tensor", desc=f"Comparing with {path.name}") as progress:
        for part in parts:
            comparison = Comparison(0, len(part.present), 0.0, None)
            for name in part.present:
                progress.update()
                if base.shapes.get(name) != source.entries[name].shape:
                    comparison.absent = True
                    continue
                _compare(comparison, name, source.get(name), base.get(name))
            comparisons[part.group] = comparison
    return comparisons


def _compare(comparison: Comparison, name: str, ours: Tensor, theirs: Tensor) -> None:
    dtype = max(ours.dtype, theirs.dtype, key=PRECISION.index)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    if not torch.equal(ours, theirs):
        comparison.different += 1
        comparison.first = comparison.first or name
        comparison.largest = max(comparison.largest, float((ours.float() - theirs.float()).abs().max()))


def _middle_is_zero(source: Source) -> bool:
    """Whether the middle cross-view module was never trained, which makes it the identity."""
    stem = VIEWS.prefix + "middle_block_motion_module.0.temporal_transformer.proj_out."
    return not any(bool(source.get(stem + name).any()) for name in ("weight", "bias"))


def _outputs(
    source: Source,
    inspection: Inspection,
    comparisons: dict[Group, Comparison],
    middle_is_zero: bool,
    options: Options,
) -> list[Output]:
    origin = {"source": {**source.fingerprint(), "converter_version": CONVERTER_VERSION}}
    config = inspection.config.to_dict()
    outputs = []
    for group in METHOD_GROUPS:
        facts = {**NETWORKS[group.kind].conventions, **origin}
        if group is VIEWS:
            facts["middle_view_attention_is_zero"] = middle_is_zero
        keys = {name.removeprefix(group.prefix): name for name in inspection.parts[group].written}
        metadata = network_metadata(group.kind, config, facts)
        outputs.append(Output(options.out / group.file_name, keys, metadata))
    if not _base_is_known(inspection, comparisons):
        names = [name for group in BASE_GROUPS for name in inspection.parts[group].written]
        metadata = {name: json.dumps(value) for name, value in origin.items()}
        outputs.append(Output(options.out / BASE_FILE, {name: name for name in names}, metadata))
    for output in outputs:
        output.complete = _is_complete(source, output, options.dtype)
    return [output for output in outputs if output.keys]


def _base_is_known(inspection: Inspection, comparisons: dict[Group, Comparison]) -> bool:
    present = [group for group in BASE_GROUPS if inspection.parts[group].present]
    return all(group in comparisons and comparisons[group].equal for group in present)


def _entries(source: Source, output: Output, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor of an output file."""
    return {
        stored: (source.entries[key].shape, _stored_dtype(source.entries[key].dtype, dtype))
        for stored, key in output.keys.items()
    }


def _stored_dtype(found: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted or (torch.float32 if found == torch.float64 else found)


def _is_complete(source: Source, output: Output, dtype: torch.dtype | None) -> bool:
    """Whether the file is there, whole, and what this run would write."""
    if not output.path.is_file():
        return False
    try:
        written = open_source(output.path)
    except CheckpointError:
        return False
    entries = {name: (entry.shape, entry.dtype) for name, entry in written.entries.items()}
    same_facts = isinstance(written, SafetensorsSource) and written.metadata == output.metadata
    return same_facts and entries == _entries(source, output, dtype)


def _check_targets(outputs: list[Output], overwrite: bool) -> None:
    in_the_way = [str(o.path) for o in outputs if o.path.exists() and not o.complete]
    if in_the_way and not overwrite:
        raise CheckpointError(
            f"{', '.join(in_the_way)} exists, from another checkpoint or with another dtype; "
            "--overwrite replaces it, --out chooses another folder."
        )


def _check_space(source: Source, outputs: list[Output], options: Options) -> None:
    needed = sum(_bytes_of(source, o, options.dtype) for o in outputs if not o.complete)
    folder = next(p for p in (options.out, *options.out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{options.out} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, or use --dtype fp16."
        )


def _bytes_of(source: Source, output: Output, dtype: torch.dtype | None) -> int:
    return file_size(_entries(source, output, dtype).values())


def _write(source: Source, output: Output, dtype: torch.dtype | None, update: Callable[[int], object]) -> None:
    entries = _entries(source, output, dtype)

    def tensor(stored: str) -> Tensor:
        key = output.keys[stored]
        result = _cast(source.get(key), entries[stored][1], key, source.path)
        update(result.nbytes)
        return result

    write_safetensors(output.path, entries, tensor, output.metadata)


def _cast(tensor: Tensor, dtype: torch.dtype, key: str, path: Path) -> Tensor:
    """The tensor as it is stored.

    Raises:
        CheckpointError: it holds infinities or NaN, or does not fit into the dtype.
    """
    result = tensor.to(dtype)
    if bool(torch.isfinite(result).all()):
        return result
    if bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: {key} holds values beyond the range of {dtype}; use --dtype bf16 or fp32.")
    raise CheckpointError(f"{path}: {key} holds infinities or NaN; the file is damaged.")


def verify(source: Source, output: Output) -> tuple[float, float, float]:
    """Reads a file back and compares it with the checkpoint, bit for bit after the cast.

    Returns:
        float64 sums of all values: in the checkpoint, after the cast, in the file. The last two are equal.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    written = open_source(output.path)
    before = cast = after = 0.0
    for stored, key in tqdm(output.keys.items(), unit="tensor", desc=f"Verifying {output.path.name}"):
        original, result = source.get(key), written.get(stored)
        expected = original.to(result.dtype)
        if not torch.equal(expected, result):
            raise CheckpointError(f"{output.path}: {stored} is not what {source.path} holds; delete it, convert again.")
        before += float(original.double().sum())
        cast += float(expected.double().sum())
        after += float(result.double().sum())
    return before, cast, after
