"""Which view a tensor is: the host hands a SAMPLER noise and latents alone.

Step noise belongs to a view's number and to the run's seed. A SAMPLER sees neither the LATENT's batch_index nor, where
a run continues another one without noise (DisableNoise), the seed of the part before. Both are found by the tensors'
values:

- noise of 3D-Aware Noise: its numbers are noted when it is drawn;
- noise of the host (RandomNoise): drawn again from the seed and compared;
- latents in which a part of a run has ended: seed and number of each view are noted.

The notes are in this process only, the latest of them; latents that were changed or loaded in another session count as
unknown: their views are numbered from 0.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HOST_DRAWS = 1024  # numbers up to which the host's noise is looked for
TOLERANCE = 1e-2  # noise may have been kept in half precision meanwhile


class View(NamedTuple):
    """What a view's step noise is drawn from."""

    seed: int
    number: int


class Notes:
    """Values by the content of a tensor; the oldest of more than `limit` are forgotten."""

    def __init__(self, limit: int):
        self._limit = limit
        self._values: OrderedDict[bytes, object] = OrderedDict()

    def __setitem__(self, tensor: Tensor, value) -> None:
        key = _fingerprint(tensor)
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._limit:
            self._values.popitem(last=False)

    def get(self, tensor: Tensor):
        return self._values.get(_fingerprint(tensor))


_noises = Notes(64)  # noise of a whole batch [V, C, h, w] -> numbers of its views
_ends = Notes(4096)  # latent of a view [C, h, w] between two parts of a run -> View


def _fingerprint(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.float().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()


def note_noise(noise: Tensor, numbers: Sequence[int]) -> None:
    """Notes whose noise [V, C, h, w] is."""
    _noises[noise] = list(numbers)


def note_end(model, samples: Tensor, views: Sequence[View]) -> None:
    """Notes the views in whose latents [V, C, h, w] (as the sampler has them) a part of a run has ended."""
    latents = model.process_latent_in(model.process_latent_out(samples.float()))  # rounded as on their way to the next
    for latent, view in zip(latents, views, strict=True):
        _ends[latent] = view


def views_of_run(noise: Tensor, latents: Tensor, seed: int, numbers: Sequence[int] | None = None) -> list[View]:
    """Seed and number of every view of a run.

    Args:
        noise, latents: as a SAMPLER gets them [V, C, h, w].
        seed: of the run's NOISE; 0 with DisableNoise, where a seed that was noted takes its place.
        numbers: of the views, where they are known.
    """
    count = len(noise)
    if noise.any():
        numbers = numbers or _noises.get(noise) or _numbers_of_host(noise, seed) or range(count)
        return [View(seed, number) for number in numbers]
    found = [_ends.get(latent) or View(seed, place) for place, latent in enumerate(latents)]
    return [View(seed or view.seed, numbers[i] if numbers else view.number) for i, view in enumerate(found)]


def _numbers_of_host(noise: Tensor, seed: int) -> list[int] | None:
    """Numbers with which the host's `prepare_noise` draws this noise [V, C, h, w] from a seed, or None."""
    noise = noise.float().cpu()
    if torch.allclose(noise, torch.randn(noise.shape, generator=_generator(seed)), atol=TOLERANCE):
        return list(range(len(noise)))
    generator, numbers = _generator(seed), [None] * len(noise)
    for number in range(HOST_DRAWS):
        drawn = torch.randn(1, *noise.shape[1:], generator=generator)
        for place in range(len(noise)):
            if numbers[place] is None and torch.allclose(noise[place], drawn[0], atol=TOLERANCE):
                numbers[place] = number
        if None not in numbers:
            return numbers
    return None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
