"""The side of the views comes from the files of the networks, so that a graph outlives weights of another size."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SIDE, OTHER_SIDE = 64, 96
SEEN = {"seen": {"class_type": "PreviewImage", "inputs": {"images": ["base", 3]}}}  # the miniature's portrait


@pytest.fixture
def sized(host, write_networks):
    """sized(side): narrow networks in models/diffportrait3d/sized whose files say `side`; nothing for None."""
    folder = Path(host.folder_paths.models_dir) / "diffportrait3d/sized"

    def write(side: int | None) -> Path:
        write_networks(folder, **({} if side is None else {"image_size": side}))
        for file in folder.iterdir():  # a retrained file is newer; here it may be of the same tick
            os.utime(file, ns=(0, write.count))
        write.count += 1
        return folder

    write.count = 1
    yield write
    shutil.rmtree(folder)


def graph(**changes) -> dict:
    """Load Miniature to start latents and condition images of one view; `changes` go to both resolution widgets."""

    def node(class_type, **inputs):
        return {"class_type": class_type, "inputs": inputs}

    camera = {
        "yaw_min": 0.0,
        "yaw_max": 0.0,
        "pitch_min": 0.0,
        "pitch_max": 0.0,
        "roll": 0.0,
        "radius": 2.7,
        "fov": 13.37,
    }
    size = {"resolution": 0, **changes}
    return {
        "base": node("DP3D_LoadMiniature", name="sized"),
        "control": node("DP3D_LoadViewControlNet", name="sized/view_controlnet.safetensors"),
        "path": node("DP3D_CameraTrajectory", kind="arc", views=1, **camera),
        "images": node(
            "DP3D_RenderCameraConditions", cameras=["path", 0], subject=0, control_net=["control", 0], **size
        ),
        "noise": node("DP3D_3DAwareNoise", vae=["base", 1], cameras=["path", 0], mode="random", seed=0, **size),
        "shown": node("PreviewImage", images=["images", 0]),
        "shown too": node("PreviewImage", images=["noise", 2]),
    }


def sides(result) -> tuple[int, int]:
    """(condition images, views) of a run; the latents fit the views."""
    image, proxies = result.values["images"][0], result.values["noise"][2]
    assert result.values["noise"][0]["samples"].shape[-1] * 8 == proxies.shape[1] == proxies.shape[2]
    return image.shape[1], proxies.shape[1]


@pytest.mark.parametrize("side", [SIDE, OTHER_SIDE])
def test_zero_is_what_the_files_say(run_workflow, sized, side):
    sized(side)
    assert sides(run_workflow(graph())) == (side, side)


def test_zero_is_the_default(host, pack):
    for name in ("DP3D_RenderCameraConditions", "DP3D_3DAwareNoise"):
        [widget] = [
            each for each in host.nodes.NODE_CLASS_MAPPINGS[name].define_schema().inputs if each.id == "resolution"
        ]
        assert widget.default == 0


def test_a_number_counts(run_workflow, sized):
    """What saved graphs have: the number goes before the files."""
    sized(SIDE)
    assert sides(run_workflow(graph(resolution=128))) == (128, 128)


def test_saved_graphs_without_the_new_input(run_workflow, sized):
    sized(SIDE)
    prompt = graph(resolution=128)
    del prompt["images"]["inputs"]["control_net"]
    assert sides(run_workflow(prompt)) == (128, 128)


def test_512_where_nothing_says_more(run_workflow, sized):
    """SD1.5's own files and conversions of the release."""
    sized(None)
    assert sides(run_workflow(graph())) == (512, 512)
    sized(SIDE)
    prompt = graph()
    del prompt["images"]["inputs"]["control_net"]
    assert sides(run_workflow(prompt)) == (512, SIDE)


def test_a_graph_follows_weights_of_another_size(host, pack, sized):
    """On one server: the file is replaced, the graph stays."""
    executor = host.new_executor()
    found = []
    for side in (SIDE, OTHER_SIDE):
        sized(side)
        found.append(sides(host.run_workflow(graph(), executor)))
    assert found == [(SIDE, SIDE), (OTHER_SIDE, OTHER_SIDE)]


def test_the_host_s_copies_know_it_too(pack, sized):
    folder = sized(OTHER_SIDE)
    control = pack.patches.view_controlnet.load_view_controlnet(folder / "view_controlnet.safetensors")
    assert pack.host.loading.trained_side(control.copy()) == OTHER_SIDE
    stock = pack.patches.view_controlnet.build_view_controlnet(
        control.control_model.state_dict(), pack.diffportrait3d.networks.UNetConfig(model_channels=32, context_dim=32)
    )
    assert pack.host.loading.trained_side(stock) == 512, "an object that no file of ours was read for"


def test_the_miniature_says_what_it_was_trained_at(pack, repository):
    """All networks that ship agree, so that templates can leave the number to them."""
    from diffportrait3d.weights.files import read_metadata

    weights = repository / "weights/miniature"
    kinds = ("unet", "autoencoder", "reference_encoder", "view_controlnet", "view_consistency", "novel_view")
    said = {read_metadata(weights / f"{kind}.safetensors")["image_size"] for kind in kinds}
    loading, control = pack.host.loading, pack.patches.view_controlnet
    assert said == {loading.trained_side(loading.load_vae(weights / "autoencoder.safetensors"))}
    assert said == {loading.trained_side(control.load_view_controlnet(weights / "view_controlnet.safetensors"))}
    with Image.open(weights / "portrait.png") as portrait:
        assert min(portrait.size) >= said.pop()


def test_shipped_workflows_of_the_miniature_leave_it_to_the_files(repository):
    """No number that would be wrong with the next weights, in any graph that starts with Load Miniature."""
    found = []
    for path in (repository / "workflows/api").glob("*.json"):
        prompt = json.loads(path.read_text(encoding="utf-8"))
        kinds = {node["class_type"] for node in prompt.values()}
        if "DP3D_LoadMiniature" in kinds:
            found += [
                (path.name, node["inputs"]["resolution"])
                for node in prompt.values()
                if node["class_type"] in ("DP3D_RenderCameraConditions", "DP3D_3DAwareNoise")
            ]
    assert found and {resolution for _, resolution in found} == {0}, found


def test_portrait(host, pack, sized):
    """The file beside the networks, as it is; read anew when it changes."""
    folder = sized(SIDE)
    executor = host.new_executor()
    for count, (height, width) in enumerate([(40, 56), (24, 24)]):
        pixels = np.random.default_rng(count).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "portrait.png")
        os.utime(folder / "portrait.png", ns=(0, count))
        portrait = host.run_workflow({**graph(), **SEEN}, executor).values["base"][3]
        assert torch.equal(portrait, torch.from_numpy(pixels / np.float32(255))[None])


def test_without_a_portrait_the_rest_works(host, run_workflow, sized):
    """A miniature of one's own has none: only the node that wants it does not run, and the editor is told why."""
    folder, messages = sized(SIDE), host.server.messages
    host.loop.run_until_complete(asyncio.sleep(0))  # what earlier tests of this process have sent gets into the queue
    while not messages.empty():
        messages.get_nowait()
    result = run_workflow({**graph(), **SEEN})
    assert sides(result) == (SIDE, SIDE) and "seen" not in result.outputs
    host.loop.run_until_complete(asyncio.sleep(0))  # what was sent from outside of the loop gets into the queue
    sent = [messages.get_nowait() for _ in range(messages.qsize())]
    [message] = [data for event, data, _ in sent if event == "execution_error"]
    assert message["node_id"] == "seen"
    assert f"there is no {folder / 'portrait.png'}; put a portrait there" in message["exception_message"]
