"""S (paper section 3.4 and supplement): novel views by a feature volume, the source of the 3D-aware start noise.

Trained on (source, target) pairs of one subject with an L2 and a perceptual loss. The perceptual features are the
frozen autoencoder's encoder, or VGG-16's if the user names its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffportrait3d.command import run_main
from diffportrait3d.networks import NovelViewConfig, NovelViewModel
from diffportrait3d.weights.files import save_network

from .dataset.images import Batch, MultiViewDataset, Pairs, fixed_groups, open_splits, pick, pick_labels
from .dataset.sheets import save_grid
from .engine.config import StageConfig, to_dict
from .engine.inputs import Files
from .engine.loop import stage_main
from .engine.stage import Stage
from .objectives.denoising import InputsConfig, NetworkSource
from .objectives.losses import EncoderFeatures, VggFeatures, perceptual_loss, psnr


@dataclass
class NovelViewStageConfig(StageConfig):
    """Settings of ``training.novel_view``."""

    inputs: InputsConfig = field(default_factory=InputsConfig)
    network: dict = field(default_factory=dict)  # of NovelViewConfig; image_size comes from the data
    perceptual_weight: float = 0.05
    perceptual_vgg: str | None = None  # torchvision's vgg16 state dict; None: the autoencoder's encoder
    perceptual_levels: int = 3
    validation_subjects: int = 8
    validation_views: int = 4


class NovelViewStage(Stage):
    """Regression of one view from another one with known cameras."""

    name = "novel_view"

    def __init__(self, config: NovelViewStageConfig, device: torch.device):
        self.data, self.validation = open_splits(config.data, device)
        self.prepare(config, device, Files(config.inputs), self.data.resolution)
        self.sampler = Pairs(self.data, config.loop.batch_size, config.loop.seed, config.data.flip)

    def prepare(
        self, config: NovelViewStageConfig, device: torch.device, source: NetworkSource, resolution: int | None = None
    ) -> None:
        self.config, self.device = config, device
        if config.perceptual_vgg:
            self.features = VggFeatures(config.perceptual_vgg if source.weights else None)
        else:
            self.features = EncoderFeatures(source("autoencoder")[0], config.perceptual_levels)
        self.frozen = {"perceptual features": self.features}
        if config.inputs.novel_view:
            self.trainable = source("novel_view")[0]
        else:
            network = {"image_size": resolution, **config.network}
            self.trainable = NovelViewModel(NovelViewConfig.from_dict(network))

    def rehearse(self, samples: int, resolution: int) -> dict[str, Tensor]:
        image = torch.zeros(samples, 3, resolution, resolution, device=self.device)
        label = torch.zeros(samples, 25, device=self.device)
        return self.errors(self.trainable(image, label, label).float(), image)

    def views(self, batch: Batch, data: MultiViewDataset) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Source images, source labels, target labels, target images of a batch of pairs."""
        source = pick(data.images, batch.references, batch.flips, self.device)  # [N, 3, H, W]
        target = pick(data.images, batch.targets, batch.flips, self.device)
        source_label = pick_labels(data.labels, batch.references, batch.flips, self.device)  # [N, 25]
        target_label = pick_labels(data.labels, batch.targets, batch.flips, self.device)
        return source, source_label, target_label, target

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        *inputs, target = self.views(batch, self.data)
        return self.errors(self.trainable(*inputs).float(), target)

    def errors(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """L2 and perceptual loss of images [N, 3, H, W] in [-1, 1], and their weighted sum."""
        mse, perceptual = F.mse_loss(output, target), perceptual_loss(self.features, output, target)
        return {"loss": mse + self.config.perceptual_weight * perceptual, "mse": mse, "perceptual": perceptual}

    def validate(self, picture: Path) -> dict[str, float]:
        groups = fixed_groups(self.validation, self.config.validation_subjects, self.config.validation_views)
        sources, outputs, targets = [], [], []
        for column in range(groups.targets.shape[1]):
            *inputs, target = self.views(
                Batch(groups.targets[:, column], groups.references, groups.flips), self.validation
            )
            outputs.append(self.trainable(*inputs).float().clamp(-1, 1))
            sources.append(inputs[0])
            targets.append(target)
        save_grid(picture, [sources[0], *(image for pair in zip(targets, outputs, strict=True) for image in pair)])
        output, target = torch.cat(outputs), torch.cat(targets)
        # What survives in the start noise is coarse, so the coarse error is reported on its own.
        coarse = psnr(F.avg_pool2d(output, 8), F.avg_pool2d(target, 8))
        return {
            "psnr": float(psnr(output, target).mean()),
            "psnr_coarse": float(coarse.mean()),
            "psnr_copy_of_source": float(psnr(torch.cat(sources), target).mean()),
        }

    def finish(self, run_dir: Path, summary: dict[str, Any]) -> None:
        save_network(
            run_dir / "novel_view.safetensors",
            self.trainable,
            "novel_view",
            image_size=self.data.resolution,
            training={**summary, "config": to_dict(self.config)},
        )


build = NovelViewStage


def main(argv: list[str] | None = None) -> int:
    return stage_main(NovelViewStage, NovelViewStageConfig, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
