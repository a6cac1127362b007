"""DiffPortrait3D (Gu et al., CVPR 2024) in plain torch: networks, diffusion, cameras and rendered heads."""

from .command import begin_package

begin_package(__name__)
