"""DiffPortrait3D (Gu et al., CVPR 2024) in plain torch: networks, diffusion, cameras and synthetic heads.

from diffportrait3d import Pipeline, Sampling, trajectory
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .command import begin_package

if TYPE_CHECKING:
    from .cameras.labels import trajectory
    from .images import read_image, save_image
    from .pipeline import Pipeline, Sampling

__all__ = ["Pipeline", "Sampling", "read_image", "save_image", "trajectory"]
_HOMES = {
    "Pipeline": ".pipeline",
    "Sampling": ".pipeline",
    "read_image": ".images",
    "save_image": ".images",
    "trajectory": ".cameras.labels",
}

begin_package(__name__)


def __getattr__(name: str) -> object:
    """Imports what is exported at its first use: nodes need little of it, and ComfyUI starts sooner."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
