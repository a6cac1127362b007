"""Cameras and condition pictures as files, through the host's input and output folders."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras import labels as camera_math


@pytest.fixture
def folders(host, pack):
    """The host's input and output folder; whatever a test adds there is removed."""
    both = [Path(host.folder_paths.get_input_directory()), Path(host.folder_paths.get_output_directory())]
    before = {folder: set(folder.iterdir()) for folder in both}
    yield both
    for folder in both:
        for path in set(folder.iterdir()) - before[folder]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def run(host, node_type: str, **inputs):
    """Output values of one node, run by the host (with a node behind it that makes the host run it)."""
    prompt = {"1": {"class_type": node_type, "inputs": inputs}}
    prompt["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    return host.run_workflow(prompt).values["1"]


def trajectory_node(kind: str, views: int, pitch: float) -> dict:
    """Camera Trajectory in API format, from -45 to 45 degrees of yaw and -pitch to pitch."""
    angles = {"yaw_min": -45.0, "yaw_max": 45.0, "pitch_min": -pitch, "pitch_max": pitch, "roll": 0.0}
    inputs = {"kind": kind, "views": views, **angles, "radius": 2.7, "fov": 13.37}
    return {"class_type": "DP3D_CameraTrajectory", "inputs": inputs}


@pytest.mark.parametrize("file_format", ["json, EG3D's dataset.json", "json, plain list", "npy"])
def test_saved_cameras_are_loaded_again(host, folders, file_format):
    prompt = {
        "path": trajectory_node("orbit", 12, 10.0),
        "save": {
            "class_type": "DP3D_SaveCameras",
            "inputs": {"cameras": ["path", 0], "filename_prefix": "takes/one", "format": file_format},
        },
    }
    values = host.run_workflow(prompt).values
    second = host.run_workflow(prompt).values["save"][0]
    written = Path(values["save"][0])
    assert written.parent == folders[1] / "takes" and Path(second) != written
    assert sorted(path.name for path in written.parent.iterdir()) == sorted([written.name, Path(second).name])
    cameras, views = run(host, "DP3D_LoadCameras", file=f"takes/{written.name} [output]")
    assert torch.equal(cameras["labels"], values["path"][0]["labels"]) and views == 12


def test_saving_stays_in_the_output_folder(host, folders):
    cameras = {"labels": camera_math.orbit_camera([0.0], 0.0)}
    save = host.nodes.NODE_CLASS_MAPPINGS["DP3D_SaveCameras"]
    with pytest.raises(Exception, match="outside the output folder"):
        save.execute(cameras, "../elsewhere", "npy")
    with pytest.raises(ValueError, match="filename_prefix is empty"):
        save.execute(cameras, " ", "npy")


def test_a_folder_of_labels_and_a_changed_file(host, folders):
    labels = camera_math.trajectory("arc", 11)
    folder = folders[0] / "labels"
    folder.mkdir()
    for view, label in enumerate(labels):
        np.save(folder / f"v{view}.npy", label.numpy())
    load = host.nodes.NODE_CLASS_MAPPINGS["DP3D_LoadCameras"]
    assert {"labels", "labels/v10.npy"} <= set(load.define_schema().inputs[0].options)
    before = load.fingerprint_inputs("labels")
    assert torch.equal(load.execute("labels").args[0]["labels"], labels)
    np.save(folder / "v0.npy", labels[5].numpy())
    os.utime(folder / "v0.npy", ns=(1, 1))
    assert load.fingerprint_inputs("labels") != before


def test_bad_labels_name_file_and_value(host, folders):
    label = camera_math.orbit_camera(0, 0).tolist()
    (folders[0] / "bad.json").write_text(json.dumps({"labels": [["a.png", label], ["b.png", label[:24]]]}))
    with pytest.raises(RuntimeError, match=r"bad\.json: .*view 1 \(b\.png\) has 24 numbers"):
        run(host, "DP3D_LoadCameras", file="bad.json")
    with pytest.raises(RuntimeError, match="no camera file 'gone.json' .*bad.json"):
        run(host, "DP3D_LoadCameras", file="gone.json")


def save_picture(path: Path, size: tuple[int, int], colour) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_of_renders_in_natural_order(host, folders):
    for view in range(11):
        save_picture(folders[0] / "renders" / f"view{view}.png", (20 + view, 30), (view, 0, 0))
    (folders[0] / "renders" / "notes.txt").write_text("not a picture")
    images, views = run(host, "DP3D_LoadCameraConditions", folder="renders", width=64, height=128)
    assert images.shape == (11, 128, 64, 3) and views == 11
    assert (images[:, 5, 5, 0] * 255).round().tolist() == list(range(11))


def test_renders_of_the_right_size_are_untouched_and_others_cropped(host, folders):
    load = host.nodes.NODE_CLASS_MAPPINGS["DP3D_LoadCameraConditions"]
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    wide = np.full((128, 256, 3), 200, dtype=np.uint8)
    wide[:, :64] = wide[:, 192:] = 0  # beyond the square in the middle
    (folders[0] / "two").mkdir()
    Image.fromarray(pixels).save(folders[0] / "two" / "1.png")
    Image.fromarray(wide).save(folders[0] / "two" / "2.PNG")
    images = load.execute("two", 64, 64).args[0]
    assert torch.equal(images[0], torch.from_numpy(pixels / np.float32(255)))
    assert (images[1] - 200 / 255).abs().max() < 1e-6


def test_bad_renders_are_named(host, folders):
    load = host.nodes.NODE_CLASS_MAPPINGS["DP3D_LoadCameraConditions"]
    save_picture(folders[0] / "broken" / "a.png", (8, 8), "red")
    (folders[0] / "broken" / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken/b\.png is not an image"):
        load.execute("broken", 64, 64)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(folders[0] / "broken" / "b.png")
    os.truncate(folders[0] / "broken" / "b.png", 5000)
    with pytest.raises(ValueError, match=r"broken/b\.png is not an image"):
        load.execute("broken", 64, 64)
    with pytest.raises(RuntimeError, match="no image folder 'renders' .*broken"):
        run(host, "DP3D_LoadCameraConditions", folder="renders", width=64, height=64)
    with pytest.raises(ValueError, match="no image folder '../..'"):
        load.execute("../..", 64, 64)


def test_every_kind_of_image_file_is_read_and_what_was_decided_is_logged(host, folders, caplog):
    """16-bit grey read 0.984 for 0.5, transparent areas showed the colour beneath them."""
    folder, exif = folders[0] / "kinds", Image.Exif()
    folder.mkdir()
    exif[0x0112] = 6
    Image.fromarray(np.full((64, 64), 32768, np.uint16)).save(folder / "0.png")
    Image.fromarray(np.full((64, 64), 32768, np.uint16)).save(folder / "1.tif")
    Image.new("RGBA", (64, 64), (255, 0, 255, 0)).save(folder / "2.png")
    stored = np.zeros((64, 64, 3), np.uint8)
    stored[:, :32] = 255  # its left half is the upper half of the upright image
    Image.fromarray(stored).save(folder / "3.png", exif=exif)
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    red.save(folder / "4.webp", save_all=True, append_images=[blue], lossless=True)
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(folder / "5.tif")
    images, views = run(host, "DP3D_LoadCameraConditions", folder="kinds", width=64, height=64)
    assert views == 6
    assert images.mean((1, 2, 3))[:2].tolist() == pytest.approx([32768 / 65535] * 2, abs=1e-6)
    assert images[2].min() == 1
    assert images[3, :32].min() == 1 and images[3, 32:].max() == 0
    assert images[4, 0, 0].tolist() == [1, 0, 0] and images[5, 0, 0].tolist() == [1, 0, 0]
    for said in ("2.png': transparent areas are filled with white", "3.png': it is turned up", "4.webp': it has 2"):
        assert said in caplog.text


def export(host, images: torch.Tensor, labels: torch.Tensor, **extras) -> Path:
    inputs = {"filename_prefix": "sets/head", "start_points": 500, **extras}
    node = host.nodes.NODE_CLASS_MAPPINGS["DP3D_ExportViews"]
    return Path(node.execute(images, {"labels": labels}, **inputs).args[0])


def test_views_are_exported_below_the_output_folder(host, folders):
    prompt = {
        "path": trajectory_node("arc", 3, 0.0),
        "views": {
            "class_type": "DP3D_RenderCameraConditions",
            "inputs": {"cameras": ["path", 0], "resolution": 64, "subject": 1},
        },
        "masks": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}},
        "three": {"class_type": "RepeatImageBatch", "inputs": {"image": ["as image", 0], "amount": 3}},
        "as image": {"class_type": "MaskToImage", "inputs": {"mask": ["masks", 0]}},
        "as masks": {"class_type": "ImageToMask", "inputs": {"image": ["three", 0], "channel": "red"}},
        "export": {
            "class_type": "DP3D_ExportViews",
            "inputs": {
                "images": ["views", 0],
                "cameras": ["path", 0],
                "masks": ["as masks", 0],
                "filename_prefix": "sets/head",
                "start_points": 500,
            },
        },
    }
    folder = Path(host.run_workflow(prompt).values["export"][0])
    assert folder == folders[1] / "sets" / "head_00001"
    assert Path(host.run_workflow(prompt).values["export"][0]) == folders[1] / "sets" / "head_00002"
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    assert [frame["file_path"] for frame in frames] == [f"images/view_00{view}.png" for view in range(3)]
    assert np.asarray(Image.open(folder / frames[0]["mask_path"])).min() == 255
    assert len((folder / "sparse/0/points3D.txt").read_text().splitlines()) > 200


def test_what_cannot_be_exported_leaves_nothing(host, folders):
    images, labels = torch.zeros(2, 8, 8, 3), camera_math.orbit_camera([0.0, 10.0], 0.0)
    half = torch.ones(2, 8, 8)
    half[1] = 0
    for wrong, message in (
        ({"images": images[:1]}, "1 images and 2 cameras"),
        ({"images": images / 0}, "images contains NaN"),
        ({"images": images[:0]}, "images is an empty batch"),
        ({"masks": half}, "mask of view 1 is empty"),
        ({"masks": torch.ones(2, 4, 4)}, r"masks of shape \(2, 4, 4\)"),
        ({"filename_prefix": ""}, "filename_prefix is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            export(host, **{"images": images, "labels": labels, **wrong})
    assert not list((folders[1] / "sets").iterdir())
    bare = export(host, images, labels, start_points=0)
    assert (bare / "sparse/0/points3D.txt").read_text().count("\n") == 1


def test_prefixes_are_filled_in_as_by_save_image(host, folders, monkeypatch):
    """Every token of the host's, against the folder that its own Save Image makes of the same prefix."""
    monkeypatch.setattr(time, "localtime", lambda *seconds: time.struct_time((2031, 2, 3, 4, 5, 6, 0, 34, 0)))
    prefix = "%year%/%month%-%day%_%hour%%minute%%second%/%width%x%height%_%batch_num%"
    prompt = {
        "images": {"class_type": "EmptyImage", "inputs": {"width": 24, "height": 16, "batch_size": 2, "color": 0}},
        "path": trajectory_node("arc", 2, 0.0),
        "host": {"class_type": "SaveImage", "inputs": {"images": ["images", 0], "filename_prefix": f"host/{prefix}"}},
        "views": {
            "class_type": "DP3D_ExportViews",
            "inputs": {
                "images": ["images", 0],
                "cameras": ["path", 0],
                "filename_prefix": f"views/{prefix}",
                "start_points": 0,
            },
        },
        "cameras": {
            "class_type": "DP3D_SaveCameras",
            "inputs": {
                "cameras": ["path", 0],
                "images": ["images", 0],
                "filename_prefix": f"cameras/{prefix}",
                "format": "npy",
            },
        },
    }
    result = host.run_workflow(prompt)
    saved = result.outputs["host"]["images"][0]
    below = Path(saved["subfolder"], saved["filename"].removesuffix("_.png")).relative_to("host")
    assert below == Path("2031/02-03_040506/24x16_0_00001")
    assert Path(result.values["views"][0]) == folders[1] / "views" / below
    assert Path(result.values["cameras"][0]) == folders[1] / "cameras" / f"{below}_.npy"


@pytest.mark.parametrize("prefix", ["takes/%width%", "%height%/path", "%width%x%height%"])
def test_cameras_alone_have_no_size(host, folders, prefix):
    save = host.nodes.NODE_CLASS_MAPPINGS["DP3D_SaveCameras"]
    cameras = {"labels": camera_math.orbit_camera([0.0], 0.0)}
    with pytest.raises(ValueError, match="cameras alone have no size in pixels; connect the views to images"):
        save.execute(cameras, prefix, "npy")
    assert Path(save.execute(cameras, prefix, "npy", torch.zeros(1, 5, 7, 3)).args[0]).is_file()


def fill(folder: Path) -> None:
    """Cameras, a folder of cameras, and a folder of one image, in a new folder."""
    (folder / "labels").mkdir(parents=True)
    np.save(folder / "path.npy", camera_math.trajectory("arc", 3).numpy())
    for view in range(2):
        np.save(folder / f"labels/{view}.npy", camera_math.orbit_camera(view, 0).numpy())
    save_picture(folder / "renders" / "0.png", (64, 64), "red")


@pytest.mark.parametrize("root", [0, 1], ids=["input", "output"])
def test_linked_folders_are_listed_and_read(host, folders, tmp_path, root):
    """A link in the folder itself, one below it, and one to a single file, all to places outside."""
    fill(tmp_path / "real")
    (folders[root] / "own").mkdir()
    (folders[root] / "linked").symlink_to(tmp_path / "real", target_is_directory=True)
    (folders[root] / "own" / "deep").symlink_to(tmp_path / "real", target_is_directory=True)
    (folders[root] / "one.npy").symlink_to(tmp_path / "real" / "path.npy")
    (folders[root] / "broken.npy").symlink_to(tmp_path / "nothing.npy")
    mark = " [output]" if root else ""
    names = host.nodes.NODE_CLASS_MAPPINGS["DP3D_LoadCameras"].define_schema().inputs[0].options
    listed = ("linked/path.npy", "linked/labels", "own/deep/path.npy", "one.npy")
    assert {f"{name}{mark}" for name in listed} <= set(names)
    assert f"broken.npy{mark}" not in names
    for name, count in (("linked/path.npy", 3), ("linked/labels", 2), ("own/deep/path.npy", 3), ("one.npy", 3)):
        assert run(host, "DP3D_LoadCameras", file=f"{name}{mark}")[1] == count
    for name in ("linked/renders", "own/deep/renders"):
        images, _ = run(host, "DP3D_LoadCameraConditions", folder=f"{name}{mark}", width=64, height=64)
        assert images.shape == (1, 64, 64, 3)


def test_links_in_a_circle_end(host, folders, tmp_path):
    """To the folder itself, to one above it, and two folders that link to each other: each file a finite number of
    times, and under its own name."""
    for name in ("a", "b"):
        fill(folders[0] / name)
    (folders[0] / "a" / "self").symlink_to(folders[0] / "a", target_is_directory=True)
    (folders[0] / "a" / "up").symlink_to(folders[0], target_is_directory=True)
    (folders[0] / "a" / "other").symlink_to(folders[0] / "b", target_is_directory=True)
    (folders[0] / "b" / "other").symlink_to(folders[0] / "a", target_is_directory=True)
    (folders[0] / "loop").symlink_to(folders[0] / "loop")

    def names(node_id: str, end: str) -> list[str]:
        options = host.nodes.NODE_CLASS_MAPPINGS[node_id].define_schema().inputs[0].options
        return sorted(name for name in options if name.endswith(end))

    assert names("DP3D_LoadCameras", "path.npy") == ["a/other/path.npy", "a/path.npy", "b/other/path.npy", "b/path.npy"]
    assert names("DP3D_LoadCameraConditions", "renders") == [
        "a/other/renders",
        "a/renders",
        "b/other/renders",
        "b/renders",
    ]


def test_linked_networks_in_a_circle(host, pack, folders, tmp_path, write_networks):
    """Folders of models, too: followed as the host does, listed once."""
    models = Path(host.folder_paths.models_dir) / "diffportrait3d"
    write_networks(tmp_path / "nets")
    (tmp_path / "nets" / "again").symlink_to(tmp_path / "nets", target_is_directory=True)
    models.mkdir(exist_ok=True)
    (models / "linked_nets").symlink_to(tmp_path / "nets", target_is_directory=True)
    try:
        names = host.nodes.NODE_CLASS_MAPPINGS["DP3D_LoadNovelView"].define_schema().inputs[0].options
        assert [name for name in names if "linked_nets" in name] == ["linked_nets/novel_view.safetensors"]
        assert run(host, "DP3D_LoadNovelView", name="linked_nets/novel_view.safetensors")
    finally:
        (models / "linked_nets").unlink()


def test_too_few_start_points_are_said(host, folders, caplog):
    """Some were asked for, but no camera sees enough of them to start from."""
    images, away = torch.zeros(2, 8, 8, 3), camera_math.orbit_camera([0.0, 10.0], 0.0)
    away[:, [0, 2, 8, 10]] *= -1  # half a turn about y: from the head into the void
    with caplog.at_level(logging.WARNING):
        export(host, images, away)
    assert "the cameras see 0 of the start points" in caplog.text
    caplog.clear()
    export(host, images, camera_math.orbit_camera([0.0, 10.0], 0.0))
    export(host, images, camera_math.orbit_camera([0.0, 10.0], 0.0), start_points=0)
    assert "start points" not in caplog.text
