"""Writes safetensors files tensor by tensor, complete or not at all.

`safetensors.torch.save_file` needs all tensors of a file in memory at once and reports a full disk in words of its own.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..files import write_atomically

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


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors that are in memory."""
    write_atomically(path, tensors_writer(tensors, metadata))


def tensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[BinaryIO], None]:
    """What `files.write_atomically` takes, for tensors in memory: the widest first, so that all are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries = {name: TensorInfo(tuple(tensors[name].shape), tensors[name].dtype) for name in names}
    return writer(entries, lambda name: tensors[name].detach().cpu(), metadata)


def writer(
    entries: Mapping[str, TensorInfo], tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> Callable[[BinaryIO], None]:
    """The same for tensors that are made one at a time.

    Args:
        entries: shape and dtype of every tensor, in the order of the file.
        tensor: gives the tensor of a name, in that shape and dtype.
    """

    def write(file: BinaryIO) -> None:
        file.write(_header(entries, metadata))
        for name in entries:
            file.write(_bytes(tensor(name)))

    return write


def _header(entries: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length (uint64, little endian) and JSON, padded so that the data begins at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, info in entries.items():
        offsets = [offset, offset + info.nbytes]
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
