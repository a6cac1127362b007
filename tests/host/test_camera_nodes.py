"""Cameras through the host: paths, files, the viewer's camera, the reference view by hand, export."""

from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras import labels as camera_math
from diffportrait3d.cameras.projection import project
from diffportrait3d.portraits.alignment import EG3D, framed_labels
from diffportrait3d.portraits.face import FIVE_POINTS, MEAN_LANDMARKS, five_of
from diffportrait3d.synthetic_heads import render_camera_images


@pytest.fixture(scope="module")
def nodes(host, pack):
    return {name: node for name, node in host.nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("DP3D_")}


def path_of(nodes, kind="arc", views=4, **changes) -> torch.Tensor:
    """Labels [views, 25] of Camera Trajectory with its defaults."""
    inputs = {
        "yaw_min": -45.0,
        "yaw_max": 45.0,
        "pitch_min": -10.0,
        "pitch_max": 10.0,
        "roll": 0.0,
        "radius": 2.7,
        "fov": 13.37,
        **changes,
    }
    return nodes["DP3D_CameraTrajectory"].execute(kind, views, **inputs).args[0]["labels"]


def test_old_workflows_keep_their_cameras(nodes):
    for kind in camera_math.TRAJECTORIES:
        assert torch.equal(path_of(nodes, kind), camera_math.trajectory(kind, 4))


def test_keyframes_give_pose_lens_and_distance(nodes):
    labels = path_of(nodes, "keyframes", 5, keyframes="-30 0\n0 10 0 3\n30 0 5 2.7 20")
    yaw, pitch, roll = camera_math.camera_angles(labels)
    assert yaw[::2].tolist() == pytest.approx([-30, 0, 30], abs=1e-3)
    assert pitch[::2].tolist() == pytest.approx([0, 10, 0], abs=1e-3)
    assert roll[-1].item() == pytest.approx(5, abs=1e-3)
    distance = (labels[:, [3, 7, 11]] - torch.tensor(camera_math.PIVOT)).norm(dim=1)
    assert distance[::2].tolist() == pytest.approx([2.7, 3.0, 2.7], abs=1e-5)
    assert labels[-1, 16].item() == pytest.approx(0.5 / math.tan(math.radians(10)), rel=1e-6)
    with pytest.raises(ValueError, match="line 2: yaw 'left'"):
        path_of(nodes, "keyframes", 5, keyframes="0 0\nleft 0")


def test_eg3d_cameras_circle_the_origin(nodes):
    labels = path_of(nodes, "orbit", 6, around="eg3d")
    assert torch.equal(labels, camera_math.trajectory("orbit", 6, around="eg3d"))
    assert labels[:, [3, 7, 11]].norm(dim=1).tolist() == pytest.approx([2.7] * 6, abs=1e-5)


def test_condition_pictures_are_the_core_s_and_can_be_interrupted(host, nodes):
    render, labels = nodes["DP3D_RenderCameraConditions"], camera_math.trajectory("arc", 2)
    wanted = render_camera_images(labels, 64, 3).movedim(1, -1)
    assert torch.equal(render.execute({"labels": labels}, 64, 3).args[0], wanted)
    host.comfy.model_management.interrupt_current_processing()
    with pytest.raises(host.comfy.model_management.InterruptProcessingException):
        render.execute({"labels": labels}, 64, 3)
    assert torch.equal(render.execute({"labels": labels}, 64, 3).args[0], wanted)


def test_condition_images_in_the_framing_of_eg3d(nodes):
    """The head is larger and higher, and seen from the same side; its five points are where EG3D's crops have them."""
    labels = camera_math.trajectory("arc", 3)
    moved = framed_labels(labels, EG3D)
    for ours, wanted in zip(camera_math.camera_angles(moved), camera_math.camera_angles(labels), strict=True):
        assert (ours - wanted).abs().max() < 6  # EG3D's standard face looks 4 degrees down
    five = five_of(MEAN_LANDMARKS).float()
    for label, before in zip(moved, labels, strict=True):
        places = project(five, label, 1)[:, :2] - project(FIVE_POINTS.float(), before, 1)[:, :2]
        assert places.norm(dim=1).max() < 0.012
    render = nodes["DP3D_RenderCameraConditions"]
    near = render.execute({"labels": labels}, 64, 3, framing=EG3D).args[0]
    assert torch.equal(near, render.execute({"labels": moved}, 64, 3).args[0])


def viewer_camera(host, mode: dict, **changes) -> dict:
    """camera_info as the host's own Create Camera Info makes it."""
    inputs = {"target_x": 0.0, "target_y": 0.0, "target_z": 0.0, "roll": 0.0, "fov": 35.0, **changes}
    return host.nodes.NODE_CLASS_MAPPINGS["CreateCameraInfo"].execute(mode, **inputs).args[0]


def taken_over(nodes, info: dict, framing: str) -> torch.Tensor:
    return nodes["DP3D_CameraFromViewer"].execute(info, framing).args[0]["labels"]


@pytest.mark.parametrize("without_quaternion", [False, True])
def test_the_viewer_s_angles(host, nodes, without_quaternion):
    for yaw, pitch, roll in ((0, 0, 0), (30, 10, 0), (-70, -25, 0), (35, 20, 15)):
        info = viewer_camera(host, {"mode": "orbit", "yaw": yaw, "pitch": pitch, "distance": 4.0}, roll=float(roll))
        if without_quaternion:
            del info["quaternion"]
            roll = 0
        labels = taken_over(nodes, info, "angles only")
        # the viewer's roll turns the camera counter-clockwise
        torch.testing.assert_close(labels[0], camera_math.orbit_camera(yaw, pitch, -roll), atol=1e-5, rtol=0)


def test_the_viewer_s_camera_as_it_is(host, nodes):
    mode = {"mode": "orbit", "yaw": 30.0, "pitch": 10.0, "distance": 3.0}
    info = viewer_camera(host, mode, target_z=0.2, fov=20.0, zoom=2.0)
    wanted = camera_math.orbit_camera(30, 10, radius=3.0, focal=2 * camera_math.focal_from_fov(20.0))
    torch.testing.assert_close(taken_over(nodes, info, "as it is")[0], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cameraType": "orthographic"}, "orthographic camera"),
        ({"fov": 0}, "field of view of 0"),
        ({"position": {"x": float("nan"), "y": 0, "z": 1}}, "contains NaN"),
        ({"quaternion": {"x": 0, "y": 0, "z": 0, "w": 0}}, "quaternion of length 0"),
        ({"quaternion": None, "position": {"x": 0, "y": 0, "z": 0}}, "is at its target"),
    ],
)
def test_impossible_viewer_cameras(host, nodes, change, message):
    info = viewer_camera(host, {"mode": "orbit", "yaw": 0.0, "pitch": 0.0, "distance": 3.0})
    with pytest.raises(ValueError, match=message):
        taken_over(nodes, {**info, **change}, "as it is")


def test_no_viewer_camera(nodes):
    with pytest.raises(ValueError, match="gave no camera"):
        taken_over(nodes, None, "angles only")


def reference_view(nodes, portrait, **changes):
    inputs = {
        "yaw": 20.0,
        "pitch": -5.0,
        "roll": 3.0,
        "distance": 2.7,
        "fov": 13.37,
        "picture": "blended",
        "opacity": 1.0,
        "resolution": 64,
        **changes,
    }
    return nodes["DP3D_ReferenceView"].execute(portrait, **inputs).args


def test_reference_view_gives_the_camera_and_the_head_it_sees(nodes):
    grey = torch.full((1, 90, 64, 3), 0.5)
    camera, blended = reference_view(nodes, grey)
    assert torch.equal(camera["labels"], camera_math.orbit_camera([20.0], -5.0, 3.0))
    rendered = nodes["DP3D_RenderCameraConditions"].execute(camera, 64, 0).args[0]
    mask = (blended[0] - 0.5).abs().amax(-1) > 1e-3
    assert 0.1 < mask.float().mean() < 0.9
    torch.testing.assert_close(blended[0][mask], rendered[0][mask])  # the head that View ControlNet is shown
    assert torch.equal(reference_view(nodes, grey, opacity=0.0)[1], torch.full((1, 64, 64, 3), 0.5))
    half = reference_view(nodes, grey, opacity=0.5, picture="all three")[1]
    assert half.shape == (1, 64, 3 * 64, 3)
    torch.testing.assert_close(half[0, :, 64:128][mask], (0.5 + rendered[0][mask]) / 2)
    assert torch.equal(half[:, :, 128:], rendered)
    beside = reference_view(nodes, grey, picture="side by side")[1]
    assert torch.equal(beside, torch.cat([half[:, :, :64], half[:, :, 128:]], dim=2))


def test_cameras_go_to_the_viewer_and_back(nodes):
    labels = camera_math.orbit_camera([-40.0, 0.0, 25.0], [10.0, 0.0, -20.0], [0.0, 5.0, -170.0])
    infos = nodes["DP3D_CameraToViewer"].execute({"labels": labels}, "3D viewer").args[0]
    for info, label in zip(infos, labels, strict=True):
        torch.testing.assert_close(taken_over(nodes, info, "as it is")[0], label, atol=2e-5, rtol=0)


def test_the_host_renders_splats_from_our_cameras(host, run_workflow):
    """One splat at each of the five points: Render Splat, run once for each camera, draws them where our
    cameras see them."""
    from comfy_api.latest import Types

    five = FIVE_POINTS.float()[None]  # [1, 5, 3]
    rotations = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 5, 4)
    splat = Types.SPLAT(five, torch.full((1, 5, 3), 0.006), rotations, torch.ones(1, 5, 1), torch.ones(1, 5, 1, 3))

    class Splat:
        RETURN_TYPES, FUNCTION, INPUT_TYPES = ("SPLAT",), "give", classmethod(lambda cls: {"required": {}})

        def give(self):
            return (splat,)

    trajectory = {"kind": "arc", "views": 3, "yaw_min": -40.0, "yaw_max": 40.0, "pitch_min": 15.0, "pitch_max": 15.0}
    render = {"width": 256, "height": 256, "frames": 1, "splat_scale": 1.0, "sharpen": 1.0, "headlight_shading": 0.0}
    render |= {"opacity_threshold": 0.0, "render_style": "color", "background": "#000000"}
    prompt = {
        "splat": {"class_type": "GivenSplat", "inputs": {}},
        "path": {
            "class_type": "DP3D_CameraTrajectory",
            "inputs": {**trajectory, "roll": 0.0, "radius": 2.7, "fov": 13.37},
        },
        "infos": {"class_type": "DP3D_CameraToViewer", "inputs": {"cameras": ["path", 0], "world": "splat"}},
        "render": {
            "class_type": "RenderSplat",
            "inputs": {"splat": ["splat", 0], "camera_info": ["infos", 0], **render},
        },
        "batch": {"class_type": "RebatchImages", "inputs": {"images": ["render", 0], "batch_size": 3}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["batch", 0]}},
    }
    host.nodes.NODE_CLASS_MAPPINGS["GivenSplat"] = Splat
    try:
        result = run_workflow(prompt)
    finally:
        del host.nodes.NODE_CLASS_MAPPINGS["GivenSplat"]
    images = result.values["batch"][0]
    images = images[0] if isinstance(images, list) else images
    assert images.shape == (3, 256, 256, 3)
    centres = torch.arange(256) + 0.5
    for image, label in zip(images[..., 0], result.values["path"][0]["labels"], strict=True):
        for x, y, _ in project(five[0], label, 256).tolist():
            near = ((centres - x).abs() < 8)[None] & ((centres - y).abs() < 8)[:, None]
            weight = image * near
            found = (weight.sum(0) @ centres / weight.sum(), weight.sum(1) @ centres / weight.sum())
            assert weight.sum() > 1 and abs(found[0] - x) < 0.75 and abs(found[1] - y) < 0.75


def test_reference_view_refuses_what_is_not_one_portrait(nodes):
    with pytest.raises(ValueError, match="one portrait, got 2"):
        reference_view(nodes, torch.zeros(2, 8, 8, 3))
    with pytest.raises(ValueError, match="portrait contains NaN"):
        reference_view(nodes, torch.full((1, 8, 8, 3), math.nan))


def test_reference_view_shows_its_picture_on_the_node(host, run_workflow, nodes):
    prompt = {
        "portrait": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
        "view": {
            "class_type": "DP3D_ReferenceView",
            "inputs": {
                "portrait": ["portrait", 0],
                "yaw": 20.0,
                "pitch": 0.0,
                "roll": 0.0,
                "distance": 2.7,
                "fov": 13.37,
                "picture": "side by side",
                "opacity": 0.5,
                "resolution": 64,
            },
        },
    }
    result = run_workflow(prompt)
    (shown,) = result.outputs["view"]["images"]
    assert shown["type"] == "temp" and result.values["view"][1].shape == (1, 64, 128, 3)


@pytest.fixture
def ask_for_the_live_picture(ask_server):
    return lambda values: ask_server("/diffportrait3d/reference_view", values)


def test_the_live_picture_is_the_node_s(host, nodes, ask_for_the_live_picture):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 64, 3), dtype=np.uint8)
    path = Path(host.folder_paths.get_input_directory()) / "live.png"
    Image.fromarray(pixels).save(path)
    values = {
        "yaw": -15.0,
        "pitch": 5.0,
        "roll": 2.0,
        "distance": 2.5,
        "fov": 15.0,
        "picture": "all three",
        "opacity": 0.5,
        "resolution": 64,
        "portrait": "live.png",
    }
    status, kind, body = ask_for_the_live_picture(values)
    assert (status, kind) == (200, "image/png")
    portrait = torch.from_numpy(pixels / np.float32(255))[None]
    shown = reference_view(nodes, portrait, **{name: value for name, value in values.items() if name != "portrait"})[1]
    live = torch.from_numpy(np.asarray(Image.open(BytesIO(body))) / np.float32(255))
    assert live.shape == shown[0].shape and (live - shown[0]).abs().max() < 1.01 / 255
    path.unlink()
    for change, message in (
        ({}, "live.png does not exist"),
        ({"portrait": "../../secret.png"}, "Invalid file path"),
        ({"portrait": None, "pitch": 90}, "pitch must lie"),
        ({"portrait": None, "resolution": 10**6}, "resolution must lie"),
        ({"portrait": None, "picture": "upside down"}, "upside down"),
        ({"portrait": None, "yaw": "left"}, "'left'"),
    ):
        status, _, body = ask_for_the_live_picture({**values, **change})
        assert status == 400 and message in json.loads(body)["error"]
    assert ask_for_the_live_picture({**values, "portrait": None})[0] == 200


def test_turntable_video(host, run_workflow, nodes):
    views = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 17, 16, 3)
    turntable = nodes["DP3D_Turntable"]
    video = turntable.execute(views, 12.5, True, 2).args[0]
    components = video.get_components()
    assert components.frame_rate == 12.5 and components.images.shape == (16, 18, 16, 3)
    steps = (components.images[:8, 0, 0, 0] * 4).round().tolist()
    assert steps == [0, 1, 2, 3, 4, 3, 2, 1]
    assert torch.equal(components.images[:8], components.images[8:])
    assert turntable.execute(views[:1], 10.0, True, 1).args[0].get_components().images.shape[0] == 1
    with pytest.raises(ValueError, match="images contains NaN"):
        turntable.execute(views * math.nan, 10.0, False, 1)


def test_turntable_is_saved_by_the_host(host, run_workflow, nodes):
    prompt = {
        "views": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 65, "batch_size": 4, "color": 255}},
        "video": {
            "class_type": "DP3D_Turntable",
            "inputs": {"images": ["views", 0], "fps": 8.0, "ping_pong": True, "loops": 1},
        },
        "save": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["video", 0], "filename_prefix": "turntable", "format": "mp4", "codec": "auto"},
        },
    }
    (saved,) = run_workflow(prompt).outputs["save"]["images"]
    video = host.nodes.NODE_CLASS_MAPPINGS["LoadVideo"].execute(f"{saved['filename']} [output]").args[0]
    assert video.get_components().images.shape == (6, 66, 64, 3)


def test_the_live_picture_of_the_miniature_s_portrait(host, nodes, ask_for_the_live_picture):
    """Behind Load Miniature lies no file of the user's: the folder's own portrait, and a folder that there is."""
    values = {
        "yaw": 0.0,
        "pitch": 0.0,
        "roll": 0.0,
        "distance": 2.7,
        "fov": 13.37,
        "picture": "blended",
        "opacity": 0.5,
        "resolution": 64,
        "portrait": None,
    }
    status, kind, body = ask_for_the_live_picture(values | {"miniature": "miniature"})
    assert (status, kind) == (200, "image/png")
    assert body != ask_for_the_live_picture(values)[2], "not the grey picture"
    for absent in ("absent", "../weights/miniature"):
        status, kind, body = ask_for_the_live_picture(values | {"miniature": absent})
        assert status == 400 and absent in json.loads(body)["error"]
