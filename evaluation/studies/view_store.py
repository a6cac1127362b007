"""Generated views kept on disk by what made them, so that they are generated once and measured as often as one likes.

    STORE/<kind>-<key>/conditions.json          weights, variant, sampling: what the key is made of
    STORE/<kind>-<key>/<person>-<inputs>.png    the person's views side by side, 8 bits

Commands that ask for the same variant under the same conditions share the file, whatever they call it. Every file is
written whole or not at all; one that cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from diffportrait3d.files import write_atomically, write_text
from diffportrait3d.images import as_pixels, sheet
from diffportrait3d.pipeline import Sampling

from ..subjects.dataset import Subject, json_digest, rounded
from ..subjects.variants import Variant
from .generator import ViewGenerator

VERSION = 1  # of what generation does with its conditions: another number finds no views of the former


@dataclass(frozen=True)
class StoredViews:
    """Views [V, 3, H, W] in [0, 1], multiples of 1/255, and the seconds that making them took."""

    images: Tensor
    seconds: float


class ViewStore:
    """A folder of views of one generator under one sampling.

    Args:
        root: of the store; other generators and samplings may share it.
    """

    def __init__(self, root: Path, generator: ViewGenerator, sampling: Sampling):
        self.root, self.generator, self.sampling = root, generator, sampling

    def variant_conditions(self, variant: Variant, views: int) -> dict:
        """Everything, besides a person's inputs, that the views of a variant depend on."""
        pipeline = self.generator.pipeline
        precision = self.generator.precision
        return ({} if precision == "float32" else {"precision": precision}) | {
            "version": VERSION,
            "weights_sha256": self.generator.hashes_for(variant),
            "resolution": pipeline.resolution,
            "linear_end": pipeline.schedule.linear_end,
            "reference_timestep": pipeline.denoiser.reference_timestep,
            "views": views,
            "arm": variant.changes(),
            "sampling": sampling_facts(variant.sampling(self.sampling)),
        }

    def network_conditions(self, name: str, views: int) -> dict:
        """The same for views that one network makes."""
        file = f"{name}.safetensors"
        return {"version": VERSION, "weights_sha256": {file: self.generator.hashes[file]}, "views": views}

    def folder(self, kind: str, conditions: dict) -> Path:
        """Where views of these conditions are kept."""
        return self.root / f"{kind}-{json_digest(conditions)[:12]}"

    def views(
        self, kind: str, conditions: dict, people: list[tuple[str, dict]], make: Callable[[list[int]], list[Tensor]]
    ) -> list[StoredViews]:
        """The views of people; `make` is given the numbers of those whose views are not there.

        kind: how the folder is called. people: of each the name, and what the networks are given for it.
        """
        folder = self.folder(kind, conditions)
        paths = [folder / f"{name}-{json_digest(inputs)[:12]}.png" for name, inputs in people]
        found = {number: views for number, path in enumerate(paths) if (views := _read(path)) is not None}
        if missing := [number for number in range(len(paths)) if number not in found]:
            start = time.perf_counter()
            made = make(missing)
            seconds = round((time.perf_counter() - start) / len(missing), 3)
            text = json.dumps(conditions, indent=1, sort_keys=True) + "\n"
            write_text(folder / "conditions.json", text, durable=False)
            for number, images in zip(missing, made, strict=True):
                found[number] = StoredViews(rounded(images.float()), seconds)
                _write(paths[number], found[number])
        return [found[number] for number in range(len(paths))]


class SubjectViews:
    """The views of one subject, each generated when it is first asked for.

    Args:
        seed: of the subject's noise, the same in every variant.
    """

    def __init__(self, store: ViewStore, subject: Subject, seed: int):
        self.store, self.subject, self.seed = store, subject, seed

    @cached_property
    def proxies(self) -> Tensor:
        """S's views, [V, 3, H, W] in [0, 1], not rounded: start noise is made of them."""
        return self.store.generator.proxies(self.subject)

    def variant(self, variant: Variant) -> StoredViews:
        """The views of a variant."""
        return variant_views([self], variant)[0]

    def autoencoder(self) -> StoredViews:
        """The ground truth through the autoencoder and back: the best the system could do."""
        images = self.subject.images
        inputs = {"images": _tensor_digest(images)}
        return self._network("autoencoder", "autoencoder", inputs, lambda: self.store.generator.reconstruct(images))

    def proxy(self) -> StoredViews:
        """S alone."""
        inputs = {"labels": _tensor_digest(self.subject.labels)} | _portrait(self.subject)
        return self._network("proxy", "novel_view", inputs, lambda: self.proxies)

    def _network(self, kind: str, name: str, inputs: dict, make: Callable[[], Tensor]) -> StoredViews:
        conditions = self.store.network_conditions(name, len(self.subject.labels))
        return self.store.views(kind, conditions, [(self.subject.id, inputs)], lambda _: [make()])[0]


def variant_views(people: Sequence[SubjectViews], variant: Variant) -> list[StoredViews]:
    """The views of a variant of several people; those that are missing are made in the same calls of the networks."""
    store, sampling = people[0].store, variant.sampling(people[0].store.sampling)
    conditions = store.variant_conditions(variant, len(people[0].subject.labels))
    given = [(person.subject.id, variant_inputs(variant, person.subject, person.seed)) for person in people]

    def make(missing: list[int]) -> list[Tensor]:
        chosen = [(people[k].subject, people[k].proxies, people[k].seed) for k in missing]
        return store.generator.generate(variant, chosen, store.sampling)

    return store.views(f"{sampling.solver}-{sampling.steps}", conditions, given, make)


def sampling_facts(sampling: Sampling) -> dict:
    """What the views depend on: without an eta that the solver lacks, and without shortcuts that are not taken."""
    facts = {name: getattr(sampling, name) for name in ("solver", "steps", "guidance")}
    if sampling.solver == "ddim":
        facts["eta"] = sampling.eta
    taken = {name: getattr(sampling, name) for name in ("guided", "posed", "reference_timestep")}
    return facts | {name: value for name, value in taken.items() if value != getattr(Sampling, name)}


def variant_inputs(variant: Variant, subject: Subject, seed: int) -> dict:
    """Everything that the networks of a variant are given for a subject; any difference makes other views."""
    facts = {"seed": seed, "labels": _tensor_digest(subject.labels)} | _portrait(subject)
    if variant.encoder != "none":
        images = subject.reference if variant.person == "own" else subject.other_reference
        facts["reference"] = _tensor_digest(images[: variant.references])
    if variant.condition != "none":
        shown = subject.conditions if variant.condition == "given" else subject.other_conditions
        facts["conditions"] = _tensor_digest(shown)
    if variant.start == "truth":
        facts["truth"] = _tensor_digest(subject.images)
    return facts


def _portrait(subject: Subject) -> dict:
    """What S is given."""
    return {
        "portrait": _tensor_digest(subject.reference[:1]),
        "portrait_label": _tensor_digest(subject.reference_label[:1]),
    }


def _tensor_digest(values: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    digest.update(values.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, views: StoredViews) -> None:
    facts = PngImagePlugin.PngInfo()
    facts.add_text("views", str(len(views.images)))
    facts.add_text("seconds", str(views.seconds))
    strip = Image.fromarray(as_pixels(sheet([views.images])))
    write_atomically(path, lambda file: strip.save(file, format="PNG", pnginfo=facts), durable=False)


def _read(path: Path) -> StoredViews | None:
    """None if there is no such file, or it is damaged."""
    try:
        with Image.open(path) as strip:
            count, seconds = int(strip.text["views"]), float(strip.text["seconds"])
            pixels = np.asarray(strip.convert("RGB"), dtype=np.float32) / 255  # [H, V * W, 3]
    except (OSError, SyntaxError, KeyError, ValueError, AttributeError):  # what Pillow raises for damaged files
        return None
    height, width, _ = pixels.shape
    views = torch.from_numpy(pixels).reshape(height, count, width // count, 3).permute(1, 3, 0, 2)
    return StoredViews(views.contiguous(), seconds)
