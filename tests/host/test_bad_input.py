"""Every node with every kind of input that it must refuse, run by the real host: the error names the node, the input or
value, and a way out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.cameras.labels import trajectory
from diffportrait3d.networks import UNetConfig
from evaluation.goldens.core import NETWORKS
from evaluation.goldens.host import NARROW_CONFIG, HostPath, host_path

VIEWS, SIDE = 3, 64
NAN = float("nan")
FACE = "26 26, 38 26, 32 33, 27 39, 37 39"  # in images of SIDE
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 8,
    "context_in_dim": 8,
    "hidden_size": 24,
    "mlp_ratio": 1.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 8, 8],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}


class Given:
    """A node of the test: hands any object, named by its input, to the node behind it."""

    RETURN_TYPES, FUNCTION, values = ("*",), "give", {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING",)}}

    def give(self, name):
        return (self.values[name],)


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


@pytest.fixture(scope="module")
def files(host, write_networks):
    """Networks in models/diffportrait3d/narrow, and in the input folder what the nodes for files choose from."""
    networks = Path(host.folder_paths.models_dir) / "diffportrait3d/narrow"
    write_networks(networks)
    (networks / "damaged.safetensors").write_bytes(b"\x10\x00\x00")
    inputs = Path(host.folder_paths.get_input_directory()) / "bad_input"
    for folder in ("views", "broken"):
        (inputs / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(inputs / "views/0.png")
    (inputs / "broken/0.png").write_bytes(b"not a picture")
    np.save(inputs / "path.npy", trajectory("arc", VIEWS).numpy())
    np.save(inputs / "nan.npy", trajectory("arc", VIEWS).numpy() * np.nan)
    yield networks
    shutil.rmtree(networks)
    shutil.rmtree(inputs)


def flux(comfy):
    """A MODEL of another family than Stable Diffusion."""
    config = comfy.supported_models.Flux(dict(FLUX))
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, ""), load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module", autouse=True)
def values(host, pack, path, files, stock_autoencoder):
    """What `Given` can hand out, good and bad."""
    comfy, loading, control = path.comfy, path.pack.host.loading, path.patches.view_controlnet
    other = UNetConfig(model_channels=32, context_dim=48)
    config = pack.diffportrait3d.networks.UNetConfig.from_dict(other.to_dict())
    other_control = control.build_view_controlnet(NETWORKS["view_controlnet"](other).state_dict(), config)
    prompt = [[torch.ones(1, 7, 32), {}]]
    image = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    images, latent, labels = image.repeat(VIEWS, 1, 1, 1), torch.zeros(VIEWS, 4, 8, 8), trajectory("arc", VIEWS)
    masks = images[..., 0]
    one_black = masks.clone()
    one_black[1] = 0
    mode = {"mode": "orbit", "yaw": 0.0, "pitch": 0.0, "distance": 3.0}
    centre = {"target_x": 0.0, "target_y": 0.0, "target_z": 0.0}
    viewer = host.nodes.NODE_CLASS_MAPPINGS["CreateCameraInfo"].execute(mode, **centre, roll=0.0, fov=35.0).args[0]
    Given.values = {
        "model": path.model,
        "flux": flux(comfy),
        "encoder": path.encoder,
        "views": path.views,
        "other width": loading.build_model(NETWORKS["unet"](other).state_dict(), config, {}),
        "control": path.control_net,
        "adapter": comfy.controlnet.T2IAdapter(None, 3, 8, "nearest-exact"),
        "S": loading.load_novel_view(files / "novel_view.safetensors"),
        "vae": comfy.sd.VAE(sd=stock_autoencoder()),
        "empty vae": comfy.sd.VAE(sd={}),
        "vae of 16": comfy.sd.VAE(sd=stock_autoencoder(16)),  # as Flux and SD3 have it
        "image": image,
        "nan image": image * NAN,
        "images": images,
        "two": images[:2],
        "none": images[:0],
        "nan": images * NAN,
        "empty mask": masks[:1] * 0,
        "nan mask": masks[:1] * NAN,
        "masks": masks,
        "two masks": masks[:2],
        "one black mask": one_black,
        "small masks": masks[:, ::2, ::2],
        "cameras": {"labels": labels},
        "camera": {"labels": labels[:1]},
        "nan cameras": {"labels": labels * NAN},
        "latent": {"samples": latent},
        "one view": {"samples": latent[:1]},
        "no view": {"samples": latent[:0]},
        "nan latent": {"samples": latent + NAN},
        "flux latent": {"samples": torch.ones(VIEWS, 16, 8, 8)},
        "noise": path.patches.noise.ViewNoise(0),
        "prompt": prompt,
        "no prompt": [],
        "sdxl prompt": [[torch.ones(1, 7, 48), {}]],
        "2 conditions": control.apply_view_controlnet(prompt, path.control_net, images[:2]),
        "other control": control.apply_view_controlnet(prompt, other_control, images),
        "first of three": path.patches.view_batches.Selection((0,), VIEWS),
        "narrow view": {"samples": latent[:1, ..., :4]},
        "two views": {"samples": latent[:2]},
        "with alpha": torch.cat([images, images[..., :1]], -1),
        "viewer": viewer,
        "place": path.pack.host.photographs.Placement(image, torch.eye(3, dtype=torch.float64)),
        "nothing": None,
        "0": 0,
        "-1": -1,
        "32": 32,
        "NaN": NAN,
        "100": 100,
    }
    host.nodes.NODE_CLASS_MAPPINGS["Given"] = Given
    yield
    del host.nodes.NODE_CLASS_MAPPINGS["Given"]
    Given.values = {}


def defaults(host, node_id: str) -> dict:
    """The widgets of a node as the editor sets them."""
    inputs = host.nodes.NODE_CLASS_MAPPINGS[node_id].define_schema().inputs
    found = {
        each.id: each.default if each.default is not None else (getattr(each, "options", None) or [None])[0]
        for each in inputs
        if hasattr(each, "default") and not each.optional
    }
    return {name: value for name, value in found.items() if value is not None}


# What every node is given beside its widgets' defaults; "=name" is a wire from `Given`.
GOOD = {
    "DP3D_LoadMiniature": {"name": "narrow"},
    "DP3D_LoadReferenceEncoder": {"name": "narrow/reference_encoder.safetensors"},
    "DP3D_LoadViewControlNet": {"name": "narrow/view_controlnet.safetensors"},
    "DP3D_LoadViewConsistency": {"name": "narrow/view_consistency.safetensors"},
    "DP3D_LoadNovelView": {"name": "narrow/novel_view.safetensors"},
    "DP3D_ApplyReferenceAttention": {
        "model": "=model",
        "reference_encoder": "=encoder",
        "vae": "=vae",
        "image": "=image",
    },
    "DP3D_ViewControlNet": {"positive": "=prompt", "control_net": "=control", "image": "=images"},
    "DP3D_ApplyViewConsistency": {"model": "=model", "view_consistency": "=views"},
    "DP3D_CameraTrajectory": {},
    "DP3D_RenderCameraConditions": {"cameras": "=camera", "resolution": SIDE},
    "DP3D_CameraFromViewer": {"camera_info": "=viewer"},
    "DP3D_CameraToViewer": {"cameras": "=cameras"},
    "DP3D_ReferenceView": {"portrait": "=image", "resolution": SIDE},
    "DP3D_AlignPortrait": {"image": "=image", "points": FACE, "resolution": SIDE},
    "DP3D_PasteBack": {"place": "=place", "view": "=image"},
    "DP3D_ViewConsistencySampler": {
        "model": "=model",
        "positive": "=prompt",
        "latent": "=latent",
        "noise": "=noise",
        "view_consistency": "=views",
        "preset": "custom",
        "steps": 1,
    },
    "DP3D_ViewConsistencySchedule": {"model": "=model"},
    "DP3D_3DAwareNoise": {
        "vae": "=vae",
        "cameras": "=cameras",
        "novel_view": "=S",
        "image": "=image",
        "resolution": SIDE,
    },
    "DP3D_ViewGrid": {"images": "=images", "cameras": "=cameras"},
    "DP3D_Turntable": {"images": "=images"},
    "DP3D_LoadCameras": {"file": "bad_input/path.npy"},
    "DP3D_SaveCameras": {"cameras": "=cameras"},
    "DP3D_LoadCameraConditions": {"folder": "bad_input/views", "width": SIDE, "height": SIDE},
    "DP3D_ExportViews": {"images": "=images", "cameras": "=cameras", "masks": "=masks", "start_points": 0},
    "DP3D_SelectViews": {"latent": "=latent", "images": "=images", "cameras": "=cameras"},
    "DP3D_JoinViews": {"selection": "=first of three", "latent": "=one view", "latent_rest": "=latent"},
}
FILES = {
    "DP3D_LoadReferenceEncoder": "reference encoder",
    "DP3D_LoadViewControlNet": "view ControlNet",
    "DP3D_LoadViewConsistency": "view consistency",
    "DP3D_LoadNovelView": "novel-view model",
}
OTHER_FAMILY = "Flux is not of the SD1.5 family, .* connect an SD1.5 checkpoint"
OTHER_WIDTH = "fits a UNet with context_dim 32, but this MODEL has context_dim 48; load .* of one set together"
NO_VAE = "got no VAE: the checkpoint holds none; take one from Load VAE"
OTHER_VAE = "a VAE with latents of 16 channels .* connect the VAE of the base model"
BROKEN, EMPTY = "contains NaN or infinity; check the node it comes from", "is an empty batch; connect at least one"
BAD = [
    ("DP3D_LoadMiniature", {"name": "gone"}, "there is no base UNet 'gone' .found: .*narrow.* Searched: "),
    *((node, {"name": "gone"}, f"there is no {kind} 'gone' .found: .* Searched: ") for node, kind in FILES.items()),
    *(
        (
            node,
            {"name": "narrow/unet.safetensors"},
            f"is no {kind}: the file holds base UNet weights; choose .*narrow/",
        )
        for node, kind in FILES.items()
    ),
    *(
        (node, {"name": "narrow/damaged.safetensors"}, f"is no {kind}: .*not a readable safetensors")
        for node, kind in FILES.items()
    ),
    ("DP3D_ApplyReferenceAttention", {"model": "=flux"}, OTHER_FAMILY),
    ("DP3D_ApplyReferenceAttention", {"model": "=other width"}, OTHER_WIDTH),
    ("DP3D_ApplyReferenceAttention", {"vae": "=nothing"}, f"Reference attention {NO_VAE}"),
    ("DP3D_ApplyReferenceAttention", {"vae": "=empty vae"}, f"Reference attention {NO_VAE}"),
    ("DP3D_ApplyReferenceAttention", {"vae": "=vae of 16"}, f"Reference attention got {OTHER_VAE}"),
    ("DP3D_ApplyReferenceAttention", {"image": "=none"}, "needs at least one reference image, got an empty batch"),
    ("DP3D_ApplyReferenceAttention", {"image": "=nan image"}, f"image {BROKEN}"),
    ("DP3D_ApplyReferenceAttention", {"mask": "=empty mask"}, "mask 1 of 1 is empty: .* or leave the mask out"),
    ("DP3D_ApplyReferenceAttention", {"mask": "=nan mask"}, "mask contains NaN"),
    ("DP3D_ApplyReferenceAttention", {"mask": "=two masks"}, "2 reference masks for 1 references; give one for"),
    ("DP3D_ApplyReferenceAttention", {"strength": "=NaN"}, "strength must lie between 0.0 and 1.0, got nan"),
    (
        "DP3D_ApplyReferenceAttention",
        {"start_percent": 0.6, "end_percent": 0.5},
        "start_percent 0.6 and end_percent 0.5",
    ),
    ("DP3D_ViewControlNet", {"positive": "=no prompt"}, "positive holds no prompt; connect an encoded text"),
    ("DP3D_ViewControlNet", {"control_net": "=adapter"}, "not T2IAdapter"),
    ("DP3D_ViewControlNet", {"image": "=none"}, f"View ControlNet: image {EMPTY}"),
    ("DP3D_ViewControlNet", {"image": "=nan"}, f"View ControlNet: image {BROKEN}"),
    ("DP3D_ViewControlNet", {"strength": "=100"}, "View ControlNet: strength must lie between 0.0 and 2.0, got 100"),
    ("DP3D_ViewControlNet", {"start_percent": 0.6, "end_percent": 0.5}, "start_percent 0.6 and end_percent 0.5"),
    ("DP3D_ApplyViewConsistency", {"model": "=flux"}, OTHER_FAMILY),
    ("DP3D_ApplyViewConsistency", {"model": "=other width"}, OTHER_WIDTH),
    ("DP3D_ApplyViewConsistency", {"window_size": 1}, "A window needs at least 2 views, not 1"),
    ("DP3D_ApplyViewConsistency", {"window_size": 7}, "more than the 6 views .* choose 2 to 6, or 0"),
    ("DP3D_ApplyViewConsistency", {"window_size": 3, "overlap": 3}, "overlap of windows of 3 views must be 0 to 2"),
    ("DP3D_CameraTrajectory", {"views": 0}, "Value 0 smaller than min of 1.*views"),
    ("DP3D_CameraTrajectory", {"views": "=0"}, "Camera Trajectory: views must lie between 1 and 512, got 0"),
    ("DP3D_CameraTrajectory", {"yaw_min": "=NaN"}, "yaw_min must lie between -180.0 and 180.0, got nan"),
    ("DP3D_CameraTrajectory", {"pitch_max": "=100"}, "pitch_max must lie between -89.0 and 89.0, got 100"),
    ("DP3D_CameraTrajectory", {"radius": "=0"}, "radius must lie between 0.5 and 20.0, got 0"),
    ("DP3D_CameraTrajectory", {"kind": "keyframes"}, "no keyframes; write one per line as"),
    ("DP3D_CameraTrajectory", {"kind": "keyframes", "keyframes": "0 left"}, "line 1: pitch 'left' is not a number"),
    ("DP3D_RenderCameraConditions", {"resolution": "=-1"}, "resolution must lie between 0 and 2048, got -1"),
    (
        "DP3D_RenderCameraConditions",
        {"resolution": 32},
        "Render Camera Conditions: resolution must be 0 .the networks' own. or lie between 64 and 2048, got 32",
    ),
    ("DP3D_CameraFromViewer", {"camera_info": "=nothing"}, "gave no camera; open its viewport once"),
    ("DP3D_CameraToViewer", {"cameras": "=nan cameras"}, "view 0 contains NaN"),
    ("DP3D_ReferenceView", {"portrait": "=none"}, f"Reference View: portrait {EMPTY}"),
    ("DP3D_ReferenceView", {"portrait": "=nan image"}, f"Reference View: portrait {BROKEN}"),
    ("DP3D_ReferenceView", {"portrait": "=images"}, "takes one portrait, got 3 images; choose one"),
    ("DP3D_ReferenceView", {"pitch": "=100"}, "Reference View: pitch must lie between -89.0 and 89.0, got 100"),
    ("DP3D_AlignPortrait", {"image": "=none"}, f"Align Portrait: image {EMPTY}"),
    ("DP3D_AlignPortrait", {"image": "=nan image"}, f"Align Portrait: image {BROKEN}"),
    ("DP3D_AlignPortrait", {"image": "=images"}, "takes one photograph, got 3 images; choose one"),
    ("DP3D_AlignPortrait", {"points": "1 2 3"}, "3 numbers are no points: write x and y of five .*drag the five"),
    ("DP3D_AlignPortrait", {"points": "1 1, 2 2, 3 3, 4 4, 5 5"}, "do not form a face .*drag the five points"),
    (
        "DP3D_AlignPortrait",
        {"landmarks": "=camera"},
        "got an object of type dict; connect face landmarks, from",
    ),
    ("DP3D_AlignPortrait", {"face": 1}, "face 1 is none of the 1 found"),
    ("DP3D_AlignPortrait", {"mask": "=nan mask"}, f"Align Portrait: mask {BROKEN}"),
    ("DP3D_PasteBack", {"place": "=camera"}, "got an object of type dict; connect the place that Align Portrait gives"),
    ("DP3D_PasteBack", {"view": "=none"}, f"Paste Back: view {EMPTY}"),
    ("DP3D_PasteBack", {"view": "=images"}, "takes one view, got 3; choose one by Select Views"),
    ("DP3D_PasteBack", {"mask": "=nan mask"}, f"Paste Back: mask {BROKEN}"),
    ("DP3D_PasteBack", {"feather": "=NaN"}, "feather must lie between 0.0 and 0.5, got nan"),
    ("DP3D_ViewConsistencySampler", {"model": "=flux"}, OTHER_FAMILY),
    ("DP3D_ViewConsistencySampler", {"model": "=other width"}, OTHER_WIDTH),
    ("DP3D_ViewConsistencySampler", {"positive": "=no prompt"}, "positive holds no prompt; connect an encoded text"),
    (
        "DP3D_ViewConsistencySampler",
        {"positive": "=sdxl prompt"},
        "positive has 48 numbers per token, .* reads 32; encode",
    ),
    ("DP3D_ViewConsistencySampler", {"positive": "=2 conditions"}, "2 condition images for 3 views; give one per view"),
    ("DP3D_ViewConsistencySampler", {"positive": "=other control"}, "ControlNet fits a UNet with context_dim 48, but"),
    ("DP3D_ViewConsistencySampler", {"latent": "=no view"}, r"shape \(0, 4, 8, 8\), .* connect 3D-Aware Noise"),
    ("DP3D_ViewConsistencySampler", {"latent": "=one view"}, "at least 2 views in one batch, got 1; ask for more"),
    ("DP3D_ViewConsistencySampler", {"latent": "=flux latent"}, r"shape \(3, 16, 8, 8\), .* connect 3D-Aware Noise"),
    ("DP3D_ViewConsistencySampler", {"latent": "=nan latent"}, f"latent {BROKEN}"),
    ("DP3D_ViewConsistencySampler", {"steps": 0}, "Value 0 smaller than min of 1.*steps"),
    (
        "DP3D_ViewConsistencySampler",
        {"steps": "=0"},
        "View-Consistency Sampler: steps must lie between 1 and 1000, got 0",
    ),
    ("DP3D_ViewConsistencySampler", {"cfg": "=NaN"}, "View-Consistency Sampler: cfg must lie between 0.0 and 30.0"),
    ("DP3D_ViewConsistencySampler", {"window_size": 7}, "more than the 6 views .* choose 2 to 6, or 0"),
    (
        "DP3D_ViewConsistencySchedule",
        {"model": "=flux"},
        "need SD1.5's discrete noise schedule, .* use a stock scheduler",
    ),
    (
        "DP3D_ViewConsistencySchedule",
        {"steps": "=0"},
        "View-Consistency Schedule: steps must lie between 1 and 1000, got 0",
    ),
    ("DP3D_3DAwareNoise", {"vae": "=nothing"}, f"3D-Aware Noise {NO_VAE}"),
    ("DP3D_3DAwareNoise", {"vae": "=vae of 16"}, f"3D-Aware Noise got {OTHER_VAE}"),
    ("DP3D_3DAwareNoise", {"image": "=none"}, f"3D-Aware Noise: image {EMPTY}"),
    ("DP3D_3DAwareNoise", {"image": "=nan image"}, f"3D-Aware Noise: image {BROKEN}"),
    ("DP3D_3DAwareNoise", {"image": "=images"}, "reads one portrait; image has 3, choose one"),
    ("DP3D_3DAwareNoise", {"reference_camera": "=cameras"}, "reads one portrait; reference_camera has 3, choose one"),
    ("DP3D_3DAwareNoise", {"proxies": "=images"}, "got proxies and a novel-view model; connect one of them"),
    ("DP3D_3DAwareNoise", {"proxies": "=two", "novel_view": None}, "2 proxies for 3 cameras; give one per camera"),
    ("DP3D_3DAwareNoise", {"proxies": "=nan", "novel_view": None}, f"3D-Aware Noise: proxies {BROKEN}"),
    ("DP3D_3DAwareNoise", {"proxies": "=none", "novel_view": None, "cameras": None}, f"Noise: proxies {EMPTY}"),
    ("DP3D_3DAwareNoise", {"novel_view": None}, "3D-Aware Noise lacks novel_view; connect"),
    ("DP3D_3DAwareNoise", {"mode": "random", "cameras": None}, "3D-Aware Noise lacks cameras; connect them"),
    (
        "DP3D_3DAwareNoise",
        {"resolution": "=32"},
        "3D-Aware Noise: resolution must be 0 .the networks' own. or lie between 64 and 2048, got 32",
    ),
    ("DP3D_ViewGrid", {"images": "=none"}, f"View Grid: images {EMPTY}"),
    ("DP3D_ViewGrid", {"images": "=nan"}, f"View Grid: images {BROKEN}"),
    ("DP3D_ViewGrid", {"images": "=two"}, "View Grid got 2 images and 3 cameras; give one camera per image"),
    ("DP3D_ViewGrid", {"columns": "=-1"}, "View Grid: columns must lie between 0 and 64, got -1"),
    ("DP3D_Turntable", {"images": "=none"}, f"Turntable: images {EMPTY}"),
    ("DP3D_Turntable", {"images": "=nan"}, f"Turntable: images {BROKEN}"),
    ("DP3D_Turntable", {"fps": "=0"}, "Turntable: fps must lie between 0.1 and 120.0, got 0"),
    ("DP3D_LoadCameras", {"file": "gone.npy"}, "there is no camera file 'gone.npy' .found: .* and press R"),
    ("DP3D_LoadCameras", {"file": "bad_input/nan.npy"}, "nan.npy: view 0 contains NaN"),
    ("DP3D_SaveCameras", {"filename_prefix": " "}, "filename_prefix is empty; give the saved files a name"),
    ("DP3D_SaveCameras", {"filename_prefix": "../away"}, "'../away' leads outside the output folder"),
    ("DP3D_SaveCameras", {"filename_prefix": "a\0b"}, "leads outside the output folder"),
    ("DP3D_ExportViews", {"filename_prefix": "a/" + 300 * "9"}, "a name of 300 bytes, and at most 200 fit; shorten it"),
    ("DP3D_ExportViews", {"filename_prefix": "/tmp/away"}, "leads outside the output folder"),
    ("DP3D_SaveCameras", {"cameras": "=nan cameras"}, "view 0 contains NaN"),
    ("DP3D_LoadCameraConditions", {"folder": "gone"}, "there is no image folder 'gone' .found: .* and press R"),
    ("DP3D_LoadCameraConditions", {"folder": "bad_input/broken"}, "0.png is not an image that can be read"),
    ("DP3D_LoadCameraConditions", {"width": "=0"}, "Load Camera Conditions: width must lie between 64 and 2048, got 0"),
    ("DP3D_ExportViews", {"images": "=none"}, f"Export Views: images {EMPTY}"),
    ("DP3D_ExportViews", {"images": "=nan"}, f"Export Views: images {BROKEN}"),
    ("DP3D_ExportViews", {"images": "=two"}, "Export Views got 2 images and 3 cameras; give one camera per image"),
    ("DP3D_ExportViews", {"masks": "=nan mask"}, f"Export Views: masks {BROKEN}"),
    ("DP3D_ExportViews", {"masks": "=one black mask"}, "the mask of view 1 is empty; .* invert it"),
    ("DP3D_ExportViews", {"masks": "=small masks"}, "masks of shape .* give one mask per image, of its size"),
    (
        "DP3D_SelectViews",
        {"latent": None, "images": None, "cameras": None},
        "Select Views: nothing is connected; connect latent, images, cameras",
    ),
    ("DP3D_SelectViews", {"images": "=two"}, "latent has 3, images has 2, cameras has 3 views; connect batches of the"),
    ("DP3D_SelectViews", {"latent": "=no view", "images": None, "cameras": None}, "latent hold no views; connect at"),
    ("DP3D_SelectViews", {"numbers": ""}, "Select Views: numbers is empty; write the numbers of the views as 0, 2, 5"),
    ("DP3D_SelectViews", {"numbers": "3"}, "there is no view 3; the 3 views are 0 to 2"),
    ("DP3D_SelectViews", {"numbers": "1, 0-2"}, "names view 1 more than once; name every view once"),
    ("DP3D_SelectViews", {"numbers": "front"}, "'front' is no number of a view; write them as 0, 2, 5-7"),
    ("DP3D_SelectViews", {"numbers": "0-2", "invert": True}, "all 3 views were chosen, so that none is left"),
    ("DP3D_SelectViews", {"choose": "angles", "cameras": None}, "Select Views: to choose by angles, connect cameras"),
    ("DP3D_SelectViews", {"choose": "angles", "yaw_min": 10, "yaw_max": 20}, "no view lies in yaw 10.* have yaw"),
    ("DP3D_SelectViews", {"choose": "angles", "pitch_min": 5, "pitch_max": 0}, "pitch_min 5.* is larger than"),
    ("DP3D_SelectViews", {"choose": "nearest", "count": 4}, "count must be 1 to 3, as there are so many views, not 4"),
    ("DP3D_SelectViews", {"choose": "nearest", "yaw": "=NaN"}, "Select Views: yaw must lie between -180.0 and 180.0"),
    ("DP3D_JoinViews", {"latent_rest": None}, "Join Views lacks latent_rest; connect both latent and latent_rest"),
    ("DP3D_JoinViews", {"latent": None, "latent_rest": None}, "Join Views: nothing is connected; connect latent"),
    ("DP3D_JoinViews", {"latent": "=two views"}, "latent has 2 views; give the selected views .1. or the whole .* .3."),
    ("DP3D_JoinViews", {"latent_rest": "=one view"}, "latent_rest has 1 views; give the views left over .2. or the"),
    ("DP3D_JoinViews", {"latent": "=narrow view"}, r"latent are of shape .4, 8, 4. and latent_rest of .4, 8, 8.; make"),
    ("DP3D_JoinViews", {"images": "=image", "images_rest": "=with alpha"}, "images are of shape .*make both of one"),
    ("DP3D_ExportViews", {"filename_prefix": ""}, "filename_prefix is empty; give the saved files a name"),
]


def workflow(host, node_id: str, changes: dict) -> dict:
    """The node with good inputs but for `changes` (None leaves an input out), and a node that shows what it gives."""
    inputs, prompt = defaults(host, node_id) | GOOD[node_id] | changes, {}
    for name, value in list(inputs.items()):
        if value is None:
            del inputs[name]
        elif isinstance(value, str) and value.startswith("="):
            prompt[f"given {name}"] = {"class_type": "Given", "inputs": {"name": value[1:]}}
            inputs[name] = [f"given {name}", 0]
    shown = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}
    return {**prompt, "node": {"class_type": node_id, "inputs": inputs}, "shown": shown}


def test_every_node_is_here(pack):
    ours = {node.define_schema().node_id for family in pack.nodes.FAMILIES for node in family.NODES}
    assert set(GOOD) == ours == {node for node, *_ in BAD}


@pytest.mark.parametrize("node_id", GOOD)
def test_good_input_passes(host, run_workflow, node_id):
    """So that what the cases below refuse is what they change."""
    assert run_workflow(workflow(host, node_id, {})).values["node"]


@pytest.mark.parametrize(("node_id", "changes", "message"), BAD, ids=[f"{node}-{change}" for node, change, _ in BAD])
def test_bad_input_is_named(host, run_workflow, node_id, changes, message):
    """By the host while it checks the graph, or by the node itself; never by torch somewhere below."""
    with pytest.raises(RuntimeError, match=message) as caught:
        run_workflow(workflow(host, node_id, changes))
    assert node_id in str(caught.value)
    cause = caught.value.__cause__
    assert cause is None or isinstance(cause, ValueError)
