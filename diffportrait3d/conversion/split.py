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
from ..files import write_atomically
from ..weights.checkpoints import Checkpoint, SafetensorsCheckpoint, open_checkpoint
from ..weights.files import CheckpointError, is_own, network_metadata
from ..weights.identify import known_format
from ..weights.safetensors_writer import TensorInfo, writer
from .layout import BASE, METHOD, SCHEDULE, UNET, VIEWS, Component, Inspection, inspect

BASE_FILE = "base_checkpoint.safetensors"
# Raised when what is written for the same checkpoint changes, so that older outputs are not taken for complete.
CONVERTER_VERSION = 1
# Of two dtypes a comparison is made in the coarser one, which comes later here.
PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """The command's options; `dtype` None keeps the file's (float64 becomes float32)."""

    out: Path
    base: Path | None = None
    dtype: torch.dtype | None = None
    overwrite: bool = False
    drop_surplus: bool = False
    verify: bool = False


@dataclass
class Output:
    """One file to write."""

    path: Path
    keys: dict[str, str]  # name of a tensor in the file -> its key in the checkpoint
    entries: dict[str, TensorInfo]  # name of a tensor in the file -> its shape and dtype there
    metadata: dict[str, str]
    complete: bool = False  # an earlier run has written it from the same checkpoint

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.entries.values())


@dataclass
class Comparison:
    """A base component against the SD1.5 file."""

    total: int  # tensors
    different: int = 0
    largest: float = 0.0  # difference
    first: str | None = None  # key that differs
    absent: bool = False  # the SD1.5 file lacks a tensor, or has it in another shape

    @property
    def equal(self) -> bool:
        return not self.absent and self.different == 0

    def add(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        dtype = max(ours.dtype, theirs.dtype, key=PRECISION.index)
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        if not torch.equal(ours, theirs):
            self.different += 1
            self.first = self.first or name
            self.largest = max(self.largest, float((ours.float() - theirs.float()).abs().max()))


@dataclass
class Conversion:
    """What was found and done, for the report."""

    checkpoint: Checkpoint
    inspection: Inspection
    outputs: list[Output]
    comparisons: dict[Component, Comparison]
    middle_is_zero: bool
    sums: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # see `verify`


def convert(path: Path, options: Options) -> Conversion:
    """Converts the authors' checkpoint.

    Everything that can be wrong with the checkpoint is looked for before the first file is written. Files that an
    earlier run completed from the same checkpoint in the same dtype are left as they are.

    Raises:
        CheckpointError: the checkpoint or the base is not usable, results are in the way, or the disk is too small.
    """
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, SafetensorsCheckpoint) and is_own(checkpoint.metadata):
        raise CheckpointError(f"{path} is a network file of this pack already; there is nothing to convert.")
    inspection = inspect(checkpoint.shapes, path, options.drop_surplus, checkpoint.contents())
    _check_dtypes(checkpoint, inspection)
    _check_schedule(checkpoint, inspection)
    comparisons = compare_with_base(checkpoint, inspection, options.base) if options.base else {}
    conversion = Conversion(checkpoint, inspection, [], comparisons, _middle_is_zero(checkpoint))
    conversion.outputs = outputs = _outputs(conversion, options)
    pending = [output for output in outputs if not output.complete]
    _check_targets(pending, options)
    total = sum(output.nbytes for output in pending)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Converting", disable=not pending) as progress:
        for output in pending:
            progress.set_postfix_str(output.path.name)
            _write(checkpoint, output, progress.update)
    if options.verify:
        conversion.sums = {output.path.name: verify(checkpoint, output) for output in outputs}
    return conversion


def _check_dtypes(checkpoint: Checkpoint, inspection: Inspection) -> None:
    for component, part in inspection.parts.items():
        wrong = [name for name in part.present if checkpoint.entries[name].dtype not in PRECISION]
        if wrong:
            raise CheckpointError(
                f"{checkpoint.path}: {len(wrong)} tensors of the {component.title} are no floating-point numbers, e.g. "
                f"{wrong[0]} ({checkpoint.entries[wrong[0]].dtype}); a quantised checkpoint cannot be converted."
            )


def _check_schedule(checkpoint: Checkpoint, inspection: Inspection) -> None:
    """The host computes the noise schedule itself: it has to be the one that the weights were trained with."""
    schedule = Schedule()
    for name, expected in (("betas", schedule.betas), ("alphas_cumprod", schedule.alphas_cumprod)):
        if name not in inspection.parts[SCHEDULE].present:
            continue
        found = checkpoint.get(name)
        difference = float((found.double() - expected.double()).abs().max())
        if not difference <= 2 * float(torch.finfo(found.dtype).eps):
            raise CheckpointError(
                f"{checkpoint.path} has another noise schedule than SD1.5: {name} differs by up to {difference:.3g}."
            )


def compare_with_base(checkpoint: Checkpoint, inspection: Inspection, path: Path) -> dict[Component, Comparison]:
    """Compares every tensor of the base components with an SD1.5 file, exactly, in the coarser dtype of the two.

    Raises:
        CheckpointError: the file has no UNet of this shape.
    """
    base = open_checkpoint(path)
    unet = inspection.parts[UNET].expected
    if any(base.shapes.get(name) != shape for name, shape in unet.items()):
        found = f"{known_format(base.shapes) or 'no checkpoint that is known'} ({base.contents()})"
        raise CheckpointError(f"--base {path} is no SD1.5 checkpoint of the same width; it looks like {found}.")
    parts = [inspection.parts[component] for component in BASE if inspection.parts[component].present]
    comparisons = {part.component: Comparison(len(part.present)) for part in parts}
    names = [(comparisons[part.component], name) for part in parts for name in part.present]
    for comparison, name in tqdm(names, unit="tensor", desc=f"Comparing with {path.name}"):
        if base.shapes.get(name) == checkpoint.entries[name].shape:
            comparison.add(name, checkpoint.get(name), base.get(name))
        else:
            comparison.absent = True
    return comparisons


def _middle_is_zero(checkpoint: Checkpoint) -> bool:
    """Whether the middle cross-view module was never trained, which makes it the identity."""
    stem = VIEWS.prefix + "middle_block_motion_module.0.temporal_transformer.proj_out."
    return not any(bool(checkpoint.get(stem + name).any()) for name in ("weight", "bias"))


def _outputs(conversion: Conversion, options: Options) -> list[Output]:
    checkpoint, parts = conversion.checkpoint, conversion.inspection.parts
    origin = {"source": {**checkpoint.fingerprint(), "converter_version": CONVERTER_VERSION}}
    config = conversion.inspection.config.to_dict()
    outputs = []

    def add(file: str, keys: dict[str, str], metadata: dict[str, str]) -> None:
        entries = {name: _stored(checkpoint.entries[key], options.dtype) for name, key in keys.items()}
        output = Output(options.out / file, keys, entries, metadata)
        output.complete = _is_complete(output)
        outputs.append(output)

    for component in METHOD:
        facts = {**component.spec.conventions, **origin}
        if component is VIEWS:
            facts["middle_view_attention_is_zero"] = conversion.middle_is_zero
        keys = {key.removeprefix(component.prefix): key for key in parts[component].written}
        add(component.spec.file_name, keys, network_metadata(component.spec.kind, config, facts))
    base = [component for component in BASE if parts[component].present]
    known = all(c in conversion.comparisons and conversion.comparisons[c].equal for c in base)
    if base and not known:
        keys = {key: key for component in base for key in parts[component].written}
        add(BASE_FILE, keys, {name: json.dumps(value) for name, value in origin.items()})
    return outputs


def _stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, dtype or (torch.float32 if info.dtype == torch.float64 else info.dtype))


def _is_complete(output: Output) -> bool:
    """Whether the file is there, undamaged, and what this run would write."""
    if not output.path.is_file():
        return False
    try:
        written = open_checkpoint(output.path)
    except CheckpointError:
        return False
    same_facts = isinstance(written, SafetensorsCheckpoint) and written.metadata == output.metadata
    return same_facts and written.entries == output.entries


def _check_targets(pending: list[Output], options: Options) -> None:
    in_the_way = [str(output.path) for output in pending if output.path.exists()]
    if in_the_way and not options.overwrite:
        raise CheckpointError(
            f"{', '.join(in_the_way)} exists, from another checkpoint or with another dtype; "
            "--overwrite replaces it, --out chooses another folder."
        )
    needed = sum(output.nbytes for output in pending)
    folder = next(p for p in (options.out, *options.out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{options.out} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, or use --dtype fp16."
        )


def _write(checkpoint: Checkpoint, output: Output, update: Callable[[int], object]) -> None:
    def tensor(name: str) -> Tensor:
        key = output.keys[name]
        result = _cast(checkpoint.get(key), output.entries[name].dtype, f"{checkpoint.path}: {key}")
        update(result.nbytes)
        return result

    write_atomically(output.path, writer(output.entries, tensor, output.metadata))


def _cast(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The tensor as it is stored; a CheckpointError for infinities, NaN, and values beyond the dtype."""
    result = tensor.to(dtype)
    if bool(torch.isfinite(result).all()):
        return result
    if bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{where} holds values beyond the range of {dtype}; use --dtype bf16 or fp32.")
    raise CheckpointError(f"{where} holds infinities or NaN; the file is damaged.")


def verify(checkpoint: Checkpoint, output: Output) -> tuple[float, float, float]:
    """Reads a file back and compares it with the checkpoint, bit for bit after the cast. Gives the float64 sums of all
    values in the checkpoint, after the cast, and in the file; the last two are equal.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    written = open_checkpoint(output.path)
    before = cast = after = 0.0
    for name, key in tqdm(output.keys.items(), unit="tensor", desc=f"Verifying {output.path.name}"):
        original, result = checkpoint.get(key), written.get(name)
        expected = original.to(result.dtype)
        if not torch.equal(expected, result):
            raise CheckpointError(f"{output.path}: {name} differs from {checkpoint.path}; delete it, convert again.")
        before += float(original.double().sum())
        cast += float(expected.double().sum())
        after += float(result.double().sum())
    return before, cast, after
