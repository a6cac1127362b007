"""Cameras and condition pictures as files, through the host's input and output folders."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d import cameras as camera_math


@pytest.fixture
def folders(host, pack):
    """The host's input and output folder; whatever a test adds there is removed."""
    both = [Path(host.folder_paths.get_input_directory()), Path(host.folder_paths.get_output_directory())]
    before = {folder: set(folder.iterdir()) for folder in both}
    yield both
    for folder in both:
        for path in set(folder.iterdir()) - before[folder]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(host, node_type: str, **inputs):
    """Output values of one node, run by the host (with a node behind it that makes the host run it)."""
    prompt = {"1": {"class_type": node_type, "inputs": inputs}}
    prompt["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}
    return host.run_workflow(prompt).values["1"]


@pytest.mark.parametrize("file_format", ["json, EG3D's dataset.json", "json, plain list", "npy"])
def test_saved_cameras_are_loaded_again(host, folders, file_format):
    prompt = {
        "path": {"class_type": "DP3D_CameraTrajectory", "inputs": {
            "kind": "orbit", "views": 12, "yaw_min": -45.0, "yaw_max": 45.0, "pitch_min": -10.0, "pitch_max": 10.0,
            "roll": 0.0, "radius": 2.7, "fov": 13.37}},
        "save": {"class_type": "DP3D_SaveCameras", "inputs": {
            "cameras": ["path", 0], "filename_prefix": "takes/one", "format": file_format}},
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
    with pytest.raises(ValueError, match=r"broken/b\.png is not a picture"):
        load.execute("broken", 64, 64)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(folders[0] / "broken" / "b.png")
    os.truncate(folders[0] / "broken" / "b.png", 5000)
    with pytest.raises(ValueError, match=r"broken/b\.png is not a picture"):
        load.execute("broken", 64, 64)
    with pytest.raises(RuntimeError, match="no picture folder 'renders' .*broken"):
        run(host, "DP3D_LoadCameraConditions", folder="renders", width=64, height=64)
    with pytest.raises(ValueError, match="Invalid file path"):
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
        "path": {"class_type": "DP3D_CameraTrajectory", "inputs": {
            "kind": "arc", "views": 3, "yaw_min": -45.0, "yaw_max": 45.0, "pitch_min": 0.0, "pitch_max": 0.0,
            "roll": 0.0, "radius": 2.7, "fov": 13.37}},
        "views": {"class_type": "DP3D_RenderCameraConditions", "inputs": {
            "cameras": ["path", 0], "resolution": 64, "subject": 1}},
        "masks": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}},
        "three": {"class_type": "RepeatImageBatch", "inputs": {"image": ["as image", 0], "amount": 3}},
        "as image": {"class_type": "MaskToImage", "inputs": {"mask": ["masks", 0]}},
        "as masks": {"class_type": "ImageToMask", "inputs": {"image": ["three", 0], "channel": "red"}},
        "export": {"class_type": "DP3D_ExportViews", "inputs": {
            "images": ["views", 0], "cameras": ["path", 0], "masks": ["as masks", 0],
            "filename_prefix": "sets/head", "start_points": 500}},
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
        ({"images": images[:0], "labels": labels[:0]}, "images is an empty batch"),
        ({"masks": half}, "mask of view 1 is empty"),
        ({"masks": torch.ones(2, 4, 4)}, r"masks of shape \(2, 4, 4\)"),
        ({"filename_prefix": ""}, "filename_prefix is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            export(host, **{"images": images, "labels": labels, **wrong})
    assert not list((folders[1] / "sets").iterdir())
    bare = export(host, images, labels, start_points=0)
    assert (bare / "sparse/0/points3D.txt").read_text().count("\n") == 1
