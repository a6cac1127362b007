"""The method as one call: the same as its parts put together by hand, in windows too, and repeatable."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.cameras.labels import trajectory
from diffportrait3d.denoiser import Denoiser
from diffportrait3d.diffusion import Schedule, ddim_sample, dpmpp_2m_sample, start_noise, view_noise
from diffportrait3d.networks import (
    AutoencoderConfig,
    AutoencoderKL,
    CrossViewAttention,
    NovelViewConfig,
    NovelViewModel,
    ReferenceEncoder,
    UNet,
    UNetConfig,
    ViewControlNet,
)
from diffportrait3d.pipeline import Pipeline, Sampling, over_windows
from diffportrait3d.synthetic_heads import render_camera_images
from diffportrait3d.views import view_windows
from diffportrait3d.weights.files import CheckpointError, save_network

SIZES = UNetConfig(
    model_channels=32, context_dim=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), max_views=8
)
SIDE = 32


def random_networks() -> dict[str, torch.nn.Module]:
    """All six networks, tiny, with weights that let every part count."""
    torch.manual_seed(0)
    novel_view = NovelViewConfig(
        image_size=SIDE, render_size=8, base_channels=32, feature_channels=8, volume_size=4, volume_channels=8,
        prior_channels=4, samples_per_ray=4,
    )  # fmt: skip
    networks = {
        "unet": UNet(SIZES),
        "reference_encoder": ReferenceEncoder(SIZES),
        "view_controlnet": ViewControlNet(SIZES),
        "view_consistency": CrossViewAttention(SIZES),
        "autoencoder": AutoencoderKL(AutoencoderConfig(ch=32)),
        "novel_view": NovelViewModel(novel_view),
    }
    for network in networks.values():
        for parameter in network.parameters():
            if not parameter.any():  # layers that training starts at zero
                torch.nn.init.normal_(parameter, std=0.02)
    return networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    facts = {"view_consistency": {"num_views": 4}, "unet": {"linear_end": 0.0085}}
    for kind, network in random_networks().items():
        save_network(folder / f"{kind}.safetensors", network, kind, **facts.get(kind, {}))
    return folder


@pytest.fixture(scope="module")
def pipeline(folder) -> Pipeline:
    return Pipeline.from_folder(folder)


@pytest.fixture(scope="module")
def portrait() -> torch.Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def by_hand(folder, portrait, cameras, seed, solver, steps):
    """Figure 2 written out: proxies, start noise, guided denoising of all views together, decoding."""
    networks = {kind: network.eval() for kind, network in random_networks().items()}
    autoencoder, novel_view = networks.pop("autoencoder"), networks.pop("novel_view")
    denoiser, schedule, count = Denoiser(**networks), Schedule(linear_end=0.0085), len(cameras)
    front = trajectory("arc", 1, yaw=(0.0, 0.0), pitch=(0.0, 0.0)).expand(count, -1)
    proxies = novel_view(portrait.expand(count, -1, -1, -1) * 2 - 1, front, cameras)
    hints = render_camera_images(cameras, SIDE) * 2 - 1
    reference, latents = autoencoder.encode(portrait * 2 - 1), autoencoder.encode(proxies)
    start = start_noise(latents, view_noise(seed, range(count), latents.shape[1:]), schedule)
    context = torch.zeros(count, 1, 32)

    def eps(x, t):
        bank = denoiser.bank(reference, t, context)
        conditional = denoiser.conditional(x, t, context, bank, hints, count)
        unconditional = denoiser.unconditional(x, t, context, count)
        return unconditional + 3.0 * (conditional - unconditional)

    if solver == "ddim":
        noise = [view_noise(seed, range(count), latents.shape[1:], stream=step + 1) for step in range(steps)]
        return autoencoder.decode(ddim_sample(eps, start, schedule, steps, 0.5, lambda step, x: noise[step])) / 2 + 0.5
    return autoencoder.decode(dpmpp_2m_sample(eps, start, schedule, steps)) / 2 + 0.5


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_one_call_is_the_method_written_out(pipeline, folder, portrait, solver):
    cameras = trajectory("arc", 3)
    views = pipeline(portrait, cameras, seed=7, sampling=Sampling(steps=2, solver=solver))
    expected = by_hand(folder, portrait, cameras, 7, solver, 2).clamp(0, 1)
    assert views.shape == (3, 3, SIDE, SIDE)
    assert (views - expected).abs().max() < 1e-4
    assert views.std() > 0.01


def test_a_view_s_noise_does_not_depend_on_the_number_of_views(pipeline, portrait):
    alone = Sampling(steps=1, guidance=1.0)
    separate = pipeline.with_networks(reference_encoder=None, view_controlnet=None, view_consistency=None)
    cameras = trajectory("arc", 4)
    assert torch.allclose(
        separate(portrait, cameras, seed=3, sampling=alone)[:2],
        separate(portrait, cameras[:2], seed=3, sampling=alone),
        atol=1e-5,
    )


@torch.inference_mode()
def test_start_noise_is_proxies_at_a_strength_or_gaussian(pipeline, portrait):
    cameras, given = trajectory("arc", 3), torch.rand(3, 3, SIDE, SIDE)
    noise = view_noise(7, range(3), (4, SIDE // 8, SIDE // 8))
    expected = start_noise(0.5 * pipeline.encode(given), noise, pipeline.schedule)
    assert torch.equal(pipeline.person(portrait, cameras, proxies=given, strength=0.5, seed=7).start, expected)
    assert torch.equal(pipeline.person(portrait, cameras, start="independent", seed=7).start, noise)
    shared = pipeline.person(portrait, cameras, start="shared", seed=7).start
    assert torch.equal(shared, noise[:1].expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="start must be one of proxies, independent, shared"):
        pipeline(portrait, cameras, start="none")


def test_guidance_acts_at_its_timesteps_only(pipeline, portrait):
    cameras = trajectory("arc", 2)
    never, none = Sampling(steps=2, guided=(0, 0)), Sampling(steps=2, guidance=1.0)
    assert torch.equal(pipeline(portrait, cameras, sampling=never), pipeline(portrait, cameras, sampling=none))
    late = Sampling(steps=2, guided=(0, 500))
    assert not torch.equal(pipeline(portrait, cameras, sampling=late), pipeline(portrait, cameras, sampling=none))


def test_f_cam_acts_at_its_timesteps_only(pipeline, portrait):
    cameras, calls = trajectory("arc", 2), []
    without = pipeline.with_networks(view_controlnet=None)
    never, none = Sampling(steps=2, posed=(0, 0)), Sampling(steps=2)
    assert torch.equal(pipeline(portrait, cameras, sampling=never), without(portrait, cameras, sampling=none))
    handle = pipeline.denoiser.view_controlnet.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[2]))
    try:
        early = pipeline(portrait, cameras, sampling=Sampling(steps=2, posed=(500, 1000)))
    finally:
        handle.remove()
    assert [int(t[0]) for t in calls] == [999]  # of 999 and 499
    assert not torch.equal(early, pipeline(portrait, cameras, sampling=none))


def test_the_reference_is_read_once_at_its_timestep(pipeline, portrait):
    cameras, seen = trajectory("arc", 2), []
    hook = lambda _, inputs: seen.append(inputs[1].tolist())  # noqa: E731
    handle = pipeline.denoiser.reference_encoder.register_forward_pre_hook(hook)
    try:
        pipeline(portrait, cameras, sampling=Sampling(steps=2, reference_timestep=261))
        assert seen == [[261]]
        every = pipeline(portrait, cameras, sampling=Sampling(steps=1))
        once = pipeline(portrait, cameras, sampling=Sampling(steps=1, reference_timestep=seen[1][0]))
    finally:
        handle.remove()
    assert len(seen) == 3 and torch.equal(every, once)  # the same timestep: the same views


def test_networks_see_the_views_in_the_given_order(pipeline, portrait):
    cameras, seen = trajectory("arc", 3), []
    order, sampling = torch.tensor([2, 0, 1]), Sampling(steps=1)
    handle = pipeline.denoiser.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        plain = pipeline(portrait, cameras, sampling=sampling)
        ordered = pipeline(portrait, cameras, sampling=sampling, order=order)
    finally:
        handle.remove()
    assert torch.equal(seen[0][order], seen[2])
    assert not torch.equal(plain, ordered)  # this module has positions
    alone = pipeline.with_networks(view_consistency=None)
    assert torch.allclose(
        alone(portrait, cameras, sampling=sampling), alone(portrait, cameras, sampling=sampling, order=order), atol=1e-5
    )


def test_f_ref_reads_the_references_that_it_is_given(pipeline, portrait):
    cameras, sampling, other = trajectory("arc", 2), Sampling(steps=1), torch.rand(2, 3, SIDE, SIDE)
    own = pipeline(portrait, cameras, sampling=sampling)
    assert torch.equal(own, pipeline(portrait, cameras, references=portrait, sampling=sampling))
    assert not torch.equal(own, pipeline(portrait, cameras, references=other, sampling=sampling))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_people_together_are_those_one_by_one(pipeline, portrait, solver):
    """Each with its own reference, cameras, order and noise; also in windows."""
    cameras = trajectory("arc", 5)
    given = [
        pipeline.person(portrait, cameras, seed=1),
        pipeline.person(portrait.flip(-1), cameras.flip(0), seed=2, order=torch.tensor([3, 0, 4, 1, 2])),
        pipeline.person(1 - portrait, cameras, seed=3, start="independent"),
    ]
    sampling = Sampling(2, solver, window=3)
    together = pipeline.views(given, sampling)
    for person, views in zip(given, together, strict=True):
        assert (views - pipeline.views([person], sampling)[0]).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert torch.equal(pipeline.views(given[:1], sampling)[0], pipeline(portrait, cameras, seed=1, sampling=sampling))


def test_more_views_than_the_module_holds_are_made_in_windows(pipeline, portrait):
    seen = []
    denoiser = pipeline.denoiser
    handle = denoiser.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        views = pipeline(portrait, trajectory("orbit", 7), sampling=Sampling(steps=2, closed=True))
    finally:
        handle.remove()
    assert len(views) == 7 and set(seen) == {4}


def test_windows_are_averaged_by_their_weights():
    windows = view_windows(7, 4, 2, step=1)
    values = torch.arange(7.0)[:, None]
    assert torch.allclose(over_windows(lambda rows: values[rows], windows, values), values, atol=1e-6)
    numbers = iter(range(len(windows)))
    mixed = over_windows(lambda rows: torch.full((len(rows), 1), float(next(numbers))), windows, values)
    assert 0 < mixed[3] < len(windows) - 1


def test_photographs_of_any_size_are_cut_to_their_centre(pipeline):
    wide = torch.zeros(1, 3, 50, 90)
    wide[..., 20:70] = 1.0
    assert torch.equal(pipeline.fit(wide), torch.ones(1, 3, SIDE, SIDE))
    assert pipeline.fit(torch.rand(2, 3, 16, 16)).shape == (2, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": torch.zeros(0, 25)}, "at least one view"),
        ({"portrait": torch.rand(SIDE, SIDE, 3)}, r"images must be \[N, 3, H, W\]"),
        ({"proxies": torch.rand(2, 3, SIDE, SIDE)}, "2 proxies for 3 cameras"),
        ({"camera_images": torch.rand(4, 3, SIDE, SIDE)}, "4 camera_images for 3 cameras"),
    ],
)
def test_inputs_that_do_not_fit_are_named(pipeline, portrait, change, message):
    inputs = {"portrait": portrait, "cameras": trajectory("arc", 3), **change}
    with pytest.raises(ValueError, match=message):
        pipeline(**inputs)


def test_bad_settings_and_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="solver"):
        Sampling(solver="euler")
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        Sampling(steps=0)
    with pytest.raises(CheckpointError, match=r"unet\.safetensors"):
        Pipeline.from_folder(tmp_path)
