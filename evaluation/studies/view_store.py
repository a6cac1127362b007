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

    def load_or_make(
        self, kind: str, conditions: dict, name: str, inputs: dict, make: Callable[[], Tensor]
    ) -> StoredViews:
        """The views of a person. `inputs`: what the networks are given for it; `make` is called if they are not there.

        kind, name: how folder and file are called.
        """
        path = self.path(kind, conditions, name, inputs)
        if (found := _read(path)) is not None:
            return found
        start = time.perf_counter()
        images = make()
        return self.keep(path, conditions, images, time.perf_counter() - start)

    def path(self, kind: str, conditions: dict, name: str, inputs: dict) -> Path:
        """Where the views of a person are kept."""
        return self.folder(kind, conditions) / f"{name}-{json_digest(inputs)[:12]}.png"

    def keep(self, path: Path, conditions: dict, images: Tensor, seconds: float) -> StoredViews:
        """Views that have been made, as they will be read."""
        text = json.dumps(conditions, indent=1, sort_keys=True) + "\n"
        write_text(path.with_name("conditions.json"), text, durable=False)
        views = StoredViews(rounded(images.float()), round(seconds, 3))
        _write(path, views)
        return views


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
        store = self.store

        def make() -> Tensor:
            return store.generator.generate(variant, self.subject, self.proxies, self.seed, store.sampling)

        return store.load_or_make(*self.place(variant), make)

    def place(self, variant: Variant) -> tuple[str, dict, str, dict]:
        """Kind, conditions, name and inputs of a variant's views in the store."""
        store, subject = self.store, self.subject
        sampling = variant.sampling(store.sampling)
        conditions = store.variant_conditions(variant, len(subject.labels))
        kind = f"{sampling.solver}-{sampling.steps}"
        return kind, conditions, subject.id, variant_inputs(variant, subject, self.seed)

    def autoencoder(self) -> StoredViews:
        """The ground truth through the autoencoder and back: the best the system could do."""
        store, images = self.store, self.subject.images
        conditions = store.network_conditions("autoencoder", len(images))
        inputs = {"images": _tensor_digest(images)}
        name = self.subject.id
        return store.load_or_make("autoencoder", conditions, name, inputs, lambda: store.generator.reconstruct(images))

    def proxy(self) -> StoredViews:
        """S alone."""
        store, subject = self.store, self.subject
        conditions = store.network_conditions("novel_view", len(subject.labels))
        inputs = {"labels": _tensor_digest(subject.labels)} | _portrait(subject)
        return store.load_or_make("proxy", conditions, subject.id, inputs, lambda: self.proxies)


def make_together(people: Sequence[SubjectViews], variant: Variant) -> None:
    """Makes what is missing of the views of a variant of several people, in the same calls of the networks."""
    store = people[0].store
    places = [person.place(variant) for person in people]
    paths = [store.path(*place) for place in places]
    missing = [index for index, path in enumerate(paths) if _read(path) is None]
    if not missing:
        return
    given = [(people[index].subject, people[index].proxies, people[index].seed) for index in missing]
    start = time.perf_counter()
    made = store.generator.generate_together(variant, given, store.sampling)
    seconds = (time.perf_counter() - start) / len(missing)
    for index, images in zip(missing, made, strict=True):
        store.keep(paths[index], places[index][1], images, seconds)


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
