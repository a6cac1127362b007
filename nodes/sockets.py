"""The pack's own socket types and what travels through them."""
from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "DiffPortrait3D"

ReferenceEncoder = io.Custom("DP3D_REFERENCE_ENCODER")  # patches.loading.HostNetwork of kind reference_encoder
ViewConsistency = io.Custom("DP3D_VIEW_CONSISTENCY")  # HostNetwork of kind view_consistency
NovelView = io.Custom("DP3D_NOVEL_VIEW")  # HostNetwork of kind novel_view
Cameras = io.Custom("DP3D_CAMERAS")  # {"labels": float32 [V, 25], EG3D's camera labels}
