"""This pack's files: one safetensors file (or a few shards) per network, which says what it is in its metadata.

A network of the authors that another tool has cut out of their checkpoint is read like one of these files.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import write_together
from ..networks import NETWORKS, title_of
from .identify import CONTROLNET, OfficialNetwork, known_format, official_kind, official_network
from .safetensors_writer import tensors_writer

FORMAT = "diffportrait3d"
FORMAT_VERSION = 1
HEADER = ("format", "format_version", "network", "config")  # metadata that every file has


class CheckpointError(ValueError):
    """A file that cannot be used, with the way out in its message."""


def way_to_get(kind: str | None = None) -> str:
    """Where a network comes from, for people who have no more than the installed pack."""
    ours = "take the one that comes with the pack in weights/miniature (it is gone: install the pack again)"
    if kind is not None and not NETWORKS[kind].official:
        return ours
    return (
        "convert the authors' checkpoint with `python -m diffportrait3d.convert` in the pack's folder "
        f"(docs/released_weights.md there), or {ours}"
    )


def save_network(
    path: str | os.PathLike,
    module: nn.Module,
    kind: str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    **metadata: Any,
) -> list[Path]:
    """Writes a network with its config and metadata; gives its files, which appear together, or none does.

    Args:
        path: `NAME.safetensors`.
        kind: one of NETWORKS.
        dtype: floating tensors are stored in it; None keeps theirs.
        max_shard_bytes: larger files are split into `NAME-00001-of-0000N.safetensors`.
        metadata: JSON-able facts, e.g. reference_timestep, linear_end, training.
    """
    path = Path(path)
    tensors = {k: _stored(v, dtype) for k, v in module.state_dict().items()}
    header = network_metadata(kind, cast(Any, module).config.to_dict(), metadata)
    shards = list(_shards(tensors, max_shard_bytes))
    count = len(shards)
    numbered = [path.with_stem(f"{path.stem}-{number:05d}-of-{count:05d}") for number in range(1, count + 1)]
    names = [path] if count == 1 else numbered
    write_together({name: tensors_writer(shard, header) for name, shard in zip(names, shards, strict=True)})
    for stale in set(shard_files(path)) - set(names):
        stale.unlink()
    return names


def network_metadata(kind: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a network file as safetensors stores it: JSON per entry."""
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "network": kind, "config": config, **facts}
    return {name: json.dumps(value) for name, value in header.items()}


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> Iterable[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and limit and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def shard_files(path: str | os.PathLike) -> list[Path]:
    """The files that hold the network named by `path`: itself and its shards, in order; empty if there are none."""
    path = Path(path)
    own = [path] if path.is_file() else []
    pattern = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    siblings = path.parent.iterdir() if path.parent.is_dir() else []
    return own + sorted(p for p in siblings if pattern.fullmatch(p.name))


def network_files(path: str | os.PathLike) -> list[Path]:
    """Like `shard_files`, but complete: also accepts the path of one shard.

    Raises:
        CheckpointError: no such file, or a shard is missing.
    """
    path = Path(path)
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", path.stem)
    if match:
        path = path.with_name(match[1] + path.suffix)
    files = shard_files(path)
    if not files:
        raise CheckpointError(f"There is no file {path} (nor {path.stem}-00001-of-… beside it); check the path.")
    if files[0] == path:
        return files[:1]
    expected = int(files[0].stem.rsplit("-", 1)[1])
    if len(files) != expected:
        found = f"{path.parent} holds {len(files)} of the {expected} parts of {path.name}"
        raise CheckpointError(f"{found}; copy all of them.")
    return files


def read_kind(path: str | os.PathLike) -> str | None:
    """The kind of network in a file by its metadata or, without these, a few of its keys; None for other files.

    Raises:
        CheckpointError: missing or damaged file.
    """
    with _opened(network_files(path)[0]) as handle:
        raw = handle.metadata() or {}
        return json.loads(raw["network"]) if is_own(raw) else official_kind(set(handle.keys()))


def holds_network(path: str | os.PathLike) -> bool:
    """Whether `load_network` reads this file, which exists: it is ours, or a network of the authors.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        return read_kind(path) is not None
    except CheckpointError:
        if Path(path).is_file():
            return False  # a pickle, or damaged: the reader of checkpoints says so
        raise


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a network file, decoded; of the authors' network without any, what the converter would write.

    Raises:
        CheckpointError: missing, damaged or foreign file.
    """
    file = network_files(path)[0]
    with _opened(file) as handle:
        raw = handle.metadata() or {}
        if not is_own(raw):
            return _official_network(handle, file).metadata
    metadata = {k: json.loads(v) for k, v in raw.items()}
    if metadata["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {metadata['format_version']}, this pack reads {FORMAT_VERSION}: update it."
        )
    return metadata


def facts_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What was given to `save_network` as metadata, without what it adds."""
    return {name: value for name, value in metadata.items() if name not in HEADER}


def views_of(metadata: Mapping[str, Any]) -> int | None:
    """Views that cross-view attention was trained on at once: `num_views` in our files, `trained_views` in converted
    ones; None where the file does not say."""
    return metadata.get("num_views") or metadata.get("trained_views")


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a network file under their names in the network, its shards joined, in the stored dtype."""
    tensors: dict[str, Tensor] = {}
    for file in network_files(path):
        with _opened(file) as handle:
            own = is_own(handle.metadata() or {})
            keys = {name: name for name in handle.keys()} if own else _official_network(handle, file).keys
            tensors |= {name: handle.get_tensor(stored) for name, stored in keys.items()}
    return tensors


def read_network(path: str | os.PathLike, expect: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (see `read_tensors`) and metadata of a network file.

    Args:
        expect: the kind it has to be.

    Raises:
        CheckpointError: missing, damaged or foreign file, or a network of another kind.
    """
    metadata = read_metadata(path)
    kind = metadata["network"]
    if kind not in NETWORKS:
        raise CheckpointError(f"{path} holds a network of the kind {kind}, which this pack does not have: update it.")
    if expect is not None and kind != expect:
        raise CheckpointError(
            f"{path} holds {title_of(kind)} weights, but {title_of(expect)} weights are needed here; "
            "choose another file or the loader made for it."
        )
    if "format" not in metadata:
        logging.info("%s has no metadata; by its keys it is the official %s", path, title_of(kind))
    return read_tensors(path), metadata


def load_network(path: str | os.PathLike, expect: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a network for use: float32, on the CPU, in eval mode, gradients off.

    Args:
        expect: the kind it has to be.

    Returns:
        (module, metadata)

    Raises:
        CheckpointError: as for `read_network`, or keys that do not fit the config.
    """
    tensors, metadata = read_network(path, expect)
    module = NETWORKS[metadata["network"]].build(metadata["config"])
    try:
        module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(f"The tensors of {path} do not fit its own config: {error}") from error
    return module.eval().requires_grad_(False), metadata


def is_own(raw_metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a safetensors file are those of a file of this pack."""
    return raw_metadata.get("format") == json.dumps(FORMAT)  # other programs' "format" is no JSON


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    """The file, open for reading; errors of the library become ones that name it."""
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        message = f"{file} is not a readable safetensors file ({error}); download or convert it again."
        raise CheckpointError(message) from error


def _official_network(handle: safe_open, file: Path) -> OfficialNetwork:
    """The authors' network in a file without our metadata; a CheckpointError that names what else it is."""
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    try:
        found = official_network(shapes)
    except ValueError as error:
        raise CheckpointError(f"{file} {error}.") from error
    if found is not None:
        return found
    what = known_format(shapes)
    if what == CONTROLNET:
        said = (
            ": it has the keys of an ordinary ControlNet; if it is a view ControlNet all the same, load it with the "
            "host's Load ControlNet Model, which View ControlNet takes, too."
        )
    else:
        said = f"{f': it is {what}' if what else f' (its metadata lacks format={FORMAT})'}; {way_to_get()}."
    raise CheckpointError(f"{file} was not written by DiffPortrait3D{said}")
