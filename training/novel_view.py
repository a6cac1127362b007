"""S (paper section 3.4 and supplement): novel views by a feature volume, the source of the 3D-aware start noise.

Trained on (source, target) pairs of one subject with an L2 and a perceptual loss. The perceptual features are the
frozen autoencoder's encoder, or VGG-16's if the user names its weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffportrait3d.networks import NovelViewConfig, NovelViewModel

from .dataset.images import Batch, MultiViewDataset, Sampler, ViewGroups, fixed_groups, pick, pick_labels, save_sheet
from .engine.command import stage_command
from .engine.config import Number, StageConfig
from .engine.stage import NetworkSource, Stage
from .objectives.losses import EncoderFeatures, VggFeatures, perceptual_loss, psnr


class NovelViewStageConfig(StageConfig):
    network: dict = Field({}, description="of NovelViewConfig; image_size comes from the data")
    perceptual_weight: Number = 0.05
    perceptual_vgg: str | None = Field(None, description="torchvision's vgg16 weights; none: the autoencoder's encoder")
    perceptual_levels: int = 3
    validation_subjects: int = 8
    validation_views: int = 4


class NovelViewStage(Stage):
    """Regression of one view from another one with known cameras."""

    name = "novel_view"
    kind = "novel_view"
    config_class = NovelViewStageConfig

    def build_networks(self, networks: NetworkSource) -> None:
        config = self.config
        if config.perceptual_vgg:
            self.features = VggFeatures(config.perceptual_vgg if networks.weights else None)
        else:
            self.features = EncoderFeatures(networks("autoencoder")[0], config.perceptual_levels)
        self.frozen["perceptual features"] = self.features
        sizes = {"image_size": self.resolution, **config.network}
        self.trainable = self.trained_network(networks, lambda: NovelViewModel(NovelViewConfig.from_dict(sizes)))

    def make_sampler(self) -> Sampler:
        return self.sampler_of(ViewGroups)

    def dummy_loss(self, samples: int) -> dict[str, Tensor]:
        image = torch.zeros(samples, 3, self.resolution, self.resolution, device=self.device)
        label = torch.zeros(samples, 25, device=self.device)
        return self.errors(self.trainable(image, label, label).float(), image)

    def inputs(self, batch: Batch, variant: str) -> dict[str, Tensor]:
        return self.views(batch, self.data)

    def views(self, batch: Batch, data: MultiViewDataset) -> dict[str, Tensor]:
        """Images [N, 3, H, W] and labels [N, 25] of a batch of pairs: what the network is given, and the target."""
        return {
            "source": pick(data.images, batch.references, batch.flips, self.device),
            "source_label": pick_labels(data.labels, batch.references, batch.flips, self.device),
            "target_label": pick_labels(data.labels, batch.targets, batch.flips, self.device),
            "target": pick(data.images, batch.targets, batch.flips, self.device),
        }

    def loss(self, inputs: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
        *inputs, target = inputs.values()
        return self.errors(self.trainable(*inputs).float(), target)

    def errors(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """L2 and perceptual loss of images [N, 3, H, W] in [-1, 1], and their weighted sum."""
        mse, perceptual = F.mse_loss(output, target), perceptual_loss(self.features, output, target)
        return {"loss": mse + self.config.perceptual_weight * perceptual, "mse": mse, "perceptual": perceptual}

    def validate(self, image: Path) -> dict[str, float]:
        groups = fixed_groups(self.validation, self.config.validation_subjects, self.config.validation_views)
        sources, outputs, targets = [], [], []
        for column in range(groups.targets.shape[1]):
            pairs = Batch(groups.targets[:, column], groups.references, groups.flips)
            *inputs, target = self.views(pairs, self.validation).values()
            outputs.append(self.trainable(*inputs).float().clamp(-1, 1))
            sources.append(inputs[0])
            targets.append(target)
        save_sheet(image, [sources[0], *(row for pair in zip(targets, outputs, strict=True) for row in pair)])
        output, target = torch.cat(outputs), torch.cat(targets)
        # What survives in the start noise is coarse, so the coarse error is reported on its own.
        coarse = psnr(F.avg_pool2d(output, 8), F.avg_pool2d(target, 8))
        return {
            "psnr": float(psnr(output, target).mean()),
            "psnr_coarse": float(coarse.mean()),
            "psnr_copy_of_source": float(psnr(torch.cat(sources), target).mean()),
        }


if __name__ == "__main__":
    raise SystemExit(stage_command(NovelViewStage))
