"""Values that come over links, which the host does not check: names, numbers, objects, images; and null or text that an
API graph has in place of a link."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.labels import trajectory
from evaluation.goldens.host import NARROW_CONFIG, host_path

VIEWS, SIDE = 3, 64
FACE = [[26.0, 26.0], [38.0, 26.0], [32.0, 33.0], [27.0, 39.0], [37.0, 39.0]]  # in images of SIDE
SOCKETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class Given:
    """A node of the test: gives any object by its name, over a link of any type."""

    RETURN_TYPES, FUNCTION, values = ("*",), "give", {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING",)}}

    def give(self, name):
        return (self.values[name],)


@pytest.fixture(scope="module", autouse=True)
def values(host, pack, write_networks, stock_autoencoder):
    """The objects of `Given`; networks in models/diffportrait3d/linked, cameras and images in input/linked."""
    path = host_path(pack, host.comfy, NARROW_CONFIG)
    networks = Path(host.folder_paths.models_dir) / "diffportrait3d/linked"
    inputs = Path(host.folder_paths.get_input_directory()) / "linked"
    write_networks(networks)
    (inputs / "views").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(inputs / "views/0.png")
    np.save(inputs / "path.npy", trajectory("arc", VIEWS).numpy())
    images = torch.rand(VIEWS, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    Given.values = {
        "model": path.model,
        "encoder": path.encoder,
        "views": path.views,
        "control": path.control_net,
        "vae": host.comfy.sd.VAE(sd=stock_autoencoder()),
        "S": path.pack.host.loading.load_novel_view(networks / "novel_view.safetensors"),
        "images": images,
        "image": images[:1],
        "cameras": {"labels": trajectory("arc", VIEWS)},
        "latent": {"samples": torch.zeros(VIEWS, 4, 8, 8)},
        "noise": path.patches.noise.ViewNoise(0),
        "prompt": [[torch.ones(1, 7, 32), {}]],
        "masks": images[..., 0],
        "mask": images[:1, ..., 0],
        "camera": {"labels": trajectory("arc", 1)},
        "landmarks": FACE,
        "place": path.pack.host.photographs.Placement(images[:1], torch.eye(3, dtype=torch.float64)),
    }
    host.nodes.NODE_CLASS_MAPPINGS["Given"] = Given
    yield
    del host.nodes.NODE_CLASS_MAPPINGS["Given"]
    Given.values = {}
    shutil.rmtree(networks)
    shutil.rmtree(inputs)


NAMES = {  # node: its list, a name in it, what the list is of
    "DP3D_LoadMiniature": ("name", "linked", "base UNet"),
    "DP3D_LoadReferenceEncoder": ("name", "linked/reference_encoder.safetensors", "reference encoder"),
    "DP3D_LoadViewControlNet": ("name", "linked/view_controlnet.safetensors", "view ControlNet"),
    "DP3D_LoadViewConsistency": ("name", "linked/view_consistency.safetensors", "view consistency"),
    "DP3D_LoadNovelView": ("name", "linked/novel_view.safetensors", "novel-view model"),
    "DP3D_LoadCameras": ("file", "linked/path.npy", "camera file"),
    "DP3D_LoadCameraConditions": ("folder", "linked/views", "image folder"),
}
# Every link of every node, and what `Given` gives it.
LINKS = {
    "DP3D_ApplyReferenceAttention": {
        "model": "model",
        "reference_encoder": "encoder",
        "vae": "vae",
        "image": "image",
        "mask": "mask",
    },
    "DP3D_ViewControlNet": {"positive": "prompt", "control_net": "control", "image": "images"},
    "DP3D_ApplyViewConsistency": {"model": "model", "view_consistency": "views"},
    "DP3D_RenderCameraConditions": {"cameras": "cameras", "control_net": "control"},
    "DP3D_ReferenceView": {"portrait": "image"},
    "DP3D_ViewConsistencySampler": {
        "model": "model",
        "positive": "prompt",
        "latent": "latent",
        "noise": "noise",
        "view_consistency": "views",
        "negative": "prompt",
    },
    "DP3D_ViewConsistencySchedule": {"model": "model"},
    "DP3D_3DAwareNoise": {
        "vae": "vae",
        "cameras": "cameras",
        "novel_view": "S",
        "image": "image",
        "reference_camera": "camera",
        "proxies": "images",
        "model": "model",
    },
    "DP3D_AlignPortrait": {"image": "image", "landmarks": "landmarks", "mask": "mask"},
    "DP3D_PasteBack": {"place": "place", "view": "image", "mask": "mask"},
    "DP3D_ViewGrid": {"images": "images", "cameras": "cameras"},
    "DP3D_Turntable": {"images": "images"},
    "DP3D_SaveCameras": {"cameras": "cameras", "images": "images"},
    "DP3D_ExportViews": {"images": "images", "cameras": "cameras", "masks": "masks"},
    "DP3D_CameraFromViewer": {"camera_info": None},
    "DP3D_CameraToViewer": {"cameras": "cameras"},
}


def schema(host, node_id: str):
    return host.nodes.NODE_CLASS_MAPPINGS[node_id].define_schema()


def graph(host, node_id: str, **inputs) -> dict:
    """The node with its widgets' defaults and good links, `inputs` instead of some of them, and a node behind it."""
    given = {name: value for name, value in LINKS.get(node_id, {}).items() if value and name not in inputs}
    if node_id == "DP3D_3DAwareNoise" and "proxies" not in inputs:
        del given["proxies"]
    widgets = {
        each.id: each.default if getattr(each, "default", None) is not None else each.options[0]
        for each in schema(host, node_id).inputs
        if each.get_io_type() in SOCKETS and not each.optional
    }
    small = {"resolution": SIDE, "width": SIDE, "height": SIDE, "start_points": 0, "points": str(FACE)}
    widgets |= {name: value for name, value in small.items() if name in widgets}
    prompt = {f"given {name}": {"class_type": "Given", "inputs": {"name": value}} for name, value in given.items()}
    links = {name: [f"given {name}", 0] for name in given}
    prompt["node"] = {"class_type": node_id, "inputs": {**widgets, **links, **inputs}}
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}
    return prompt


def linked(host, node_id: str, name: str, value, **inputs) -> dict:
    """`graph` with `value` over a link to input `name`."""
    Given.values["value"] = value
    prompt = graph(host, node_id, **{name: ["value", 0]}, **inputs)
    return {**prompt, "value": {"class_type": "Given", "inputs": {"name": "value"}}}


def test_every_node_with_a_list_of_files_is_here(pack):
    families = [node for family in pack.nodes.FAMILIES for node in family.NODES]
    assert set(NAMES) == {
        node.define_schema().node_id for node in families if "kwargs" not in node.validate_inputs.__code__.co_varnames
    }


@pytest.mark.parametrize("node_id", NAMES)
def test_file_names_come_by_a_link(host, run_workflow, node_id):
    """As with the widget; what is not in the list is named when the node runs, not before."""
    name, good, what = NAMES[node_id]
    assert run_workflow(linked(host, node_id, name, good)).values["node"]
    title = schema(host, node_id).display_name
    for wrong in ("gone.npy", "../linked", 7):
        with pytest.raises(RuntimeError, match=rf"{title}: there is no {what} '?{wrong}'? .found: .*linked"):
            run_workflow(linked(host, node_id, name, wrong))
    with pytest.raises(RuntimeError, match=f"{title} lacks {name}"):
        run_workflow(linked(host, node_id, name, None))


def test_a_known_name_is_found_without_a_look_at_all_folders(host, pack, monkeypatch):
    node = host.nodes.NODE_CLASS_MAPPINGS["DP3D_LoadCameras"]
    assert node.execute("linked/path.npy").args[1] == VIEWS
    monkeypatch.setattr(pack.host.user_files, "folders_below", None)
    assert node.execute("linked/path.npy").args[1] == VIEWS


def test_file_names_come_through_a_switch(host, run_workflow):
    """The host's own nodes between the text and the list."""
    prompt = graph(host, "DP3D_LoadCameras", file=["switch", 0])
    prompt["first"] = {"class_type": "PrimitiveString", "inputs": {"value": "gone.npy"}}
    prompt["second"] = {"class_type": "PrimitiveString", "inputs": {"value": "linked/path.npy"}}
    prompt["switch"] = {
        "class_type": "ComfySwitchNode",
        "inputs": {"switch": True, "on_false": ["first", 0], "on_true": ["second", 0]},
    }
    assert run_workflow(prompt).values["node"][1] == VIEWS
    prompt["switch"]["inputs"]["switch"] = False
    with pytest.raises(RuntimeError, match="Load Cameras: there is no camera file 'gone.npy'"):
        run_workflow(prompt)


@pytest.mark.parametrize("node_id", ["DP3D_LoadCameras", "DP3D_LoadViewControlNet"])
def test_a_changed_file_behind_a_link_is_read_again(host, run_workflow, node_id):
    name, good, _ = NAMES[node_id]
    folder = Path(
        host.folder_paths.get_input_directory()
        if node_id == "DP3D_LoadCameras"
        else f"{host.folder_paths.models_dir}/diffportrait3d"
    )
    prompt, executor = linked(host, node_id, name, good), host.new_executor()

    def executed() -> bool:
        messages = run_workflow(copy.deepcopy(prompt), executor).messages  # the host notes in it what it found
        cached = [data["nodes"] for event, data in messages if event == "execution_cached"][-1]
        return "node" not in cached

    assert executed() and not executed()
    file = folder / good
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert executed()


@pytest.mark.parametrize(
    ("node_id", "name", "value", "message"),
    [
        (
            "DP3D_SaveCameras",
            "format",
            "csv",
            "Save Cameras: format must be one of json, EG3D's .*, got the text 'csv'",
        ),
        ("DP3D_CameraTrajectory", "kind", 3, "Camera Trajectory: kind must be one of arc, .*, got the value 3"),
        ("DP3D_CameraTrajectory", "views", "many", "views must be a number, got the text 'many'"),
        ("DP3D_CameraTrajectory", "views", 2.5, "views must be a whole number, got 2.5"),
        ("DP3D_CameraTrajectory", "fov", [13], "fov must be a number, got an object of type list"),
        ("DP3D_SaveCameras", "filename_prefix", 5, "filename_prefix must be a text, got the value 5"),
        ("DP3D_Turntable", "ping_pong", "yes", "ping_pong must be on or off, got the text 'yes'"),
        ("DP3D_3DAwareNoise", "mode", "loud", "3D-Aware Noise: mode must be one of paper, .*, got the text 'loud'"),
    ],
)
def test_widgets_over_a_link(host, run_workflow, node_id, name, value, message):
    with pytest.raises(RuntimeError, match=message):
        run_workflow(linked(host, node_id, name, value))


def test_whole_numbers_may_be_floats(host, run_workflow):
    assert len(run_workflow(linked(host, "DP3D_CameraTrajectory", "views", 4.0)).values["node"][0]["labels"]) == 4


NEEDED = [("DP3D_3DAwareNoise", name) for name in ("cameras", "novel_view", "image")]  # optional beside proxies alone
ALL_LINKS = [(node_id, name) for node_id, names in LINKS.items() for name in names]


def links_of(described) -> list[str]:
    return [each.id for each in described.inputs if each.get_io_type() not in SOCKETS]


def test_every_link_is_here(pack):
    families = [node.define_schema() for family in pack.nodes.FAMILIES for node in family.NODES]
    here = [described for described in families if described.node_id in LINKS]
    assert set(ALL_LINKS) == {(described.node_id, name) for described in here for name in links_of(described)}


def test_nodes_that_are_not_here_check_their_links_too(host, pack, run_workflow):
    """Every other node with links, given text in place of all of them: one sentence about one of them."""
    for node in (node for family in pack.nodes.FAMILIES for node in family.NODES):
        described = node.define_schema()
        names = links_of(described)
        for name in names if described.node_id not in LINKS else []:
            required = {each.id for each in described.inputs if each.id in names and not each.optional}
            with pytest.raises(RuntimeError) as caught:
                run_workflow(graph(host, described.node_id, **dict.fromkeys({name, *required}, "portrait.png")))
            assert isinstance(caught.value.__cause__, ValueError), (described.node_id, name)
            assert "got the text 'portrait.png'; connect" in str(caught.value), (described.node_id, name)


@pytest.mark.parametrize(("node_id", "name"), ALL_LINKS)
def test_null_and_text_in_place_of_a_link(host, run_workflow, node_id, name):
    """One sentence with the input; null at an optional one is as if nothing were there."""
    described = schema(host, node_id)
    [socket] = [each for each in described.inputs if each.id == name]
    for literal in ("portrait.png", 3, {"samples": 1}):
        with pytest.raises(RuntimeError) as caught:
            run_workflow(graph(host, node_id, **{name: literal}))
        assert isinstance(caught.value.__cause__, ValueError), literal
        if name != "camera_info":
            assert f"{described.display_name}: {name} got" in str(caught.value) and "connect" in str(caught.value)
    if socket.optional and (node_id, name) not in NEEDED:
        assert run_workflow(graph(host, node_id, **{name: None})).values["node"]
    else:
        with pytest.raises(RuntimeError, match="lacks .*; connect|got no VAE|gave no camera"):
            run_workflow(graph(host, node_id, **{name: None}))


IMAGES = [(node_id, name) for node_id, name in ALL_LINKS if name in ("image", "images", "portrait", "proxies")]


@pytest.mark.parametrize(("node_id", "name"), IMAGES)
def test_images_of_other_channels(host, run_workflow, node_id, name):
    """Grey is grey in three channels; alpha passes; anything else is named."""
    extra = {"novel_view": None} if name == "proxies" else {}
    images = Given.values[LINKS[node_id][name]]
    grey = images[..., :1]

    def run(value):
        return run_workflow(linked(host, node_id, name, value, **extra)).values["node"]

    if node_id not in ("DP3D_ApplyReferenceAttention", "DP3D_ViewControlNet", "DP3D_Turntable"):  # whose results are
        one, three = run(grey), run(grey.expand(-1, -1, -1, 3))  # models, prompts and videos
        for mine, wanted in zip(one, three, strict=True):
            assert torch.equal(mine, wanted) if isinstance(mine, torch.Tensor) else type(mine) is type(wanted)
    else:
        assert run(grey)
    assert run(torch.cat([images, grey], dim=3)) and run(images.half())
    title = schema(host, node_id).display_name
    for wrong, message in (
        (images[..., :2], r"has shape \(., 64, 64, 2\); an IMAGE is .* convert it to RGB"),
        (torch.cat([images, images], dim=3), r"has shape \(., 64, 64, 6\)"),
        (images[0], r"has shape \(64, 64, 3\)"),
        ((images * 255).byte(), "holds torch.uint8; .* divide by 255"),
        (images[:, :0], ".*without a pixel"),
    ):
        with pytest.raises(RuntimeError, match=f"{title}: {name} {message}"):
            run(wrong)


def test_grey_conditions_reach_the_sampler(host, run_workflow):
    """Through our View ControlNet and through the host's Apply ControlNet, which knows nothing of channels."""
    grey = Given.values["images"][..., :1]

    def sampled(node_type: str, images) -> torch.Tensor:
        prompt = graph(host, "DP3D_ViewConsistencySampler", positive=["positive", 0], steps=1, preset="custom")
        Given.values["conditions"] = images
        for name in ("prompt", "control", "conditions"):
            prompt[name] = {"class_type": "Given", "inputs": {"name": name}}
        inputs = {
            "positive": ["prompt", 0],
            "control_net": ["control", 0],
            "image": ["conditions", 0],
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
        }
        if node_type == "ControlNetApplyAdvanced":
            inputs["negative"] = ["prompt", 0]
        prompt["positive"] = {"class_type": node_type, "inputs": inputs}
        return run_workflow(prompt).values["node"][0]["samples"]

    for node_type in ("DP3D_ViewControlNet", "ControlNetApplyAdvanced"):
        assert torch.equal(sampled(node_type, grey), sampled(node_type, grey.expand(-1, -1, -1, 3)))
        with pytest.raises(RuntimeError, match=r"View ControlNet: image has shape \(3, 64, 64, 2\)"):
            sampled(node_type, torch.cat([grey, grey], dim=3))


@pytest.mark.parametrize("node_id", ["DP3D_ApplyReferenceAttention", "DP3D_ExportViews"])
def test_masks_of_other_shapes(host, run_workflow, node_id):
    name = "mask" if node_id == "DP3D_ApplyReferenceAttention" else "masks"
    masks = Given.values["masks"][:1]
    one = {"image": "image"} if name == "mask" else {}
    extra = {} if one else {"images": ["one", 0], "cameras": ["camera", 0]}

    def run(value):
        prompt = linked(host, node_id, name, value, **extra)
        for source, given in (("one", "image"), ("camera", "camera")):
            prompt[source] = {"class_type": "Given", "inputs": {"name": given}}
        return run_workflow(prompt).values["node"]

    for shaped in (masks, masks[0], masks[:, None], masks[..., None], masks > 0.1, masks.half()):
        assert run(shaped)
    for wrong, message in (
        (masks[..., None].expand(-1, -1, -1, 3), r"has shape \(1, 64, 64, 3\); a MASK is .* Convert Image to Mask"),
        (masks[0, 0], r"has shape \(64,\)"),
        ((masks * 255).byte(), "holds torch.uint8"),
        (masks[:, :0], ".*without a pixel"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} {message}"):
            run(wrong)
