"""Reads tensors one at a time out of checkpoints that may be larger than memory, without running anything in them."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import CheckpointError
from .safetensors_writer import DTYPES, TensorInfo
from .unwrap import unwrap

_WAY_OUT = "get the file again"
# Objects of training code that old checkpoints carry beside their tensors. Stand-ins take their places, so that such
# a file can be read and still nothing of it runs.
HARMLESS_GLOBALS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "argparse.Namespace",
)
# Pages of a mapped file count as memory once they were read; mapping the file anew after so many bytes lets them go.
REMAP_BYTES = 2**29
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
SAMPLES, SAMPLE_BYTES, END_BYTES = 256, 2**16, 2**20


def _stand_ins() -> list[Any]:
    """Classes of these names that take whatever the pickle gives them."""
    takes_all = dict.fromkeys(("__init__", "__setstate__"), lambda self, *args, **kwargs: None)
    split = (name.rsplit(".", 1) for name in HARMLESS_GLOBALS)
    return [type(name, (), {**takes_all, "__module__": module}) for module, name in split]


def listed(names: Sequence[str], count: int = 10) -> str:
    """The first names, for messages."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


class Checkpoint(ABC):
    """A checkpoint on disk, its tensors read when they are asked for.

    Attributes:
        entries: shape and dtype (a name, if torch has none) per key, without what training code has wrapped around it,
            in the file's order.
        shapes: the shapes alone.
        notes: what its user should know about the file.
        top_level: the outermost keys of the file.
    """

    mappings: list[str] = [""]  # paths of the mappings that hold tensors, see `unwrap`

    def __init__(self, path: Path):
        self.path = path
        self.top_level: list[str] = []
        self._read_bytes = 0
        stored = self._open()
        found = unwrap(list(stored), self.mappings)
        self.notes = [*self._left_out(found.mapping), *([found.note] if found.note else [])]
        self._stored_names = found.keys
        self.entries = {name: stored[key] for name, key in found.keys.items()}
        self.shapes = {name: info.shape for name, info in self.entries.items()}

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU. Keep no reference to it: the mapping of the file would stay with it.

        Raises:
            CheckpointError: its bytes cannot be read.
        """
        if self._read_bytes > REMAP_BYTES:
            self._open()
            self._read_bytes = 0
        tensor = self._tensor(self._stored_names[name])
        self._read_bytes += tensor.nbytes
        return tensor

    def fingerprint(self) -> dict[str, Any]:
        """What tells this file from another without reading all of it.

        Size, time of change, and a SHA-256 over the first and last MiB (safetensors' header; a pickle's zip directory
        with the checksum of every tensor) and 256 evenly spaced blocks of 64 KiB. The time catches what the blocks may
        miss, a small tensor edited in place; a copy of the file with another time is merely converted again.
        """
        status = self.path.stat()
        blocks = [(0, END_BYTES), (max(0, status.st_size - END_BYTES), END_BYTES)]
        blocks += [(status.st_size * index // SAMPLES, SAMPLE_BYTES) for index in range(SAMPLES)]
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            for offset, count in blocks:
                file.seek(offset)
                digest.update(file.read(count))
        return {
            "file": self.path.name,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256_of_samples": digest.hexdigest(),
        }

    def contents(self) -> str:
        """What the file has, for messages: its outermost keys and its first tensors."""
        top = f"its top-level keys are {listed(self.top_level)}; " if self.mappings != [""] else ""
        tensors = [f"{name} {list(shape)}" for name, shape in self.shapes.items()]
        return f"{top}its first tensors are {listed(tensors, 3)}"

    def _left_out(self, mapping: str) -> list[str]:
        """Notes on what is beside the tensors of the chosen mapping."""
        return []

    @abstractmethod
    def _open(self) -> dict[str, TensorInfo]:
        """Maps the file (anew) and lists what is in it under the names it has there."""

    @abstractmethod
    def _tensor(self, stored_name: str) -> Tensor: ...


class SafetensorsCheckpoint(Checkpoint):
    def _open(self) -> dict[str, TensorInfo]:
        try:
            self._handle = safe_open(self.path, "pt")
            slices = {name: self._handle.get_slice(name) for name in self._handle.keys()}
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error
        self.metadata = self._handle.metadata() or {}
        dtypes: dict[str, Any] = {name: DTYPES.get(s.get_dtype(), s.get_dtype()) for name, s in slices.items()}
        return {name: TensorInfo(tuple(s.get_shape()), dtypes[name]) for name, s in slices.items()}

    def _tensor(self, stored_name: str) -> Tensor:
        try:
            return self._handle.get_tensor(stored_name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error


class PickleCheckpoint(Checkpoint):
    """torch.save files, by torch's weights-only unpickler: it makes tensors and refuses to call anything else.

    The zip format is mapped into memory. The older format cannot be: it is read as a whole.
    """

    def __init__(self, path: Path, mapped: bool):
        self.mapped = mapped
        super().__init__(path)
        if not mapped:
            gigabytes = path.stat().st_size / 1e9
            self.notes.append(
                f"the file has torch's older format without zip, which cannot be read in parts: all {gigabytes:.1f} GB "
                "of it are in memory"
            )

    def _open(self) -> dict[str, TensorInfo]:
        first = not hasattr(self, "_tensors")
        if not (first or self.mapped):
            return {}
        self._tensors: dict[str, Tensor] = {}  # lets go of the old mapping before there is a new one
        content = _unpickle(self.path, self.mapped)
        content = content if isinstance(content, Mapping) else {type(content).__name__: content}
        self.mappings, self._others = [], {}
        self._collect(content, "")
        self.top_level = [str(key) for key in content]
        if not self._tensors:
            found = listed(self.top_level) or "nothing"
            raise CheckpointError(f"{self.path} holds no tensors by name, but {found}: it is no network's checkpoint.")
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def _collect(self, content: Mapping[Any, Any], path: str) -> None:
        """Every tensor that has a name, under the names of the mappings around it, joined by dots."""
        others, before = [], len(self._tensors)
        self.mappings.append(path)
        for key, value in content.items():
            if isinstance(value, Mapping):
                self._collect(value, f"{path}{key}.")
            if not isinstance(value, Tensor):
                others.append(str(key))
            elif isinstance(key, str):
                self._tensors.setdefault(path + key, value)
        self._others[path] = others
        if len(self._tensors) == before and path:
            self.mappings.remove(path)

    def _left_out(self, mapping: str) -> list[str]:
        notes = []
        if mapping:
            beside = [key for key in self.top_level if not mapping.startswith(f"{key}.")]
            left = f"; left out beside it: {listed(beside)}" if beside else ""
            notes.append(f"the tensors are under '{mapping[:-1]}'{left}")
        if others := self._others[mapping]:
            notes.append(f"left out because they are no tensors: {listed(others)}")
        return notes

    def _tensor(self, stored_name: str) -> Tensor:
        return self._tensors[stored_name]


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a checkpoint of any of the formats in use, by its content and not by its name.

    Raises:
        CheckpointError: missing, truncated, of another format, or a pickle that asks for more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}; check the path.")
    with open(path, "rb") as file:
        start = file.read(16)
    # Safetensors first: the length of its header may begin with any byte, that of a pickle's included.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return SafetensorsCheckpoint(path)
    if start.startswith(b"PK\x03\x04"):
        return PickleCheckpoint(path, mapped=True)
    if start[:1] == b"\x80":
        return PickleCheckpoint(path, mapped=False)
    if start.startswith(b"version https://"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the checkpoint; fetch that with `git lfs pull`.")
    raise CheckpointError(f"{path} is neither a torch checkpoint nor safetensors (it begins with {start[:8]!r}).")


def _unpickle(path: Path, mapped: bool) -> Any:
    if mapped and not zipfile.is_zipfile(path):  # its directory is at the end
        raise _damaged(path, "its end is missing")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins()):
            warnings.simplefilter("ignore")  # torch's advice about pickle protocols, before it refuses the file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from error


def _refusal(path: Path, reason: str) -> str:
    """What the weights-only unpickler objected to; its own advice, to run the file after all, is left out."""
    asked = re.search(r"GLOBAL:? ([\w.]+)", reason)
    if asked:
        return (
            f"{path} is a pickle that carries code: loading it would call {asked[1]}. Nothing of it was run; "
            "get a file of plain tensors."
        )
    return f"{path} is a pickle that asks for more than tensors, or is damaged. Nothing of it was run; {_WAY_OUT}."


def _damaged(path: Path, reason: object) -> CheckpointError:
    first_line = next(iter(str(reason).splitlines()), "") or type(reason).__name__
    return CheckpointError(f"{path} is truncated or damaged ({first_line}); {_WAY_OUT}.")
