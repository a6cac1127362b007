"""Rehearses the use of the authors' checkpoint at full size, with known weights in its place.

    python -m evaluation.full_size_rehearsal WORK_FOLDER [--dtype fp16] [--stage build]

Builds a pickle with all 2937 keys of the release (2871 M deterministic values; 11.5 GB in fp32, 5.7 GB in fp16),
converts it, loads the results into the real ComfyUI for one guided step of 8 views at 64 pixels, and compares ComfyUI's
single passes and the ControlNet's residuals with the core's. Every stage is a process of its own; its time and peak
memory (mapped files included) are printed, and the two limits that the converter and the step have to keep are checked.
`--model-channels 64 --context-dim 96` rehearses the rehearsal.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffportrait3d import convert
from diffportrait3d.conversion.layout import CONTROL, METHOD, UNET, VAE, official_shapes
from diffportrait3d.conversion.split import BASE_FILE
from diffportrait3d.denoiser import Denoiser
from diffportrait3d.diffusion import Schedule
from diffportrait3d.networks import AutoencoderKL, UNet, UNetConfig
from diffportrait3d.networks.sizes import SD15_AUTOENCODER
from diffportrait3d.weights.files import load_network, save_network
from diffportrait3d.weights.identify import OFFICIAL
from diffportrait3d.weights.text_encoder import TextEncoderSizes

from .goldens.data import deterministic_tensor

CHECKPOINT = "rehearsal.th"
STAGES = ("build", "convert", "host", "host-passes", "core-passes")
PASSES = ("eps_full", "eps_uncond")
HOST_PASSES = "host_passes.safetensors"
TOLERANCE = 5e-5
CONVERSION_LIMIT = 1.3  # of the largest network
MEMORY_LIMIT = 20e9  # bytes, of a full-size step in ComfyUI
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
REMAP_BYTES = 2**30
FULL_SIZE = UNetConfig()
NARROW_AUTOENCODER = replace(SD15_AUTOENCODER, ch=32, num_res_blocks=1)
VIEWS, PIXELS = 8, 64  # as in full_size_rehearsal.json
NARROW_BASE = "rehearsal"


def release_weights(config: UNetConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Shapes of all keys of the release at a width, and the values of those that the converter checks."""
    width, autoencoder, text = config.context_dim, SD15_AUTOENCODER, TextEncoderSizes()
    if config != FULL_SIZE:
        autoencoder, text = NARROW_AUTOENCODER, TextEncoderSizes(1000, width, 77, hidden=4 * width, layers=2)
    groups = official_shapes(config, autoencoder, text)
    shapes = {name: shape for names in groups.values() for name, shape in names.items()}
    return shapes, {name: getattr(Schedule(), name) for name in ("betas", "alphas_cumprod")}


def build(path: Path, config: UNetConfig, dtype: torch.dtype) -> None:
    """Writes the checkpoint as `torch.save` does, a `state_dict` in a zip, with one tensor in memory at a time."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes, schedule = release_weights(config)
    values = sum(math.prod(shape) for shape in shapes.values())
    print(f"{path}: {len(shapes)} keys, {values / 1e6:.2f} M values, {values * dtype.itemsize / 1e9:.2f} GB")
    partial = path.with_suffix(".partial")
    with FakeTensorMode():
        outline = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):  # leaves room for the values
        torch.save({"state_dict": outline}, partial)
    tensors, filled = _mapped(partial), 0
    for name, shape in tqdm(shapes.items(), unit="tensor", desc="Building"):
        if filled > REMAP_BYTES:  # or all pages written so far would count as memory
            tensors, filled = _mapped(partial), 0
        tensors[name].copy_(schedule[name] if name in schedule else deterministic_tensor(name, shape))
        filled += tensors[name].nbytes
    del tensors
    os.replace(partial, path)


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, such that writing to them writes to the file."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]


def guided_step(folder: Path, config: UNetConfig) -> None:
    """The converted files in the real ComfyUI, by the graph that an artist would wire: one step, 8 views, 64 px.

    Raises:
        SystemExit: the result is not a set of finite latents.
    """
    host, _ = boot_with_files(folder, config)
    start = time.monotonic()
    latents = host.run_workflow(workflow(config == FULL_SIZE)).values["sampler"][0]["samples"]
    seconds, shape = time.monotonic() - start, list(latents.shape)
    print(f"workflow: {seconds:.0f} s, views {shape}, mean {latents.mean():.4f}, std {latents.std():.4f}", flush=True)
    if shape != [VIEWS, 4, PIXELS // 8, PIXELS // 8] or not bool(torch.isfinite(latents).all()):
        raise SystemExit("The sampler did not return finite latents of the views asked for.")


def boot_with_files(folder: Path, config: UNetConfig):
    """The real ComfyUI with the converted files in its model folders: (host, the pack inside it)."""
    from tools.embedded import boot

    host = boot(folder / "comfyui")
    models = Path(host.folder_paths.models_dir)
    for target in ("diffportrait3d/view_consistency", "diffportrait3d/reference_encoder", "controlnet/view_controlnet"):
        link(folder / "converted" / f"{Path(target).name}.safetensors", models / f"{target}.safetensors")
    if config == FULL_SIZE:
        link(folder / "converted" / BASE_FILE, models / "checkpoints" / BASE_FILE)
    else:
        write_narrow_base(folder / "converted" / BASE_FILE, models / "diffportrait3d" / NARROW_BASE, config)
    return host, host.load_pack()


def random_inputs(config: UNetConfig) -> dict[str, Tensor]:
    """Inputs of one evaluation under the names of the golden data."""
    generator = torch.Generator().manual_seed(0)
    side = PIXELS // 8
    shapes = {"x_noisy": (VIEWS, 4, side, side), "context": (1, 77, config.context_dim)}
    shapes |= {name: (1, 4, side, side) for name in ("ref_latent", "ref_latent2")}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    hint = 2 * torch.rand(VIEWS, config.hint_channels, PIXELS, PIXELS, generator=generator) - 1
    return inputs | {"hint": hint, "t": torch.full((VIEWS,), 601)}


def host_passes(folder: Path, config: UNetConfig) -> None:
    """Stores what ComfyUI gives for `random_inputs` with the converted files: both passes and all residuals.

    The workflow's loaders give base model and ControlNet; the hint is what View ControlNet makes of images.
    """
    from .goldens.host import SINGLE_PASSES, HostPath

    host, pack = boot_with_files(folder, config)
    prompt, loaders = workflow(config == FULL_SIZE), ("base", "control_net")
    shown = {f"{name}, shown": {"class_type": "PreviewAny", "inputs": {"source": [name, 0]}} for name in loaders}
    loaded = host.run_workflow({name: prompt[name] for name in loaders} | shown).values
    networks = (loaded[name][0] for name in loaders)
    path, inputs = HostPath.of_files(pack, host.comfy, folder / "converted", *networks), random_inputs(config)
    with torch.inference_mode():
        results = {name: path.predict(inputs, *SINGLE_PASSES[name]).clone() for name in PASSES}
        results |= _numbered(path.residuals(inputs))
    save_file(results, folder / HOST_PASSES)


def _numbered(residuals: list[Tensor]) -> dict[str, Tensor]:
    return {f"residual.{index:02d}": residual.contiguous() for index, residual in enumerate(residuals)}


def core_passes(folder: Path, config: UNetConfig) -> None:
    """Computes the same with the core alone and prints how far ComfyUI is from it.

    Raises:
        SystemExit: farther than TOLERANCE.
    """
    converted = folder / "converted"
    unet = UNet(config)
    with safe_open(converted / BASE_FILE, "pt") as base:
        for name, tensor in unet.state_dict().items():
            tensor.copy_(base.get_tensor(UNET.prefix + name))
    networks = [load_network(converted / f"{kind}.safetensors", expect=kind)[0] for kind in OFFICIAL]
    denoiser = Denoiser(unet.eval().requires_grad_(False), *networks)
    inputs = random_inputs(config)
    x, t, context = inputs["x_noisy"], inputs["t"], inputs["context"].repeat(VIEWS, 1, 1)
    with torch.inference_mode():
        bank = denoiser.bank(inputs["ref_latent"], t, context)
        full = denoiser.conditional(x, t, context, bank, inputs["hint"], VIEWS)
        expected = {"eps_full": full, "eps_uncond": denoiser.unconditional(x, t, context, VIEWS)}
        expected |= _numbered(denoiser.view_controlnet(x, inputs["hint"], t, context))
    found = load_file(folder / HOST_PASSES)
    differences = {name: float((found[name] - value).abs().max()) for name, value in expected.items()}
    print("ComfyUI against the core, largest differences:")
    for name, difference in differences.items():
        print(f"  {name:12} {difference:.2e} (std {float(expected[name].std()):.3f})")
    if not all(difference <= TOLERANCE for difference in differences.values()):
        raise SystemExit(f"There are differences above {TOLERANCE}.")


def link(source: Path, target: Path) -> None:
    """The file under a second name, without a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    os.link(source, target)


def write_narrow_base(checkpoint: Path, folder: Path, config: UNetConfig) -> None:
    """A base of another width is loaded by Load Miniature: the host's loaders know SD1.5's heads only."""
    tensors = load_file(checkpoint)
    networks = (("unet", UNET.prefix, UNet(config)), ("autoencoder", VAE.prefix, AutoencoderKL(NARROW_AUTOENCODER)))
    for kind, prefix, network in networks:
        network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        save_network(folder / f"{kind}.safetensors", network, kind)


def workflow(full_size: bool) -> dict:
    """`full_size_rehearsal.json` (API format), where the base model and the ControlNet go through the host's own
    loaders; narrow ones go through ours."""
    prompt = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    if not full_size:
        del prompt["prompt"]  # Load Miniature brings the empty one
        prompt["base"] = {"class_type": "DP3D_LoadMiniature", "inputs": {"name": NARROW_BASE}}
        prompt["control_net"] = {"class_type": "DP3D_LoadViewControlNet", "inputs": {"name": CONTROL.spec.file_name}}
        prompt["reference"]["inputs"]["vae"] = prompt["noise"]["inputs"]["vae"] = ["base", 1]
        prompt["control"]["inputs"]["positive"] = ["base", 2]
    return prompt


def measured(stage: str, work: Callable[..., int | None], *arguments: object) -> int:
    """Does a stage in this process, prints its time and peak memory, and gives the latter in bytes.

    Raises:
        SystemExit: it failed.
    """
    start = time.monotonic()
    if status := work(*arguments):
        raise SystemExit(f"{stage} failed with status {status}.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"[{stage}] {time.monotonic() - start:.0f} s, peak memory {peak / 1e9:.2f} GB\n", flush=True)
    return peak


def check_conversion(peak: int, config: UNetConfig, dtype: torch.dtype) -> None:
    """Prints the converter's peak memory as a multiple of the largest network; SystemExit above CONVERSION_LIMIT."""
    groups = official_shapes(config, SD15_AUTOENCODER, TextEncoderSizes())
    values = [sum(map(math.prod, groups[group].values())) for group in (*METHOD, UNET)]
    largest = max(values) * dtype.itemsize
    print(f"The largest network takes {largest / 1e9:.2f} GB; the converter's peak is {peak / largest:.2f} of it.\n")
    if config == FULL_SIZE and peak > CONVERSION_LIMIT * largest:
        raise SystemExit(f"The converter may take {CONVERSION_LIMIT} of the largest network.")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.full_size_rehearsal", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="for checkpoint and results: 23 GB in fp32, 11.5 in fp16")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the checkpoint")
    parser.add_argument("--model-channels", type=int, default=UNetConfig.model_channels)
    parser.add_argument("--context-dim", type=int, default=UNetConfig.context_dim)
    parser.add_argument("--stage", choices=STAGES, help="only this one (default: all that is not done yet)")
    given = parser.parse_args()
    folder, dtype = given.folder, DTYPES[given.dtype]
    config = UNetConfig(model_channels=given.model_channels, context_dim=given.context_dim)
    checkpoint = folder / CHECKPOINT
    work = {
        "build": (build, checkpoint, config, dtype),
        "convert": (convert.main, [str(checkpoint), "--out", str(folder / "converted"), "--verify"]),
        "host": (guided_step, folder, config),
        "host-passes": (host_passes, folder, config),
        "core-passes": (core_passes, folder, config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for stage in [given.stage] if given.stage else STAGES:
        if stage == "build" and not given.stage and checkpoint.exists():
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peak = process.submit(measured, stage, *work[stage]).result()
        if stage == "convert":
            check_conversion(peak, config, dtype)
        if stage == "host" and config == FULL_SIZE and peak > MEMORY_LIMIT:
            raise SystemExit(f"The step may take {MEMORY_LIMIT / 1e9:.0f} GB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
