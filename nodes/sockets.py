"""The pack's node categories, its own socket types, and what travels through them."""

from __future__ import annotations

from comfy_api.latest import io

# Where the nodes stand in the editor's node library, in the order of a graph.
CATEGORY = "DiffPortrait3D"
LOAD = f"{CATEGORY}/load"
CAMERAS = f"{CATEGORY}/cameras"
APPLY = f"{CATEGORY}/apply"
SAMPLE = f"{CATEGORY}/sample"
VIEWS = f"{CATEGORY}/views"
FILES = f"{CATEGORY}/files"

ReferenceEncoder = io.Custom("DP3D_REFERENCE_ENCODER")  # host.loading.HostNetwork of kind reference_encoder
ViewConsistency = io.Custom("DP3D_VIEW_CONSISTENCY")  # HostNetwork of kind view_consistency
NovelView = io.Custom("DP3D_NOVEL_VIEW")  # HostNetwork of kind novel_view
Cameras = io.Custom("DP3D_CAMERAS")  # {"labels": float32 [V, 25], EG3D's camera labels}
ViewSelection = io.Custom("DP3D_VIEW_SELECTION")  # patches.view_batches.Selection
