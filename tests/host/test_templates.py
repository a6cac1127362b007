"""Templates that run with the miniature, as the editor queues them: fewer views and steps, nothing else changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffportrait3d.cameras.labels import trajectory
from diffportrait3d.synthetic_heads import portrait_scene, render_views
from diffportrait3d.synthetic_heads.points import head_points
from tools import frontend


def test_second_pass_at_twice_the_size(run_workflow):
    """By the same portrait, conditions, view consistency and noise; smaller again, the views are those of the first."""
    prompt = frontend.prompt("second_pass")
    first, second = prompt["12"]["inputs"], prompt["17"]["inputs"]
    shared = ("model", "positive", "noise", "view_consistency")
    assert [second[name] for name in shared] == [first[name] for name in shared]
    prompt["3"]["inputs"]["views"] = 2
    first |= {"preset": "custom", "steps": 4}
    second |= {"steps": 1}
    values = run_workflow(prompt).values
    views, large = values["13"][0], values["18"][0]  # [2, 256, 256, 3], [2, 512, 512, 3]
    assert large.shape == (2, 2 * views.shape[1], 2 * views.shape[2], 3)
    assert not torch.equal(values["17"][0]["samples"], values["16"][0]["samples"]), "denoised again"
    smaller = F.interpolate(large.movedim(-1, 1), scale_factor=0.5, mode="area").movedim(1, -1)
    difference = (smaller[:, None] - views[None]).abs().mean((2, 3, 4))  # [large, first]
    assert difference.diagonal().max() < 0.03 and difference.diagonal().max() < 0.5 * difference[0, 1], difference


def test_one_part_of_one_view_is_repainted(run_workflow):
    """Pixels outside of the mask and the other views stay to the bit, latents but for rounding; the part is new, and
    depends on the other views that are read."""
    prompt = frontend.prompt("repaint")
    prompt["3"]["inputs"]["views"] = 3
    prompt["15"]["inputs"]["value"] = "2"
    prompt["12"]["inputs"] |= {"preset": "custom", "steps": 2}
    prompt["25"]["inputs"] |= {"steps": 2}
    values = run_workflow(prompt).values
    before, after = values["13"][0], values["29"][1]
    latents, again = (values[number][0]["samples"] for number in ("12", "25"))
    mask = values["19"][0][0]  # [256, 256]
    assert torch.equal(after[:2], before[:2]) and torch.equal(after[2][mask == 0], before[2][mask == 0])
    assert (after[2][mask == 1] - before[2][mask == 1]).abs().mean() > 0.02
    kept = F.max_pool2d(mask[None], 8)[0] == 0  # [32, 32]
    assert 0.5 < kept.float().mean() < 1
    torch.testing.assert_close(again[:2], latents[:2])
    torch.testing.assert_close(again[2][:, kept], latents[2][:, kept])
    assert values["23"] and torch.equal(values["22"][1], before[:2]), "the others are read"
    prompt["23"]["inputs"]["strength"] = 0.0
    alone = run_workflow(prompt).values["29"][1]
    assert (alone - after)[2][mask == 1].abs().mean() > 0.005


def with_the_miniature(prompt: dict) -> dict:
    """A graph of the released weights with the networks that are here."""
    prompt["1"] = {"class_type": "DP3D_LoadMiniature", "inputs": {"name": "miniature"}}
    for number, name in (("5", "reference_encoder"), ("7", "view_controlnet"), ("9", "view_consistency")):
        prompt[number]["inputs"]["name"] = f"miniature/{name}.safetensors"
    prompt["6"]["inputs"]["vae"] = prompt["11"]["inputs"]["vae"] = prompt["13"]["inputs"]["vae"] = ["1", 1]
    prompt["8"]["inputs"]["positive"] = ["1", 2]
    del prompt["10"]
    return prompt


def test_the_template_of_a_photograph_runs(host, pack, run_workflow, photograph, caplog):
    """Template 7 with the miniature in place of the weights that are not here: video, grid and export of a photograph,
    and the warning that the miniature does not know photographs."""
    inputs = Path(host.folder_paths.get_input_directory())
    (inputs / "astronaut.png").write_bytes(photograph.read_bytes())
    prompt = with_the_miniature(frontend.prompt("photograph"))
    prompt["2"]["inputs"]["image"] = "astronaut.png"
    prompt["3"]["inputs"]["views"] = 3
    prompt["11"]["inputs"]["resolution"] = 128
    prompt["12"]["inputs"] |= {"preset": "custom", "steps": 1, "eta": 0.0}
    result = run_workflow(prompt)
    views = result.values["13"][0]
    assert views.shape == (3, 128, 128, 3) and torch.isfinite(views).all() and views.std() > 0.02
    assert result.values["16"] and result.outputs["19"]["images"][0]["filename"].endswith(".mp4")
    folder = Path(result.values["20"][0])
    assert len(list((folder / "images").iterdir())) == 3 and (folder / "transforms.json").is_file()
    said = [record.message for record in caplog.records if "Apply Reference Attention" in record.message]
    assert len(said) == 1 and "rendered heads only" in said[0]


@pytest.fixture
def splat_file(host):
    """The drawn head as splats in input/3d, as the host writes them: round ones of 0.006 at points of its surface."""
    from comfy_api.latest import Types

    labels = trajectory("arc", 5, (-60.0, 60.0), (0.0, 0.0))
    images = render_views(portrait_scene(0), labels, 64).image.movedim(1, -1)
    points = head_points(images, labels, 6000)
    count = len(points.positions)
    turns, colours = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, count, 4), (points.colours - 0.5) / 0.2821
    sizes, opacities = torch.full((1, count, 3), 0.006), torch.ones(1, count, 1)
    splat = Types.SPLAT(points.positions[None].float(), sizes, turns, opacities, colours[None, :, None].float())
    name = "3d/drawn_head.ply"
    path = Path(host.folder_paths.get_input_directory()) / name
    path.parent.mkdir(exist_ok=True)
    host.nodes.NODE_CLASS_MAPPINGS["SplatToFile3D"].execute(splat, "ply").args[0].save_to(str(path))
    return name


def test_splats_are_the_proxies(host, run_workflow, splat_file):
    """Template 10 with the miniature in place of the weights that are not here: the splats that the host renders at our
    cameras lie where our own renderer draws the head, and views are made from them."""
    prompt = with_the_miniature(frontend.prompt("splats"))
    image = "portrait.png"
    shutil.copy(frontend.PORTRAIT, Path(host.folder_paths.get_input_directory()) / image)
    viewport = {"image": image, "mask": image, "normal": image, "recording": "", "camera_info": None}
    prompt["21"]["inputs"] |= {"model_file": splat_file, "image": viewport}
    prompt["3"]["inputs"]["views"] = 2
    for number in ("25", "28"):
        prompt[number]["inputs"] |= {"width": 128, "height": 128, "background": "#000000"}
    prompt["17"]["inputs"]["points"] = "0.4 0.45 0.6 0.45 0.5 0.55 0.43 0.65 0.57 0.65"
    prompt["11"]["inputs"]["resolution"] = 128
    prompt["12"]["inputs"] |= {"preset": "custom", "steps": 1, "eta": 0.0}
    values = run_workflow(prompt).values
    [proxies] = values["26"] if isinstance(values["26"][0], list) else [values["26"][0]]
    assert proxies.shape == (2, 128, 128, 3) and torch.equal(values["11"][2], proxies)
    heads = render_views(portrait_scene(0), values["3"][0]["labels"], 128).mask > 0.5
    splats = torch.cat(values["25"][1]) > 0.5
    overlap = (heads & splats).sum((1, 2)) / (heads | splats).sum((1, 2))
    assert overlap.min() > 0.7, overlap
    assert values["13"][0].shape == (2, 128, 128, 3)
