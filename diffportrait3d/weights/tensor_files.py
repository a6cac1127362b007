"""Writes safetensors files tensor by tensor, whole or not at all.

`safetensors.torch.save_file` wants all tensors of a file in memory at once and reports a full disk in words of its own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..files import write_atomically

TensorInfo = tuple[tuple[int, ...], torch.dtype]  # shape and dtype

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors that are at hand.

    Raises:
        WriteError: the disk is full, or the place cannot be written to.
    """
    write_atomically(path, tensor_writer(tensors, metadata))


def write_safetensors(
    path: Path,
    entries: Mapping[str, TensorInfo],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file in one pass.

    Args:
        entries: shape and dtype of every tensor, in the order in which they are wanted.
        tensor: gives the tensor of a name, in that shape and dtype.

    Raises:
        WriteError: the disk is full, or the place cannot be written to.
    """
    write_atomically(path, lambda file: _write(file, entries, tensor, metadata))


def tensor_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[BinaryIO], None]:
    """What `files.write_atomically` wants, for tensors that are at hand: the widest first, so that all are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in names}
    return lambda file: _write(file, entries, lambda name: tensors[name].detach().cpu(), metadata)


def file_size(entries: Iterable[TensorInfo]) -> int:
    """Bytes that the tensors take."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in entries)


def _write(
    file: BinaryIO, entries: Mapping[str, TensorInfo], tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    file.write(_header(entries, metadata))
    for name, (shape, dtype) in entries.items():
        file.write(_bytes(tensor(name), name, shape, dtype))


def _header(entries: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length (uint64, little endian) and JSON, padded so that the data begins at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, dtype) in entries.items():
        end = offset + file_size([(shape, dtype)])
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> memoryview:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; announced were {dtype} {list(shape)}.")
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
