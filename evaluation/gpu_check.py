"""Checks on a GPU what the tests check on CPUs: ComfyUI's memory modes and data types, and the golden numbers.

    python -m evaluation.gpu_check [--only SETUP ...] [--views 16] [--out runs/gpu_check] [--cpu]

Each setup is a ComfyUI of its own, booted with that setup's options in a process of its own. The turntable of the
miniature is compared with the image that this machine's CPU makes. Prints a table and writes gpu_check.json and the
grids; ends with status 1 if a check fails. With --cpu everything runs on the CPU, which checks the checks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffportrait3d.command import run_main
from diffportrait3d.files import write_text
from diffportrait3d.images import save_image, sheet
from diffportrait3d.networks import UNetConfig
from diffportrait3d.networks.cross_view_attention import CrossViewModule

from .golden import error_of
from .goldens.core import core_outputs, golden_denoiser
from .goldens.data import load_golden
from .goldens.host import host_outputs
from .metrics.images import psnr
from .tables.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows/api"
MINIATURES = ("repaint", "many_views_to_3d")  # templates of the miniature that have most of our nodes
SAME, CLOSE = 40.0, 25.0  # dB of the turntable against the CPU's: another order of sums; other data types
DECODER = "VAEDecode"
REFERENCE = "reference.safetensors"  # in the folder of results
Found = dict[str, Any]  # "passed", and the numbers


# name -> (options of ComfyUI, checks)
SETUPS: dict[str, tuple[list[str], list[str]]] = {
    "cpu": ([], ["reference"]),
    "float32": (["--force-fp32"], ["golden core", "golden host", "turntable same"]),
    "default": ([], ["turntable", "twice", "2048 px", "all nodes"]),
    "no dynamic VRAM": (["--disable-dynamic-vram"], ["turntable"]),
    "low VRAM": (["--disable-dynamic-vram", "--lowvram"], ["turntable"]),
    "no VRAM": (["--novram"], ["turntable"]),
    "bf16 weights": (["--bf16-unet"], ["turntable"]),
    "fp8 weights": (["--fp8_e4m3fn-unet"], ["turntable"]),
}

# Our nodes that these lack, added to the last one: class, and inputs that are not its defaults.
# LEFT stands for the folder that its Export Views has left.
LEFT = "gpu_check"
MORE_NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "align": ("DP3D_AlignPortrait", {"image": ["1", 3], "points": "104 104, 152 104, 128 132, 108 156, 148 156"}),
    "paste": ("DP3D_PasteBack", {"place": ["align", 3], "view": ["align", 0]}),
    "pasted": ("PreviewImage", {"images": ["paste", 0]}),
    "viewer": ("DP3D_CameraToViewer", {"cameras": ["3", 0]}),
    "camera": ("DP3D_CameraFromViewer", {"camera_info": ["viewer", 0]}),
    "save": ("DP3D_SaveCameras", {"cameras": ["camera", 0]}),
    "load": ("DP3D_LoadCameras", {"file": f"{LEFT}/transforms.json"}),
    "saved": ("DP3D_SaveCameras", {"cameras": ["load", 0]}),
    "conditions": ("DP3D_LoadCameraConditions", {"folder": f"{LEFT}/images", "width": 256, "height": 256}),
    "shown": ("DP3D_ViewControlNet", {"positive": ["1", 2], "control_net": ["7", 0], "image": ["conditions", 0]}),
    "model": ("DP3D_ApplyViewConsistency", {"model": ["6", 0], "view_consistency": ["9", 0]}),
    "schedule": ("DP3D_ViewConsistencySchedule", {"model": ["model", 0], "preset": "custom", "steps": 1}),
    "sampled": ("SamplerCustom", {"model": ["model", 0], "add_noise": False, "noise_seed": 0, "cfg": 1.0,
                                  "positive": ["shown", 0], "negative": ["1", 2], "sampler": ["schedule", 0],
                                  "sigmas": ["schedule", 1], "latent_image": ["11", 0]}),
    "decoded": ("VAEDecode", {"samples": ["sampled", 0], "vae": ["1", 1]}),
    "views": ("PreviewImage", {"images": ["decoded", 0]}),
}  # fmt: skip


class Checks:
    """The checks of one setup, in its process.

    Args:
        host, pack: booted, and this pack as it has loaded it.
        options: of the command.
    """

    def __init__(self, host, pack, options: argparse.Namespace):
        self.host, self.pack, self.options = host, pack, options
        self.device = host.comfy.model_management.get_torch_device()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the golden numbers' float32

    def run(self, name: str) -> Found:
        return CHECKS[name](self)

    def golden_core(self) -> Found:
        """The core's golden numbers in float32 on the device."""
        golden = load_golden()
        moved = replace(golden, inputs={name: tensor.to(self.device) for name, tensor in golden.inputs.items()})
        return _golden(core_outputs(moved, golden_denoiser().to(self.device)), golden.outputs)

    def golden_host(self) -> Found:
        """The same through ComfyUI."""
        golden = load_golden()
        return _golden(host_outputs(self.pack, self.host.comfy, golden), golden.outputs)

    def views(self, seed: int = 42) -> Tensor:
        """The turntable's views [V, H, W, 3] in [0, 1]."""
        prompt = workflow("turntable", views=self.options.views, steps=self.options.steps, seed=seed)
        prompt = {k: node for k, node in prompt.items() if node["class_type"] not in ("SaveVideo", "DP3D_Turntable")}
        decoder = next(key for key, node in prompt.items() if node["class_type"] == DECODER)
        return self.host.run_workflow(prompt).values[decoder][0].float().cpu().clamp(0, 1)

    def reference(self) -> Found:
        """What the turntables of the other setups are compared with."""
        views = self.views()
        save_file({"views": views.contiguous()}, self.options.out / REFERENCE)
        return {"passed": bool(torch.isfinite(views).all()), "views": list(views.shape)}

    def turntable(self, least: float = CLOSE) -> Found:
        """The worst view's PSNR against the CPU's."""
        wanted = load_file(self.options.out / REFERENCE)["views"].movedim(-1, 1)
        views = self.views().movedim(-1, 1)  # [V, 3, H, W]
        save_image(self.options.out / f"{self.options.setup.replace(' ', '_')}.png", sheet([views]))
        worst = float(psnr(views, wanted).min())
        return {"passed": bool(torch.isfinite(views).all()) and worst >= least, "worst view, dB": round(worst, 2)}

    def twice(self) -> Found:
        """Two equal runs give equal bits; another seed gives another image."""
        first, second, other = self.views(), self.views(), self.views(seed=43)
        equal = torch.equal(first, second)
        return {"passed": equal and not torch.equal(first, other), "equal": equal}

    def all_nodes(self) -> Found:
        """Every node class of this pack runs, and gives finite images."""
        classes = self.host.nodes.NODE_CLASS_MAPPINGS
        small = {"views": 2, "preset": "custom", "steps": 1, "start_points": 0, "value": "1"}
        prompts = [workflow(name, **small) for name in MINIATURES]
        ran, images = set[str](), []
        for prompt in (*prompts, prompts[-1]):
            values = self.host.run_workflow(prompt).values
            ran |= {prompt[key]["class_type"] for key in values}
            images += [x for found in values.values() for x in found if isinstance(x, Tensor) and x.ndim == 4]
            exported = next((key for key, node in prompt.items() if node["class_type"] == "DP3D_ExportViews"), None)
            if exported and "load" not in prompt:
                left = Path(self.host.folder_paths.get_input_directory()) / LEFT
                shutil.copytree(values[exported][0], left, dirs_exist_ok=True)
                for key, (name, inputs) in MORE_NODES.items():
                    prompt[key] = {"class_type": name, "inputs": defaults(classes[name]) | inputs}
        missing = sorted(name for name in classes if name.startswith("DP3D_") and name not in ran)
        finite = all(bool(torch.isfinite(image).all()) for image in images)
        return {"passed": finite and not missing, "missing": missing, "images": len(images)}

    @torch.inference_mode()
    def largest(self) -> Found:
        """View attention of two views at the nodes' largest resolution: its batch of pixels passes what a grid of
        CUDA blocks holds in one dimension, 65,535."""
        side = 2048 // 8 if self.device.type == "cuda" else 16
        config = UNetConfig(model_channels=32, context_dim=32)
        module = CrossViewModule(config, 32).to(self.device).eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator(self.device).manual_seed(0))
        x = torch.randn(2, 32, side, side, generator=torch.Generator().manual_seed(1)).to(self.device)
        out = module(x, 2)
        # Its first norm sees whole maps; behind it every pixel is on its own.
        swapped = module(x.transpose(2, 3).contiguous(), 2).transpose(2, 3)
        error = float((out - swapped).abs().max() / out.abs().max())
        return {"passed": bool(torch.isfinite(out).all()) and error < 1e-3, "pixels": side * side, "error": error}


CHECKS: dict[str, Callable[[Checks], Found]] = {
    "reference": Checks.reference,
    "golden core": Checks.golden_core,
    "golden host": Checks.golden_host,
    "turntable same": lambda checks: checks.turntable(SAME),
    "turntable": Checks.turntable,
    "twice": Checks.twice,
    "2048 px": Checks.largest,
    "all nodes": Checks.all_nodes,
}


def workflow(name: str, **values: Any) -> dict[str, dict]:
    """A template's prompt; inputs of these names, where there are any that are no wires, have these values."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({key: value for key, value in values.items() if type(inputs.get(key)) is type(value)})
    return prompt


def defaults(node: Any) -> dict[str, Any]:
    """What the editor sets of a node's widgets."""
    if not hasattr(node, "define_schema"):
        return {}
    found = {each.id: (getattr(each, "default", None), getattr(each, "options", None) or [None])
             for each in node.define_schema().inputs if not each.optional}  # fmt: skip
    values = {name: options[0] if default is None else default for name, (default, options) in found.items()}
    return {name: value for name, value in values.items() if value is not None}


def _golden(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> Found:
    """The largest part of its tolerance that an error takes."""
    errors = {name: error_of(name, outputs[name].cpu(), wanted) for name, wanted in expected.items()}
    shares = {name: error / tolerance for name, (error, tolerance) in errors.items()}
    worst = max(shares, key=shares.get)
    return {"passed": shares[worst] <= 1, "worst": worst, "of tolerance": round(shares[worst], 3)}


def run_setup(options: argparse.Namespace) -> None:
    """One setup in this process; a line of JSON for every check."""
    from tools.embedded import temporary_host

    given, names = SETUPS[options.setup]
    cpu = options.cpu or options.setup == "cpu"
    with temporary_host(cpu=cpu, options=given, as_program=True) as host:
        checks = Checks(host, host.load_pack(), options)
        for name in names:
            begin = time.monotonic()
            try:
                found = checks.run(name)
            except Exception as error:  # the other checks and setups go on
                found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
            seconds = round(time.monotonic() - begin, 1)
            print(json.dumps({"setup": options.setup, "check": name, "seconds": seconds, **found}), flush=True)


def run_setups(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results of all setups asked for, each from a process of its own."""
    for setup in ["cpu", *(name for name in options.only or SETUPS if name != "cpu")]:
        command = [sys.executable, "-m", "evaluation.gpu_check", "--setup", setup, "--out", str(options.out),
                   "--views", str(options.views), "--steps", str(options.steps), *["--cpu"] * options.cpu]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"setup"')]
        yield from lines
        if done.returncode or len(lines) < len(SETUPS[setup][1]):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield {"setup": setup, "check": "all checks run", "seconds": 0.0, "passed": False, "error": last[:500]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SETUPS, help="setups; the CPU's image is always made")
    parser.add_argument("--views", type=int, default=16, help="of the turntable")
    parser.add_argument("--steps", type=int, default=8, help="of the sampler")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder for results")
    parser.add_argument("--cpu", action="store_true", help="everything on the CPU")
    parser.add_argument("--setup", choices=SETUPS, help="this one alone, in this process (the command calls itself)")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.setup:
        run_setup(options)
        return 0
    if not (options.cpu or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device here; --cpu runs the checks on the CPU")
    device = "CPU" if options.cpu else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}", flush=True)
    about, results = {"device": device, "torch": torch.__version__}, []
    for result in tqdm(run_setups(options), desc="checks", unit="check"):
        results.append(result)
        write_text(options.out / "gpu_check.json", json.dumps({**about, "results": results}, indent=1))
    rows = []
    for result in results:
        numbers = ", ".join(f"{k} {v}" for k, v in result.items() if k not in ("setup", "check", "seconds", "passed"))
        passed = "yes" if result["passed"] else "NO"
        rows.append([result["setup"], result["check"], passed, str(result["seconds"]), numbers])
    print(markdown_table(["setup", "check", "passed", "seconds", "found"], rows))
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(run_main(main))
