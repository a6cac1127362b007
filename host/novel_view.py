"""S inside the host: proxy views of a portrait at given cameras (paper section 3.4)."""

from __future__ import annotations

import comfy.model_management as model_management
import comfy.utils
import torch
from torch import Tensor

from .images import resize_images
from .loading import HostNetwork

VIEWS_AT_ONCE = 4


def render_proxies(network: HostNetwork, portrait: Tensor, reference_label: Tensor, labels: Tensor) -> Tensor:
    """What S thinks the portrait looks like from other cameras: blurred, but the same head in every view.

    Args:
        portrait: IMAGE [1, H, W, 3] in [0, 1].
        reference_label: the portrait's camera [25]. labels: [V, 25].

    Returns:
        IMAGE [V, S, S, 3] in [0, 1], S the size the network was trained at
    """
    model_management.load_models_gpu([network.patcher])
    module, device = network.patcher.model, network.patcher.load_device
    size = network.config.image_size
    source = resize_images(portrait[:1, ..., :3], size, size).movedim(-1, 1).to(device) * 2 - 1  # [1, 3, S, S]
    progress = comfy.utils.ProgressBar(len(labels))
    views = []
    for target in labels.to(device).split(VIEWS_AT_ONCE):
        model_management.throw_exception_if_processing_interrupted()
        count = len(target)
        image = module(source.expand(count, -1, -1, -1), reference_label.to(device).expand(count, -1), target)
        views.append((image.cpu() + 1) / 2)
        progress.update(count)
    return torch.cat(views).movedim(1, -1).clamp(0.0, 1.0)
