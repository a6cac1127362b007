"""Batches of views in the host's forms (LATENT, IMAGE) and as cameras: some of the views, and whole again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import comfy.utils
import torch
from torch import Tensor

from ..diffportrait3d.cameras.view_choice import left_over
from .noise import view_indices

JOIN = "Join Views"


def count_views(node: str, **batches: dict | Tensor | None) -> int:
    """How many views the connected batches have: LATENTs, IMAGEs [V, H, W, C] or cameras {"labels": [V, 25]}.

    Raises:
        ValueError: none is connected, or they have different counts or no views.
    """
    counts = {name: len(_entries(batch)) for name, batch in batches.items() if batch is not None}
    if not counts:
        raise ValueError(f"{node}: nothing is connected; connect {', '.join(batches)}, at least one of them.")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(f"{node}: {found} views; connect batches of the same views, or leave one out.")
    [count] = set(counts.values())
    if count == 0:
        raise ValueError(f"{node}: {' and '.join(counts)} hold no views; connect at least one view.")
    return count


def _entries(batch: dict | Tensor) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    return batch["labels"] if "labels" in batch else batch["samples"]


def select_latent(latent: dict, numbers: list[int]) -> dict:
    """Views of a LATENT, with their parts of its noise mask, and the numbers to which their noise belongs."""
    indices = view_indices(latent)
    chosen = {**latent, "samples": latent["samples"][numbers], "batch_index": [indices[i] for i in numbers]}
    if latent.get("noise_mask") is not None:
        chosen["noise_mask"] = _masks(latent)[numbers]
    return chosen


def latent_to_redo(latent: dict, numbers: list[int]) -> dict:
    """The whole LATENT with a noise mask under which a sampler changes the chosen views only."""
    masks = _masks(latent).clone()
    masks[left_over(numbers, len(masks))] = 0.0
    return {**latent, "noise_mask": masks}


def _masks(latent: dict) -> Tensor:
    """The noise mask of every view [V, 1, h, w]; ones where there is none. As the host does it, few are repeated."""
    samples, masks = latent["samples"], latent.get("noise_mask")
    if masks is None:
        return torch.ones(len(samples), 1, *samples.shape[-2:], device=samples.device)
    masks = masks.reshape(-1, 1, *masks.shape[-2:])
    return masks.repeat(math.ceil(len(samples) / len(masks)), 1, 1, 1)[: len(samples)]


@dataclass(frozen=True)
class Selection:
    """Which views of a batch of `total`: their numbers, in the order in which they were chosen.

    It puts them back among the others. Both sides may be just their views, or a whole batch, of which the views in
    question are taken.
    """

    numbers: tuple[int, ...]
    total: int

    @property
    def others(self) -> list[int]:
        return left_over(list(self.numbers), self.total)

    def join(self, name: str, chosen: Tensor, others: Tensor) -> Tensor:
        """[n or V, ...] and [V - n or V, ...] -> [V, ...], in the order of the whole batch; the others are not changed
        in any bit.

        Raises:
            ValueError: other counts, or views of different sizes.
        """
        chosen = self._of(name, chosen, list(self.numbers), "the selected views")
        others = self._of(f"{name}_rest", others, self.others, "the views left over")
        if chosen.shape[1:] != others.shape[1:]:
            raise ValueError(
                f"{JOIN}: {name} are of shape {tuple(chosen.shape[1:])} and {name}_rest of "
                f"{tuple(others.shape[1:])}; make both of one size."
            )
        joined = others.new_empty(self.total, *others.shape[1:])
        joined[self.others] = others
        joined[list(self.numbers)] = chosen.to(joined)
        return joined

    def join_latents(self, chosen: dict, others: dict) -> dict:
        """LATENTs -> LATENT with the noise mask and the batch index of the whole, as far as the parts have them."""
        joined = {**others, "samples": self.join("latent", chosen["samples"], others["samples"])}
        joined["batch_index"] = self._indices(chosen, others)
        if joined["batch_index"] == list(range(self.total)):
            del joined["batch_index"]  # what the host takes for granted
        if chosen.get("noise_mask") is not None or others.get("noise_mask") is not None:
            masks, rest = _masks(chosen), _masks(others)
            height, width = rest.shape[-2:]
            masks = comfy.utils.common_upscale(masks, width, height, "bilinear", "disabled")
            joined["noise_mask"] = self.join("latent", masks, rest)
        return joined

    def _of(self, name: str, batch: Tensor, numbers: list[int], meant: str) -> Tensor:
        if len(batch) == len(numbers):
            return batch
        if len(batch) == self.total:
            return batch[numbers]
        whole = f"the whole batch ({self.total})"
        raise ValueError(f"{JOIN}: {name} has {len(batch)} views; give {meant} ({len(numbers)}) or {whole}.")

    def _indices(self, chosen: dict, others: dict) -> list[int]:
        """The numbers to which the noise of every view belongs."""
        sides = []
        for latent, numbers in ((chosen, self.numbers), (others, self.others)):
            own = numbers if len(latent["samples"]) == len(numbers) else range(self.total)
            sides.append(torch.tensor(latent.get("batch_index") or own, dtype=torch.int64))
        return self.join("batch_index", *sides).tolist()
