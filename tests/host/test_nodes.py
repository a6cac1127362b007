"""The nodes as the host shows them, and the turntable workflow on random weights."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.labels import orbit_camera

NAMES = {  # ids are frozen: shared workflows refer to them
    "DP3D_LoadMiniature": "Load Miniature",
    "DP3D_LoadReferenceEncoder": "Load Reference Encoder",
    "DP3D_LoadViewControlNet": "Load View ControlNet",
    "DP3D_LoadViewConsistency": "Load View Consistency",
    "DP3D_LoadNovelView": "Load Novel-View Model",
    "DP3D_ApplyReferenceAttention": "Apply Reference Attention",
    "DP3D_ViewControlNet": "View ControlNet",
    "DP3D_ApplyViewConsistency": "Apply View Consistency",
    "DP3D_CameraTrajectory": "Camera Trajectory",
    "DP3D_RenderCameraConditions": "Render Camera Conditions",
    "DP3D_ViewConsistencySampler": "View-Consistency Sampler",
    "DP3D_ViewConsistencySchedule": "View-Consistency Schedule",
    "DP3D_3DAwareNoise": "3D-Aware Noise",
    "DP3D_ViewGrid": "View Grid",
    "DP3D_Turntable": "Turntable",
    "DP3D_CameraFromViewer": "Camera from 3D Viewer",
    "DP3D_ReferenceView": "Reference View",
    "DP3D_LoadCameras": "Load Cameras",
    "DP3D_SaveCameras": "Save Cameras",
    "DP3D_LoadCameraConditions": "Load Camera Conditions",
    "DP3D_ExportViews": "Export Views",
    "DP3D_SelectViews": "Select Views",
    "DP3D_JoinViews": "Join Views",
    "DP3D_AlignPortrait": "Align Portrait",
    "DP3D_PasteBack": "Paste Back",
    "DP3D_CameraToViewer": "Cameras to 3D Viewer",
}


@pytest.fixture(scope="module")
def nodes(host, pack):
    return {name: node for name, node in host.nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("DP3D_")}


@pytest.fixture(scope="module")
def tiny(host, pack, write_networks):
    """A narrow set of networks with known weights and a portrait, in models/diffportrait3d/tiny."""
    folder = Path(host.folder_paths.models_dir) / "diffportrait3d" / "tiny"
    write_networks(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "portrait.png")
    yield
    shutil.rmtree(folder)


@pytest.fixture
def turntable(repository, tiny) -> dict:
    """The shipped workflow on the narrow networks: 4 views of 64 px in 2 steps."""
    text = (repository / "workflows/api/turntable.json").read_text(encoding="utf-8")
    prompt = json.loads(text.replace('"miniature', '"tiny'))
    for node in prompt.values():
        small = {"resolution": 64, "views": 4, "preset": "custom", "steps": 2, "columns": 2}
        node["inputs"].update({name: value for name, value in small.items() if name in node["inputs"]})
    return prompt


def node_of(prompt: dict, kind: str) -> str:
    return next(node_id for node_id, node in prompt.items() if node["class_type"] == kind)


def test_ids_and_names(host, nodes):
    assert {name: host.nodes.NODE_DISPLAY_NAME_MAPPINGS[name] for name in nodes} == NAMES


def test_library_shows_groups_and_no_long_list(nodes):
    """A folder per task, each short enough to see at once; no node lies beside the folders."""
    folders = Counter(node.CATEGORY for node in nodes.values())
    tasks = ("load", "portrait", "cameras", "apply", "sample", "views", "files")
    assert set(folders) == {f"DiffPortrait3D/{task}" for task in tasks}
    assert min(folders.values()) > 1 and max(folders.values()) <= 6, folders


def test_everything_is_explained(nodes):
    for name, node in nodes.items():
        schema = node.define_schema()
        assert schema.description, name
        for socket in [*schema.inputs, *schema.outputs]:
            assert socket.tooltip, f"{name}: {socket.id or socket.display_name} has no tooltip"


def test_turntable(host, run_workflow, turntable):
    result = run_workflow(turntable)
    sampler, decode, grid = (
        node_of(turntable, kind) for kind in ("DP3D_ViewConsistencySampler", "VAEDecode", "DP3D_ViewGrid")
    )
    assert result.values[sampler][0]["samples"].shape == (4, 4, 8, 8)
    images = result.values[decode][0]
    assert images.shape == (4, 64, 64, 3) and torch.isfinite(images).all()
    assert (images[0] - images[1]).abs().max() > 0.01
    assert result.values[grid][0].shape == (1, 2 * (64 + 18) + 4, 2 * 64 + 4, 3)
    saved = [len(output["images"]) for output in result.outputs.values() if "images" in output]
    assert sorted(saved) == [1, 1, 4]


def test_turntable_again_and_with_another_seed(host, run_workflow, turntable):
    """One server, three prompts: the same prompt gives the same views, bit for bit, and the seed reaches them."""
    decode, noise = node_of(turntable, "VAEDecode"), node_of(turntable, "DP3D_3DAwareNoise")
    first = run_workflow(turntable).values[decode][0]
    executor = host.new_executor()
    changed = json.loads(json.dumps(turntable))
    changed[noise]["inputs"]["seed"] = 1
    other = host.run_workflow(changed, executor).values[decode][0]
    assert not torch.equal(first, other)
    assert torch.equal(first, host.run_workflow(turntable, executor).values[decode][0])


def test_proxies_of_one_s_own(run_workflow, turntable):
    """Camera conditions as proxies, no novel-view model."""
    noise, render = node_of(turntable, "DP3D_3DAwareNoise"), node_of(turntable, "DP3D_RenderCameraConditions")
    inputs = turntable[noise]["inputs"]
    del inputs["novel_view"], inputs["image"]
    inputs["proxies"] = [render, 0]
    result = run_workflow(turntable)
    assert torch.equal(result.values[noise][2], result.values[render][0])


@pytest.mark.parametrize(
    "change, message",
    [
        (("DP3D_3DAwareNoise", "novel_view", None), "lacks novel_view"),
        (("DP3D_3DAwareNoise", "proxies", ["1", 3]), "connect one of them"),
        (("DP3D_CameraTrajectory", "views", 1), "at least 2 views in one batch, got 1"),
        (("DP3D_RenderCameraConditions", "cameras", "three views"), "3 condition images for 4 views"),
        (("DP3D_LoadMiniature", "name", "big"), "no base UNet 'big' .found: miniature, tiny"),
        (
            ("DP3D_LoadReferenceEncoder", "name", "x.safetensors"),
            "no reference encoder 'x.safetensors'.*diffportrait3d",
        ),
        (("DP3D_ViewConsistencySampler", "window_size", 7), "window_size 7 is more than the 6 views"),
    ],
)
def test_errors_name_the_cause(run_workflow, turntable, change, message):
    kind, name, value = change
    inputs = turntable[node_of(turntable, kind)]["inputs"]
    if value is None:
        del inputs[name]
    elif value == "three views":
        path = turntable[node_of(turntable, "DP3D_CameraTrajectory")]
        turntable["three"] = {"class_type": path["class_type"], "inputs": {**path["inputs"], "views": 3}}
        inputs[name] = ["three", 0]
    else:
        inputs[name] = value
    with pytest.raises(RuntimeError, match=message):
        run_workflow(turntable)


def test_view_grid(nodes):
    images = torch.stack([torch.full((8, 6, 3), value) for value in (0.1, 0.2, 0.3)])
    grid = nodes["DP3D_ViewGrid"].execute(images, columns=2, gap=1).args[0]
    assert grid.shape == (1, 17, 13, 3)
    assert torch.equal(grid[0, :8, :6], images[0]) and torch.equal(grid[0, 9:, :6], images[2])
    assert grid[0, 8].min() == 1.0 and grid[0, 9:, 7:].min() == 1.0
    with pytest.raises(ValueError, match="3 images and 2 cameras"):
        nodes["DP3D_ViewGrid"].execute(images, 2, 1, {"labels": orbit_camera([0.0, 10.0], 0.0)})
    with pytest.raises(ValueError, match="View Grid: images contains NaN"):
        nodes["DP3D_ViewGrid"].execute(images * float("nan"), 2, 1)
    with pytest.raises(ValueError, match="View Grid: images is an empty batch"):
        nodes["DP3D_ViewGrid"].execute(images[:0], 2, 1)


def test_trajectory_and_conditions(nodes):
    cameras = nodes["DP3D_CameraTrajectory"].execute("arc", 3, -30.0, 30.0, 0.0, 0.0, 0.0, 2.7, 13.37).args[0]
    assert cameras["labels"].shape == (3, 25)
    assert cameras["labels"][0, 16].item() == pytest.approx(4.2647, abs=1e-4)
    images = nodes["DP3D_RenderCameraConditions"].execute(cameras, 64, 0).args[0]
    assert images.shape == (3, 64, 64, 3) and 0 <= images.min() and images.max() <= 1
    assert (images[0] - images[2]).abs().mean() > 0.01
