"""Steps of the authors' code: the process that `evaluation.bench --peer` starts, with this Python or theirs.

Every line of its input is a request in JSON, every line of its output an answer. Nothing of this repository is
imported: their environment has an older Python and torch.
"""

import contextlib
import importlib
import json
import sys
import time
import types
from pathlib import Path

import torch
import yaml
from torch import nn

NETWORKS = ("appearance_control_stage_config", "pose_control_stage_config", "unet_config")
NOT_IN_A_STEP = ("first_stage_config", "cond_stage_config")  # the VAE and the text encoder
UNUSED = "control_model.input_hint_block."  # F_ref sees no hint


class LightningModule(nn.Module):
    device = property(lambda self: next(self.parameters()).device)


def stand_in(name, **names):
    """What their code imports and a step does not need, where it is not installed: a base class, two names."""
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(names)


def load(folder, weights, sizes):
    """Their model in the folder of their inference.py with the weights in a file, on a GPU if there is one."""
    stand_in("pytorch_lightning", LightningModule=LightningModule)
    stand_in("pytorch_lightning.utilities")
    stand_in("pytorch_lightning.utilities.distributed", rank_zero_only=lambda function: function)
    for name in ("omegaconf", "omegaconf.listconfig"):
        stand_in(name, ListConfig=type("ListConfig", (list,), {}))
    sys.modules["transformers"] = None  # for diffusers, which wants an old one for its pipelines
    sys.path.insert(0, folder)
    package = "control_model.ControlNet."
    settings = yaml.safe_load(
        Path(folder, package.replace(".", "/"), "models/cldm_v15_diffportrait3D.yaml").read_text()
    )
    settings = settings["model"]["params"]
    for name in NETWORKS:
        settings[name]["params"].update(sizes)
    settings.update({name: {"target": "torch.nn.Identity"} for name in NOT_IN_A_STEP})
    model = importlib.import_module(package + "cldm.cldm").ControlLDMReferenceOnlyPose(**settings).eval()
    given = torch.load(weights, weights_only=True)
    lacking = {name for name, _ in model.named_parameters()} - set(given)
    unknown = set(given) - set(model.state_dict())
    lacking = {name for name in lacking if not name.startswith((UNUSED, "logvar"))}
    if lacking or unknown:
        raise SystemExit(f"their networks lack weights or do not know them: {sorted(lacking | unknown)[:5]}")
    model.load_state_dict(given, strict=False)
    return model.cuda() if torch.cuda.is_available() else model


def clock():
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step_seconds(model, views, side, steps, context):
    """Of all steps but the first, sampled as their inference.py does it."""
    ddim = importlib.import_module("control_model.ControlNet.ldm.models.diffusion.ddim")

    class Sampler(ddim.DDIMSampler_ReferenceOnly):
        def register_buffer(self, name, attr):  # theirs wants CUDA
            setattr(self, name, attr.to(model.device) if isinstance(attr, torch.Tensor) else attr)

    shape, times = (4, side // 8, side // 8), []
    text = {"c_crossattn": [torch.zeros(views, 77, context, device=model.device)]}
    latents = torch.randn(views, *shape, device=model.device)
    hint = torch.rand(views, 3, side, side, device=model.device) * 2 - 1
    given = {**text, "c_concat": [hint], "image_control": [latents], "wonoise": True, "feature_control": latents}
    with torch.autocast("cuda", enabled=torch.cuda.is_available()):
        Sampler(model).sample(
            steps + 1, views, shape, given, verbose=False, eta=0.5, unconditional_guidance_scale=3.0,
            unconditional_conditioning=text, callback=lambda _: times.append(clock()),
        )  # fmt: skip
    return [times[number + 1] - times[number] for number in range(steps)]


def main():
    model = None
    torch.set_num_threads(torch.get_num_threads() if torch.cuda.is_available() else 1)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
            if what == "load":
                model, answer = load(*arguments), None
            else:
                answer = step_seconds(model, *arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
