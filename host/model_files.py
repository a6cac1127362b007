"""Where the host finds our weight files, and which of them hold which network.

Searched: models/diffportrait3d (and what extra_model_paths.yaml adds under that name), then the pack's own weights/;
view ControlNets also in models/controlnet. A file is known by its metadata or, if another tool cut it out of the
authors' checkpoint, by its keys; never by its name. Only safetensors files are listed: no pickle is read at run time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import folder_paths

from ..diffportrait3d.files import folders_below
from ..diffportrait3d.networks import title_of
from ..diffportrait3d.weights.files import CheckpointError, network_files, read_kind, shard_files, way_to_get

FOLDER = "diffportrait3d"
SUFFIX = ".safetensors"
PORTRAIT = "portrait.png"
PACK = Path(__file__).resolve().parents[1]
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


def register_folders() -> None:
    """Makes `diffportrait3d` a model folder of the host; the pack's weights/ comes last."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    folder_paths.add_model_folder_path(FOLDER, str(PACK / "weights"))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {SUFFIX})


def network_names(kind: str) -> list[str]:
    """Names (relative paths, shards as one) of the files that hold a network of `kind`, for a node's list."""
    return sorted(name for name, path in _known_files(kind).items() if _kind_of(path) == kind)


def check_name(name: str | None, kind: str, names: list[str]) -> bool | str:
    """For a node's `validate_inputs`: True, or one sentence for a name that is not among `names`. None, a name that
    comes by a link, passes: the node asks again when it runs."""
    return name is None or name in names or explain_missing(name if isinstance(name, str) else str(name), kind, names)


def explain_missing(name: str, kind: str, names: list[str]) -> str:
    """One sentence for a name that is not among `names`: there is no such file, or what the file holds instead."""
    path = _known_files(kind).get(name)
    if path is not None:
        return f"{name!r} is no {title_of(kind)}: {_contents(path)}; choose one of {', '.join(names) or 'none'}"
    found = f"found: {', '.join(names)}" if names else "found none"
    searched = ", ".join(_folders(kind))
    return (
        f"there is no {title_of(kind)} {name!r} ({found}); put its file into models/{FOLDER} and press R, or "
        f"{way_to_get(kind)}. Searched: {searched}"
    )


def network_path(name: str, kind: str) -> Path:
    """The file behind a name.

    Raises:
        CheckpointError: no folder has it; the message lists the folders.
    """
    for folder in _folders(kind):
        path = Path(folder) / name
        if shard_files(path):
            return path
    raise CheckpointError(explain_missing(name, kind, network_names(kind)))


def miniature_names() -> list[str]:
    """Folders that hold a base UNet and an autoencoder, for Load Miniature."""
    holding = [{str(Path(name).parent) for name in network_names(kind)} for kind in ("unet", "autoencoder")]
    return sorted(set.intersection(*holding))


def miniature_path(folder: str, kind: str) -> Path:
    """The file of `kind` in a folder from `miniature_names`."""
    for name in network_names(kind):
        if str(Path(name).parent) == folder:
            return network_path(name, kind)
    raise CheckpointError(explain_missing(folder, kind, miniature_names()))


def miniature_portrait(folder: str) -> Path:
    """Path of the portrait beside the networks of a folder from `miniature_names`; it may not exist."""
    return miniature_path(folder, "unet").parent / PORTRAIT


def fingerprint(paths: Iterable[Path]) -> str:
    """Changes when one of the files does, so that retrained weights are loaded again."""
    files = [file for path in paths for file in network_files(path)]
    return "|".join(f"{file}:{file.stat().st_mtime_ns}" for file in files)


def _folders(kind: str) -> list[str]:
    names = [FOLDER, "controlnet"] if kind == "view_controlnet" else [FOLDER]
    return [folder for name in names for folder in folder_paths.get_folder_paths(name)]


def _known_files(kind: str) -> dict[str, Path]:
    """Every safetensors file in the folders of `kind`; of equal names the first folder's counts."""
    known: dict[str, Path] = {}
    for folder in _folders(kind):
        for below, files in folders_below(folder, enter=lambda name: name != ".git"):
            for name in (str(Path(below, file)) for file in files if file.endswith(SUFFIX)):
                known.setdefault(_SHARD.sub("", name), Path(folder) / name)
    return known


def _contents(path: Path) -> str:
    try:
        kind = read_kind(path)
    except (CheckpointError, OSError, ValueError) as error:
        return str(error)
    return f"the file holds {'weights of other software' if kind is None else title_of(kind) + ' weights'}"


def _kind_of(path: Path) -> str | None:
    try:
        return _read_kind(path, path.stat().st_mtime_ns)
    except (CheckpointError, OSError, ValueError):
        return None  # not ours, or a shard is missing: another loader's business


@lru_cache(maxsize=1024)
def _read_kind(path: Path, modified: int) -> str | None:
    return read_kind(path)
