"""The pipeline of a weights folder, and the views of its variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from diffportrait3d.cameras.labels import camera_angles
from diffportrait3d.files import file_hash
from diffportrait3d.networks import NETWORKS, ReferenceEncoder
from diffportrait3d.pipeline import Person, Pipeline, Sampling
from diffportrait3d.weights.files import load_network, network_files

from ..subjects.dataset import Subject
from ..subjects.misalignment import unaligned
from ..subjects.variants import Variant

STARTS = {"random": "independent", "shared": "shared"}  # of a variant -> of the pipeline


class ViewGenerator:
    """A pipeline with the networks that variants exchange.

    Args:
        folder: holds `<network>.safetensors` for all six networks, of any width.
        others: more view-consistency files by the name that variants call them.
        device: where the networks run; images are given and returned on the CPU.
        precision: that variants' views are computed in; S's, and what goes through the autoencoder alone, in float32.

    Raises:
        CheckpointError: a network is missing, damaged or of another kind.
    """

    def __init__(
        self, folder: Path, others: dict[str, Path] | None = None, device: str = "cpu", precision: str = "float32"
    ):
        self.pipeline, self.precision = Pipeline.from_folder(folder, device), precision
        self.view_consistency = {"trained": self.pipeline.denoiser.view_consistency, "none": None}
        self.hashes: dict[str, str] = {}  # sha256 of every file
        for spec in NETWORKS.values():
            self._hash(folder / spec.file_name)
        for name, path in (others or {}).items():
            self.view_consistency[name] = load_network(path, expect="view_consistency")[0].to(device)
            self._hash(path, f"{name} ")

    def _hash(self, path: Path, prefix: str = "") -> None:
        self.hashes |= {prefix + file.name: file_hash(file) for file in network_files(path)}

    def hashes_for(self, variant: Variant) -> dict[str, str]:
        """sha256 of the files that a variant's views depend on: not those of other view-consistency modules."""
        unused = self.view_consistency.keys() - {"trained", "none", variant.view_consistency}
        prefixes = tuple(f"{name} " for name in unused)
        return {file: value for file, value in self.hashes.items() if not file.startswith(prefixes)}

    @cached_property
    def untrained_encoder(self) -> ReferenceEncoder:
        """F_ref as its training finds it: a copy of F (section 4.3)."""
        unet = self.pipeline.denoiser.unet
        encoder = ReferenceEncoder(unet.config)
        encoder.load_from_unet(unet.state_dict())
        return encoder.to(self.pipeline.device).eval().requires_grad_(False)

    def variant_pipeline(self, variant: Variant) -> Pipeline:
        """The pipeline with the networks that a variant uses."""
        networks = {"view_consistency": self.view_consistency[variant.view_consistency]}
        if variant.encoder != "trained":
            networks["reference_encoder"] = self.untrained_encoder if variant.encoder == "untrained" else None
        if variant.condition == "none":
            networks["view_controlnet"] = None
        return self.pipeline.with_networks(**networks)

    @torch.inference_mode()
    def proxies(self, subject: Subject) -> Tensor:
        """S's views of the subject at the target cameras, [V, 3, H, W] in [0, 1]."""
        return self.pipeline.proxies(subject.reference, subject.labels, subject.reference_label[0])

    @torch.inference_mode()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the autoencoder and back, [V, 3, H, W] in [0, 1]: the best the system could do."""
        return self.pipeline.decode(self.pipeline.encode(images))

    def generate(
        self, variant: Variant, people: Sequence[tuple[Subject, Tensor, int]], sampling: Sampling
    ) -> list[Tensor]:
        """All target views of each person, [V, 3, H, W] in [0, 1], all in the same calls of the denoiser. Variants with
        equal seeds share all noise.

        Args:
            people: each with S's views from `proxies`, the same for every variant, and its seed.
            sampling: the command's, which a variant may change.
        """
        pipeline = self.variant_pipeline(variant)
        sampling = replace(variant.sampling(sampling), window=len(people[0][0].labels))
        dtype = getattr(torch, self.precision)
        with torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32):
            return pipeline.views([self._person(pipeline, variant, *person) for person in people], sampling)

    def _person(self, pipeline: Pipeline, variant: Variant, subject: Subject, proxies: Tensor, seed: int) -> Person:
        starts = {"proxy": proxies, "reference": subject.reference[:1].expand_as(proxies), "truth": subject.images}
        return pipeline.person(
            subject.reference[:1],
            subject.labels,
            references=_references(variant, subject, seed),
            camera_images=subject.other_conditions if variant.condition == "swapped" else subject.conditions,
            proxies=starts.get(variant.start),
            start=STARTS.get(variant.start, "proxies"),
            strength=variant.strength,
            order=camera_angles(subject.labels).yaw.argsort() if variant.in_order else None,
            seed=seed,
        )


def _references(variant: Variant, subject: Subject, seed: int) -> Tensor:
    """What F_ref reads, [R, 3, H, W] in [0, 1]."""
    images = subject.reference if variant.person == "own" else subject.other_reference
    if len(images) < variant.references:
        raise ValueError(
            f"'{variant.title}' needs {variant.references} references, {subject.id} has {len(images)}; "
            "use fewer --views."
        )
    images = images[: variant.references]
    return unaligned(images, seed, variant.misaligned) if variant.misaligned else images
