"""Multi-view portrait datasets: reading, mirroring, resumable samplers, cached latents.

A dataset is a folder with `manifest.jsonl`: a header line, then one line per subject with its views; every view has
an image, a camera-condition image of another identity at the same camera, and a 25-number camera label (see
`training.render`, which writes this format). Small sets live in memory as uint8. In version 2 the training people are
in shards, and share their conditions (`.shards`).

Every sampler is a function of (seed, batch number): its position is one integer, so a run resumes at any batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from diffportrait3d.cameras.labels import camera_angles
from diffportrait3d.images import ImageError, NoteLog, read_image, save_image, sheet
from diffportrait3d.weights.safetensors_writer import write_tensors

from .shards import read_bank, read_tensors

FORMAT, VERSION, SHARDED = "diffportrait3d-multiview", 1, 2
SPLITS = ("train", "val", "test")
# Rendered people by their first seed: no split shows those of another, and conditions show nobody's portrait.
FIRST_SEED = {"train": 0, "val": 1_000_000, "test": 2_000_000}
FIRST_CONDITION = {"train": 3_000_000, "val": 4_000_000, "test": 4_000_000}
MADE_AGAIN = "run the command that made the data set (training.render, training.import_data): it makes what is missing"


class DataError(ValueError):
    """A dataset that cannot be used; the message names the file and the way out."""


def read_manifest(root: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and subjects of `root/manifest.jsonl`."""
    path = Path(root) / "manifest.jsonl"
    if not path.is_file():
        raise DataError(f"No dataset at '{path}'; render one with 'python -m training.render --out {root}'.")
    try:
        header, *subjects = map(json.loads, filter(str.strip, path.read_text(encoding="utf-8").splitlines()))
        if other := [entry for entry in (header, *subjects) if not isinstance(entry, dict)]:
            raise ValueError(f"{json.dumps(other[0])[:20]} is no object")
    except ValueError as error:
        raise DataError(f"'{path}' is damaged ({error}); {MADE_AGAIN}.") from None
    if header.get("format") != FORMAT or header.get("version") not in (VERSION, SHARDED):
        raise DataError(
            f"'{path}' has format {header.get('format')!r} version {header.get('version')!r}, "
            f"expected {FORMAT!r} version {VERSION} or {SHARDED}."
        )
    return header, subjects


class ImageFiles:
    """Images that stay on disk: indexed by rows like a tensor uint8 [N, 3, H, W]."""

    device = torch.device("cpu")

    def __init__(self, paths: list[Path], resolution: int):
        self.paths, self.resolution, self._report = paths, resolution, NoteLog()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            read = list(pool.map(lambda row: self._read(self.paths[row]), numbers))
        return torch.from_numpy(np.stack(read)).contiguous()  # the layout of a store in memory, so the same bits

    def _read(self, path: Path) -> np.ndarray:
        try:
            pixels = self._report(path, read_image(path)).as_bytes()  # [H, W, 3]
        except ImageError as error:
            raise DataError(
                f"Image '{path}' named in the manifest cannot be read ({error.reason}); delete it, then {MADE_AGAIN}."
            ) from None
        if pixels.shape[:2] != (self.resolution, self.resolution):
            raise DataError(
                f"Image '{path}' is {pixels.shape[1]}x{pixels.shape[0]}, the manifest says "
                f"{self.resolution}x{self.resolution}."
            )
        return pixels.transpose(2, 0, 1)


class MultiViewDataset:
    """One split of a dataset. Images are read when first asked for and then stay in memory, on `device`; or they
    are read whenever they are asked for, if not `in_memory`.

    Attributes:
        images: uint8 [N, 3, H, W] (or `ImageFiles`, indexed in the same way, as is a `ConditionBank`), all views of all
            subjects, a subject's views in a row.
        conditions: uint8 [N, 3, H, W], the camera conditions of these views.
        labels: float32 [N, 25] camera labels.
        subjects: list of int64 arrays, the rows of every subject.
        ids: the subjects' names, in the same order.
        resolution: H = W in pixels.
        fingerprint: hash of the split's manifest lines.
    """

    def __init__(self, root: str | Path, split: str, device: torch.device | str = "cpu", in_memory: bool = True):
        root, self.device, self.in_memory = Path(root), device, in_memory
        header, subjects = read_manifest(root)
        chosen = [s for s in subjects if s["split"] == split]
        if not chosen:
            raise DataError(
                f"'{root}' has no subjects in split '{split}' (it has {sorted({s['split'] for s in subjects})})."
            )
        self.root, self.split, self.resolution = root, split, int(header["resolution"])
        self.fingerprint = hashlib.sha256(json.dumps([header, chosen], sort_keys=True).encode()).hexdigest()
        views = [view for subject in chosen for view in subject["views"]]
        self.ids = [s["id"] for s in chosen]
        ends = np.cumsum([len(s["views"]) for s in chosen])
        self.subjects = [np.arange(end - len(s["views"]), end) for s, end in zip(chosen, ends, strict=True)]
        self.labels = torch.tensor([v["label"] for v in views], dtype=torch.float32)  # [N, 25]
        if self.labels.shape[1:] != (25,):
            raise DataError(f"Labels in '{root}' must have 25 numbers, got {tuple(self.labels.shape[1:])}.")
        self._views = views
        self._shards = list(dict.fromkeys(s["shard"] for s in chosen if "shard" in s))
        if self._shards and not in_memory:
            raise DataError(f"'{root}' holds shards, which are read at once: data.in_memory=false does not fit them.")
        # A file that is missing should be known now, not hours later when its stage begins.
        for name in self._shards or [view[kind] for view in views for kind in ("image", "condition")]:
            if not (root / name).is_file():
                raise DataError(f"'{root / name}' is named in the manifest but is not there; {MADE_AGAIN}.")

    @cached_property
    def images(self) -> Tensor:
        if self._shards:
            parts = [read_tensors(self.root / shard, "images")[0] for shard in self._shards]
            return torch.cat(parts).to(self.device)
        return self._load("image")

    @cached_property
    def conditions(self) -> Tensor:
        if self._shards:
            rows = torch.tensor([view["condition_row"] for view in self._views])
            return read_bank(self.root, rows, self.resolution).to(self.device)
        return self._load("condition")

    def _load(self, kind: str) -> Tensor | ImageFiles:
        files = ImageFiles([self.root / view[kind] for view in self._views], self.resolution)
        if not self.in_memory:
            return files
        out, what = torch.empty(len(files), 3, *2 * [self.resolution], dtype=torch.uint8), f"{self.split} {kind}s"
        for rows in tqdm(torch.arange(len(files)).split(64), desc=what, mininterval=5, leave=False):
            out[rows] = files[rows]
        return out.to(self.device)

    def __len__(self) -> int:
        return len(self._views)


def mirror_label(label: Tensor) -> Tensor:
    """Camera label [..., 25] of the mirrored image: world and camera x are negated together.

    Of cam2world the entries [0,1], [0,2], [1,0], [2,0] and [0,3] change sign; of the intrinsics the skew, and the
    principal point moves to 1 - cx.
    """
    out = label.clone()
    for row, column in ((0, 1), (0, 2), (1, 0), (2, 0), (0, 3)):
        out[..., 4 * row + column] *= -1
    out[..., 17] *= -1
    out[..., 18] = 1 - out[..., 18]
    return out


def to_network(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [N, 3, H, W] to float32 in [-1, 1]."""
    return pixels.to(device).float().div_(127.5).sub_(1.0)


def save_sheet(path: Path, rows: Sequence[Tensor]) -> None:
    """Write rows of images [n, 3, H, W] in [-1, 1] as one PNG; short rows end in grey."""
    save_image(path, sheet([(row.detach().float().cpu() + 1) / 2 for row in rows]))


def send(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; the host goes on while it is copied there."""
    tensor = torch.as_tensor(values)
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pick(pixels: Tensor, rows: np.ndarray, flips: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Rows of a uint8 image store [M, 3, H, W], mirrored where `flips` says, as float32 [N, 3, H, W] in [-1, 1]."""
    images = to_network(send(pixels[send(rows, pixels.device)], device), device)
    return torch.where(send(flips, device)[:, None, None, None], images.flip(-1), images)


def pick_labels(labels: Tensor, rows: np.ndarray, flips: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Rows of labels [M, 25], mirrored where `flips` says: [N, 25]."""
    chosen = labels[torch.from_numpy(rows)]
    return send(torch.where(torch.from_numpy(flips)[:, None], mirror_label(chosen), chosen), device)


@dataclass
class Batch:
    """Row numbers into a dataset.

    Attributes:
        targets: int64 [B], or [B, V] for groups of views.
        references: int64 [B], another view of each subject (None where not drawn).
        flips: bool [B], mirror this sample.
    """

    targets: np.ndarray
    references: np.ndarray | None
    flips: np.ndarray

    def __len__(self) -> int:
        return int(self.targets.size)

    def part(self, rank: int, count: int) -> Batch:
        """The share of process `rank` of `count`: whole groups, the first processes may have one more.

        Raises:
            DataError: a process would have none.
        """
        if len(self.flips) < count:
            raise DataError(
                f"loop.batch_size={len(self.flips)} cannot be divided among {count} processes: start fewer of them, "
                "or raise it."
            )
        mine = np.array_split(np.arange(len(self.flips)), count)[rank]
        references = None if self.references is None else self.references[mine]
        return Batch(self.targets[mine], references, self.flips[mine])

    @property
    def target_flips(self) -> np.ndarray:
        """Mirroring of every target, flat: bool [B] or [B*V]."""
        return np.repeat(self.flips, self.targets.size // len(self.flips))


class Sampler:
    """Endless batches whose content depends on (seed, batch number) alone.

    Items (images, or subjects for pairs and groups) are visited in a fresh random order every epoch; a batch may
    straddle two epochs. Every subclass draws the rest from the batch's own generator.
    """

    def __init__(self, count: int, batch_size: int, seed: int, flip: bool):
        self.count, self.batch_size, self.seed, self.flip, self.position = count, batch_size, seed, flip, 0
        self._epoch: tuple[int, np.ndarray] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.position = state["seed"], state["position"]
        self._epoch = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.position * self.batch_size
        items = np.array([self._item(first + k) for k in range(self.batch_size)])
        rng = np.random.default_rng((self.seed, 1, self.position))
        self.position += 1
        flips = rng.random(self.batch_size) < 0.5 if self.flip else np.zeros(self.batch_size, bool)
        return self.draw(items, flips, rng)

    def _item(self, index: int) -> int:
        epoch, offset = divmod(index, self.count)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(self.count)
        return int(self._epoch[1][offset])

    def draw(self, items: np.ndarray, flips: np.ndarray, rng: np.random.Generator) -> Batch:
        raise NotImplementedError


class SingleImages(Sampler):
    """Single images: `targets` [B]."""

    def __init__(self, dataset: MultiViewDataset, batch_size: int, seed: int = 0, flip: bool = True):
        super().__init__(len(dataset), batch_size, seed, flip)

    def draw(self, items: np.ndarray, flips: np.ndarray, rng: np.random.Generator) -> Batch:
        return Batch(items, None, flips)


class ViewGroups(Sampler):
    """A reference and `views` other views of one subject in random order: `targets` [B, V], `references` [B].

    With `views` None the targets are [B]: pairs of two views. `ordered` sorts the targets by yaw, as a camera that
    passes by sees them (an ablation).
    """

    def __init__(
        self,
        dataset: MultiViewDataset,
        batch_size: int,
        views: int | None = None,
        seed: int = 0,
        flip: bool = True,
        ordered: bool = False,
    ):
        self.views = views
        self.yaws = camera_angles(dataset.labels).yaw.numpy() if ordered else None  # [N]
        need = (views or 1) + 1
        self.rows = [rows for rows in dataset.subjects if len(rows) >= need]
        if not self.rows:
            raise DataError(
                f"No subject of split '{dataset.split}' in '{dataset.root}' has the {need} views that one sample "
                f"needs; render more views per subject."
            )
        super().__init__(len(self.rows), batch_size, seed, flip)

    def draw(self, items: np.ndarray, flips: np.ndarray, rng: np.random.Generator) -> Batch:
        chosen = np.stack([rng.permutation(self.rows[item])[: (self.views or 1) + 1] for item in items])  # [B, V + 1]
        references, targets = chosen[:, 0], chosen[:, 1:]
        if self.yaws is not None:
            yaws = self.yaws[targets] * np.where(flips, -1, 1)[:, None]  # mirrored views come the other way round
            targets = np.take_along_axis(targets, yaws.argsort(1), 1)
        return Batch(targets if self.views else targets[:, 0], references, flips)


def fixed_groups(dataset: MultiViewDataset, count: int, views: int) -> Batch:
    """Groups for validation, always the same: evenly spaced subjects, reference = the most frontal view, targets =
    `views` of the others evenly spread over the rest in the dataset's order. targets [B, V], not mirrored."""
    usable = [rows for rows in dataset.subjects if len(rows) >= 2]
    if not usable:
        raise DataError(f"No subject of split '{dataset.split}' in '{dataset.root}' has two views.")
    chosen = [usable[i] for i in np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int)]
    targets, references = [], []
    for rows in chosen:
        frontal = dataset.labels[torch.from_numpy(rows), 11].argmax().item()  # camera z is largest in front
        others = np.delete(rows, frontal)
        references.append(rows[frontal])
        targets.append(others[np.linspace(0, len(others) - 1, views).round().astype(int)])
    return Batch(np.stack(targets), np.array(references), np.zeros(len(chosen), bool))


def encoder_hash(autoencoder: nn.Module) -> str:
    """sha256 over the tensors of an autoencoder that its latents depend on, names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(autoencoder.state_dict().items()):
        if not name.startswith(("encoder.", "quant_conv.")):
            continue
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_latents(
    dataset: MultiViewDataset, autoencoder: nn.Module, folder: str | Path, batch_size: int = 32
) -> Tensor:
    """Scaled latents of every image of a split and of its mirror image, [2, N, 4, h, w] float32 on the CPU.

    Read from `folder`, or encoded and written there. The file's name and metadata hold the hashes of encoder and split:
    another of either is another file.
    """
    key = hashlib.sha256((encoder_hash(autoencoder) + dataset.fingerprint).encode()).hexdigest()
    path = Path(folder) / f"latents-{dataset.split}-{key[:12]}.safetensors"
    values = _read_latents(path, key) if path.is_file() else None
    if values is None:
        values = encode_all(dataset.images, autoencoder, batch_size, f"{dataset.split} latents")
        write_tensors(path, {"latents": values}, {"key": key, "crc32": _checksum(values)})
    return values


def pick_latents(latents: Tensor, rows: np.ndarray, flips: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Rows of latents [2, M, 4, h, w], of the mirror image where `flips` says: [N, 4, h, w]."""
    sides, places = (send(index, latents.device) for index in (flips.astype(np.int64), rows))
    return send(latents[sides, places], device)


def _read_latents(path: Path, key: str) -> Tensor | None:
    """What an earlier run has encoded; None, after a message, if the file is damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata, values = file.metadata() or {}, file.get_tensor("latents")
    except (SafetensorError, OSError):
        metadata, values = {}, None
    if metadata.get("key") == key and metadata.get("crc32") == _checksum(values):
        return values
    print(f"'{path}' is damaged or of an older version; the latents are encoded again.", file=sys.stderr)
    return None


def _checksum(values: Tensor) -> str:
    return f"{zlib.crc32(values.numpy()):08x}"


@torch.no_grad()
def encode_all(images: Tensor, autoencoder: nn.Module, batch_size: int, what: str) -> Tensor:
    """Latents of all images and of their mirror images, [2, N, 4, h, w] float32 on the CPU."""
    device = next(autoencoder.parameters()).device
    parts: list[list[Tensor]] = [[], []]
    for start in tqdm(range(0, len(images), batch_size), desc=what, mininterval=5, leave=False):
        x = to_network(images[start : start + batch_size], device)
        for side, image in enumerate((x, x.flip(-1))):
            parts[side].append(autoencoder.encode(image).float().cpu())
    return torch.stack([torch.cat(side) for side in parts])
