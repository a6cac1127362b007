"""Writes safetensors files tensor by tensor.

`safetensors.torch.save_file` wants all tensors of a file in memory at once; here one at a time is enough.
"""
from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

TensorInfo = tuple[tuple[int, ...], torch.dtype]  # shape and dtype

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(
    path: Path,
    entries: Mapping[str, TensorInfo],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file in one pass; it appears under its name when it is complete, or not at all.

    Args:
        entries: shape and dtype of every tensor, in the order in which they are wanted.
        tensor: gives the tensor of a name, in that shape and dtype.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")  # the same name again, so that a killed run leaves one at most
    try:
        with open(temporary, "wb") as file:
            file.write(_header(entries, metadata))
            for name, (shape, dtype) in entries.items():
                file.write(_bytes(tensor(name), name, shape, dtype))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_size(entries: Iterable[TensorInfo]) -> int:
    """Bytes that the tensors take."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in entries)


def _header(entries: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length (uint64, little endian) and JSON, padded so that the data begins at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, dtype) in entries.items():
        end = offset + file_size([(shape, dtype)])
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> memoryview:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; announced were {dtype} {list(shape)}.")
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
