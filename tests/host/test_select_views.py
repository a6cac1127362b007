"""Select Views and Join Views: parts of a batch, whole again, and one view made anew among the others."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.cameras.labels import trajectory
from evaluation.goldens.host import NARROW_CONFIG, HostPath, host_path

VIEWS = 5
SCHEDULE = {"preset": "custom", "steps": 3, "eta": 0.5}


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def latent():
    return {"samples": draw(1, VIEWS, 4, 8, 8)}


@pytest.fixture(scope="module")
def images():
    return torch.rand(VIEWS, 64, 64, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def cameras():
    return {"labels": trajectory("arc", VIEWS, (-40.0, 40.0), (0.0, 0.0))}  # 20 degrees apart


@pytest.fixture(scope="module")
def select(host, pack):
    def run(
        numbers="0",
        choose="numbers",
        yaw=(-180.0, 180.0),
        pitch=(-90.0, 90.0),
        at=(0.0, 0.0),
        count=1,
        invert=False,
        **batches,
    ):
        node = host.nodes.NODE_CLASS_MAPPINGS["DP3D_SelectViews"]
        return node.execute(choose, numbers, *yaw, *pitch, *at, count, invert, **batches).args

    return run


@pytest.fixture(scope="module")
def join(host, pack):
    return lambda selection, **batches: (
        host.nodes.NODE_CLASS_MAPPINGS["DP3D_JoinViews"].execute(selection, **batches).args
    )


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key]
        for key, value in found.items()
    )


@pytest.mark.parametrize("numbers", ["0", "4, 1", "-1", "4-0"])
@pytest.mark.parametrize("mask", [None, (VIEWS, 1, 16, 16), (VIEWS, 64, 64), (1, 1, 8, 8), (2, 1, 8, 8)])
@pytest.mark.parametrize("indices", [None, [7, 3, 9, 1, 2]])
def test_join_is_the_inverse(select, join, latent, images, cameras, numbers, mask, indices):
    """Of everything that is in a LATENT, whatever order was chosen, from two parts or into the whole batch."""
    if mask is not None:
        latent["noise_mask"] = draw(3, *mask)
    if indices is not None:
        latent["batch_index"] = indices
    latent["other"] = "kept"
    batches = {"latent": latent, "images": images, "cameras": cameras}
    part = select(numbers, **batches)
    rest = batches.values()
    if part[-1].others:
        rest = select(numbers, invert=True, **batches)[:3]
    for others in (rest, batches.values()):
        wired = dict(zip(("latent_rest", "images_rest", "cameras_rest"), others, strict=True))
        whole = join(part[-1], latent=part[0], images=part[1], cameras=part[2], **wired)
        expected = dict(latent)
        if mask is not None:
            masks = latent["noise_mask"].reshape(-1, 1, *latent["noise_mask"].shape[-2:])
            expected["noise_mask"] = masks.repeat(VIEWS, 1, 1, 1)[:VIEWS]
        assert same(whole[0], expected)
        assert torch.equal(whole[1], images) and torch.equal(whole[2]["labels"], cameras["labels"])


def test_parts_are_what_the_host_takes(host, select, latent):
    """A run of views, its mask and its batch index: as LatentFromBatch gives them, also from a part of a batch."""
    from_batch = host.nodes.NODE_CLASS_MAPPINGS["LatentFromBatch"]()
    latent["noise_mask"] = draw(3, VIEWS, 1, 8, 8)
    expected = from_batch.frombatch(latent, 1, 3)[0]
    part = select("1-3", latent=latent)[0]
    assert same(part, expected)
    assert same(select("2", latent=part)[0], from_batch.frombatch(expected, 2, 1)[0])


def test_reorder(select, latent, images, cameras):
    backwards = select("4-0", latent=latent, images=images, cameras=cameras)
    assert torch.equal(backwards[0]["samples"], latent["samples"].flip(0))
    assert backwards[0]["batch_index"] == [4, 3, 2, 1, 0]
    assert torch.equal(backwards[1], images.flip(0))
    assert torch.equal(backwards[2]["labels"], cameras["labels"].flip(0))


def test_by_angle(select, cameras, images):
    settings = {"cameras": cameras, "images": images}
    assert select(choose="angles", yaw=(-20.0, 20.0), **settings)[-1].numbers == (1, 2, 3)
    assert select(choose="angles", yaw=(20.0, -20.0), **settings)[-1].numbers == (0, 1, 3, 4)
    assert select(choose="nearest", at=(25.0, 3.0), count=2, **settings)[-1].numbers == (3, 4)
    assert select(choose="nearest", at=(25.0, 3.0), invert=True, **settings)[-1].numbers == (0, 1, 2, 4)


def test_redo_keeps_a_mask_that_is_there(select, latent):
    latent["noise_mask"] = draw(3, 1, 8, 8).sigmoid()
    redo = select("1, 3", latent=latent)[3]
    for view in range(VIEWS):
        assert torch.equal(redo["noise_mask"][view, 0], latent["noise_mask"][0] * (view in (1, 3)))
    assert torch.equal(redo["samples"], latent["samples"]) and "batch_index" not in redo


def test_latent_that_had_a_mask_on_one_side_only(select, join, latent):
    """Without a mask everything is made: ones, at the other side's size."""
    part, *_, selection = select("2", latent=latent)
    part["noise_mask"] = torch.zeros(1, 1, 8, 8)
    whole = join(selection, latent=part, latent_rest=latent)[0]
    assert whole["noise_mask"].flatten(1).amax(1).tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_view_from_elsewhere_takes_its_place(select, join, latent):
    """E.g. from VAE Encode, in half precision: the others keep their bits, the batch its numbers."""
    latent["batch_index"] = [10, 11, 12, 13, 14]
    selection = select("2", latent=latent)[-1]
    for rest in (latent, select("2", invert=True, latent=latent)[0]):
        whole = join(selection, latent={"samples": draw(9, 1, 4, 8, 8).half()}, latent_rest=rest)[0]
        assert torch.equal(whole["samples"][2], draw(9, 1, 4, 8, 8)[0].half().float())
        kept = [0, 1, 3, 4]
        assert torch.equal(whole["samples"][kept], latent["samples"][kept])
        assert [whole["batch_index"][i] for i in kept] == [10, 11, 13, 14]


def test_open_sockets_stop_only_what_hangs_on_them(run_workflow, host, monkeypatch):
    """Images alone: their part arrives; a node behind the cameras does not run, and the editor is told why."""
    sent, send = [], host.server.send_sync

    def record(event, data, sid=None):
        sent.append((event, data))
        send(event, data, sid)

    monkeypatch.setattr(host.server, "send_sync", record)
    image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 3, "color": 255}}
    inputs = {
        "choose": "numbers",
        "numbers": "1",
        "yaw_min": -180,
        "yaw_max": 180,
        "pitch_min": -90,
        "pitch_max": 90,
        "yaw": 0,
        "pitch": 0,
        "count": 1,
        "invert": False,
        "images": ["image", 0],
    }
    prompt = {
        "image": image,
        "select": {"class_type": "DP3D_SelectViews", "inputs": inputs},
        "shown": {"class_type": "PreviewImage", "inputs": {"images": ["select", 1]}},
    }
    assert run_workflow(prompt).values["select"][1].shape == (1, 8, 8, 3)
    prompt["cameras"] = {"class_type": "PreviewAny", "inputs": {"source": ["select", 2]}}
    result = run_workflow(prompt)
    assert "cameras" not in result.outputs and result.outputs["shown"]["images"]
    [error] = [data for event, data in sent if event == "execution_error"]
    assert error["node_id"] == "cameras"
    assert "Select Views gives no cameras: connect cameras to it" in error["exception_message"]


def sample(host, path, latent, seed, images, views=True):
    """View-Consistency Sampler with cameras."""
    positive = path.patches.view_controlnet.apply_view_controlnet([[draw(4, 1, 7, 32), {}]], path.control_net, images)
    node = host.nodes.NODE_CLASS_MAPPINGS["DP3D_ViewConsistencySampler"]
    return node.execute(
        path.model,
        positive,
        dict(latent),
        path.patches.noise.ViewNoise(seed),
        cfg=2.0,
        start="schedule",
        view_consistency=path.views if views else None,
        **SCHEDULE,
    ).args[0]


@pytest.mark.parametrize("numbers, changed", [("2", [2]), ("-1, 0", [0, 4])])
def test_redo_views_among_the_others(host, path, select, join, latent, images, numbers, changed):
    """The graph of the help page: the others come out bit for bit, the chosen ones are new and look at the others."""
    views = sample(host, path, latent, 1, images)
    _, _, _, redo, selection = select(numbers, latent=views)
    again = sample(host, path, redo, 2, images)
    whole = join(selection, latent=again, latent_rest=views)[0]
    kept = [i for i in range(VIEWS) if i not in changed]
    assert torch.equal(whole["samples"][kept], views["samples"][kept])
    for view in changed:
        assert (whole["samples"][view] - views["samples"][view]).norm() > 0.1 * views["samples"][view].norm()
    others = {**views, "samples": views["samples"].clone()}
    others["samples"][kept[0]] += draw(5, 4, 8, 8)
    seen = sample(host, path, select(numbers, latent=others)[3], 2, images)
    assert not torch.equal(seen["samples"][changed], again["samples"][changed]), "they look at the others"


def test_a_view_alone_is_the_view_of_its_batch(host, path, select, join, latent, images):
    """Without view consistency: the selected latent keeps its noise, at the start and at every step."""
    whole = sample(host, path, latent, 1, images, views=False)
    part, conditions, *_, selection = select("3, 1", latent=latent, images=images)
    alone = sample(host, path, part, 1, conditions, views=False)
    assert torch.allclose(alone["samples"], whole["samples"][[3, 1]], atol=1e-3)
    joined = join(selection, latent=alone, latent_rest=whole)[0]
    assert joined.keys() == whole.keys() and torch.allclose(joined["samples"], whole["samples"], atol=1e-3)
