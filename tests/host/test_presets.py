"""A preset is one definition, the core's: the nodes take the same steps with guidance at the same timesteps."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.denoiser import Denoiser
from diffportrait3d.diffusion import Schedule, start_noise, view_noise
from diffportrait3d.networks import AutoencoderConfig, AutoencoderKL, NovelViewConfig, NovelViewModel
from diffportrait3d.pipeline import PRESETS, Person, Pipeline
from evaluation.goldens.core import NETWORKS
from evaluation.goldens.host import LATENT_SCALE, NARROW_CONFIG, HostPath, host_path, known_weights

VIEWS, SEED = 3, 5
SAMPLER, SCHEDULE = "DP3D_ViewConsistencySampler", "DP3D_ViewConsistencySchedule"


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


@pytest.fixture(scope="module")
def core() -> Pipeline:
    """The same networks, and small ones of the two that take no part in denoising."""
    networks = {}
    for kind, tensors in known_weights(NARROW_CONFIG).items():
        networks[kind] = NETWORKS[kind](NARROW_CONFIG)
        networks[kind].load_state_dict(tensors)
    novel_view = NovelViewConfig(image_size=64, render_size=8, base_channels=32)
    others = AutoencoderKL(AutoencoderConfig(ch=32)), NovelViewModel(novel_view)
    return Pipeline(Denoiser(**networks), *others, Schedule())


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_timesteps(path, name):
    chosen, schedule = PRESETS[name], Schedule()
    timesteps = {"ddim": schedule.ddim_timesteps, "dpmpp_2m": schedule.trailing_timesteps}[chosen.solver](chosen.steps)
    _, sigmas = path.patches.sampling.chosen_schedule(path.model, name, 3, 0.1, "t=999")
    found = path.model.get_model_object("model_sampling").timestep(sigmas[:-1])
    assert found.tolist() == timesteps[::-1] and sigmas[-1] == 0


@pytest.mark.parametrize("name", [name for name, sampling in PRESETS.items() if sampling.solver == "dpmpp_2m"])
@torch.inference_mode()
def test_views_are_those_of_the_core(path, core, host, name):
    """Also where the widgets say something else about guidance; single passes where the preset has them."""
    inputs = {"context": torch.zeros(1, 1, 32), "ref_latent": draw(1, 1, 4, 8, 8), "hint": draw(2, VIEWS, 3, 64, 64)}
    latents, rows = draw(3, VIEWS, 4, 8, 8), []
    model, positive = path.prepare(inputs | {"ref_latent2": None}, 1, True, False)
    unet = path.model.model.diffusion_model.time_embed
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    others = {"cfg": 3.0, "preset": name, "steps": 2, "eta": 1.0, "start": "t=999", "view_consistency": path.views}
    latent, noise = {"samples": latents / LATENT_SCALE}, path.patches.noise.ViewNoise(SEED)
    try:
        node = host.nodes.NODE_CLASS_MAPPINGS[SAMPLER]
        views = node.execute(model, positive, latent, noise, **others).args[0]["samples"]
    finally:
        hook.remove()
    start = start_noise(latents, view_noise(SEED, range(VIEWS), (4, 8, 8)), core.schedule)
    person = Person(start, inputs["ref_latent"], inputs["hint"], SEED, range(VIEWS))
    expected = core.denoise([person], PRESETS[name])[0]
    assert (views * LATENT_SCALE - expected).abs().max() < 1e-4 * expected.abs().max()
    timesteps = Schedule().trailing_timesteps(PRESETS[name].steps)[::-1]
    assert rows == [2 * VIEWS if t in range(*PRESETS[name].guided) else VIEWS for t in timesteps]


def test_a_schedule_leaves_guidance_to_the_guider(host):
    """So it has no preset that says in which part guidance acts, and what the sampler shows of one is complete."""

    def presets(node):
        return host.nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["required"]["preset"][1]["presets"]

    assert list(presets(SAMPLER)) == list(PRESETS)
    assert presets(SAMPLER)["fast"] == {"steps": 8, "eta": 0.0}
    partly = [name for name, sets in presets(SAMPLER).items() if len(sets) == 4]
    assert partly == ["faster"] and presets(SAMPLER)["faster"]["guided_end_percent"] == 0.5
    assert list(presets(SCHEDULE)) == [name for name in PRESETS if name not in partly]
