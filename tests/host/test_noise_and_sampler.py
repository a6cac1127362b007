"""Start noise, the release's DDIM, and the host's loop around them."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.cameras.labels import trajectory
from diffportrait3d.diffusion import Schedule, ddim_sample, start_noise
from evaluation.goldens.data import load_golden
from evaluation.goldens.host import NARROW_CONFIG, GivenNoise, HostPath, host_path

VIEWS = 3


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


@pytest.fixture(scope="module")
def prompt():
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4)), {}]]


@pytest.fixture(scope="module")
def latent():
    return {"samples": torch.randn(VIEWS, 4, 8, 8, generator=torch.Generator().manual_seed(9))}


def test_golden_trajectory(pack, host):
    """The release's sampler with the release's noise, through a guider of the host."""
    golden = load_golden()
    with torch.inference_mode():
        outputs = host_path(pack, host.comfy).trajectory(golden.inputs, eta=0.5)
    assert torch.equal(outputs["timesteps"], golden.outputs["ddim_eta05.timesteps"])
    for part in ("x", "pred_x0"):
        expected = golden.outputs[f"ddim_eta05.{part}"]
        assert (outputs[part] - expected).abs().max() < 1e-3 * expected.abs().max(), part


def test_sigmas_are_the_release_s(path):
    model_sampling = path.model.get_model_object("model_sampling")
    sigmas = path.patches.sampling.ddim_sigmas(model_sampling, 50)
    assert len(sigmas) == 51
    assert model_sampling.timestep(sigmas).tolist() == [*range(981, 0, -20), 0]
    assert sigmas[0].item() == pytest.approx(13.120, abs=1e-3)
    assert sigmas[-1].item() == pytest.approx(0.02917, abs=1e-5)
    with pytest.raises(ValueError, match="1 to 1000 steps, not 0"):
        path.patches.sampling.ddim_sigmas(model_sampling, 0)
    flow = path.comfy.model_sampling.ModelSamplingDiscreteFlow()
    with pytest.raises(ValueError, match="not ModelSamplingDiscreteFlow"):
        path.patches.sampling.ddim_sigmas(flow, 50)


@pytest.mark.parametrize("steps, proxy_gain, noise_gain", [(50, 0.898261, 13.12777), (100, 0.953095, 13.92914)])
def test_start_is_handed_over_at_the_first_step(path, steps, proxy_gain, noise_gain):
    """Gains of the release's start in units of x / sqrt(abar)."""
    sampling = path.patches.sampling
    model_sampling = path.model.get_model_object("model_sampling")
    sigma = sampling.ddim_sigmas(model_sampling, steps)[0]
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)

    def start(noise, latent):
        handed = sampling.official_start(noise, latent, sigma, model_sampling.sigmas[-1], False)
        return model_sampling.noise_scaling(sigma[None], handed, latent, False).item()

    assert start(zero, one) == pytest.approx(proxy_gain, abs=1e-5)
    assert start(one, zero) == pytest.approx(noise_gain, abs=1e-4)


def test_start_at_the_highest_sigma(path):
    """A schedule that starts at timestep 999 itself: nothing is left to hand over."""
    sampling, model_sampling = path.patches.sampling, path.model.get_model_object("model_sampling")
    noise, latent, sigma = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), model_sampling.sigmas[-1]
    handed = sampling.official_start(noise, latent, sigma, sigma, True)
    scaled = model_sampling.noise_scaling(sigma[None], handed, latent, True)
    assert torch.allclose(scaled, latent + sigma * noise, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_host_s_loop_equals_the_core_s(path, prompt, latent, eta):
    """The plain UNet through the host's sampler and through `ddim_sample`, same start, same step noise."""
    from diffportrait3d.networks import UNet
    from evaluation.goldens.host import known_weights

    unet = UNet(NARROW_CONFIG)
    unet.load_state_dict(known_weights(NARROW_CONFIG)["unet"])
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(VIEWS, 4, 8, 8, generator=generator)
    steps = [torch.randn(VIEWS, 4, 8, 8, generator=generator) for _ in range(4)]
    schedule, context = Schedule(), prompt[0][0].expand(VIEWS, -1, -1)
    with torch.no_grad():
        start = start_noise(0.18215 * latent["samples"], noise, schedule)
        expected = ddim_sample(lambda x, t: unet(x, t, context), start, schedule, 4, eta, lambda step, x: steps[step])
    sampling = path.patches.sampling
    sigmas = sampling.ddim_sigmas(path.model.get_model_object("model_sampling"), 4)
    sampler = sampling.DDIMSampler(eta, step_noise=lambda step, x: steps[step].to(x))
    result = sampling.sample_views(path.model, prompt, prompt, GivenNoise(noise), latent, sampler, sigmas, 1.0)
    assert torch.allclose(0.18215 * result["samples"], expected, atol=1e-3 * expected.abs().max().item())


def test_noise_of_a_view_is_its_own(path, latent):
    noise = path.patches.noise.ViewNoise(7)
    whole = noise.generate_noise(latent)
    part = noise.generate_noise({"samples": latent["samples"][1:], "batch_index": [1, 2]})
    assert torch.equal(whole[1:], part)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, path.patches.noise.ViewNoise(8).generate_noise(latent))
    noises = path.patches.noise
    views = [noises.View(7, number) for number in range(len(whole))]
    draw = noises.step_noise_of(views[1:])
    assert torch.equal(draw(0, part), noises.step_noise_of(views)(0, whole)[1:])
    assert not torch.equal(draw(0, part), draw(1, part)) and not torch.equal(draw(0, part), part)


def test_views_do_not_depend_on_their_batch(path, prompt, latent):
    """Without cross-view attention a view alone is the same view as in its batch, fresh noise per step included."""
    sampling = path.patches.sampling
    sigmas = sampling.ddim_sigmas(path.model.get_model_object("model_sampling"), 3)

    def run(part, indices):
        sampler = sampling.DDIMSampler(0.5, indices=indices)
        return sampling.sample_views(
            path.model, prompt, prompt, path.patches.noise.ViewNoise(3), part, sampler, sigmas, 1.0
        )

    whole = run(latent, None)["samples"]
    part = {"samples": latent["samples"][2:], "batch_index": [2]}
    assert torch.allclose(run(part, [2])["samples"], whole[2:], atol=1e-3)


def test_stock_sampler_nodes_give_the_same(host, path, prompt, latent):
    """NOISE, SAMPLER and SIGMAS in SamplerCustomAdvanced: nothing is locked into our node."""
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    noise = path.patches.noise.ViewNoise(3)
    settings = {"preset": "custom", "steps": 3, "eta": 0.5, "start": "t=999"}
    own = (
        nodes["DP3D_ViewConsistencySampler"]
        .execute(path.model, prompt, dict(latent), noise, cfg=3.0, negative=prompt, **settings)
        .args[0]
    )
    sampler, sigmas = nodes["DP3D_ViewConsistencySchedule"].execute(path.model, **settings).args
    guider = nodes["CFGGuider"].execute(path.model, prompt, prompt, 3.0).args[0]
    stock = nodes["SamplerCustomAdvanced"].execute(noise, guider, sampler, sigmas, dict(latent)).args[0]
    assert torch.equal(own["samples"], stock["samples"])


@pytest.fixture(scope="module")
def vae(path):
    """An autoencoder of the host with 8 times smaller latents."""
    settings = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    import comfy.ldm.models.autoencoder as autoencoder

    shapes = autoencoder.AutoencoderKL(ddconfig=settings, embed_dim=4).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}
    return path.comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": settings, "embed_dim": 4}})


def test_noise_modes(host, path, vae, prompt):
    """The same node in every mode, through our sampler; paper is the default, with what old workflows gave."""
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    proxies = torch.rand(VIEWS, 64, 64, 3, generator=torch.Generator().manual_seed(1))

    def run(**settings):
        latent, noise, shown = nodes["DP3D_3DAwareNoise"].execute(vae, 64, 5, proxies=proxies, **settings).args
        views = (
            nodes["DP3D_ViewConsistencySampler"]
            .execute(path.model, prompt, dict(latent), noise, cfg=1.0, preset="custom", steps=2, eta=0.0, start="t=999")
            .args[0]["samples"]
        )
        return latent["samples"], noise.generate_noise(latent), views, shown

    latent, noise, views, _ = run()
    paper = run(mode="paper")
    assert torch.equal(paper[0], latent) and torch.equal(paper[2], views)
    matched = run(mode="schedule-matched")
    assert torch.equal(matched[0], latent) and torch.equal(matched[1], noise)
    assert not torch.equal(matched[2], views)
    shared = run(mode="shared")
    assert torch.equal(shared[1], noise[:1].expand_as(noise)) and not torch.equal(shared[2][0], shared[2][1])
    empty, drawn, made, shown = run(mode="random")
    assert empty.shape == latent.shape and not empty.any() and torch.equal(drawn, noise)
    assert not torch.equal(made, views) and shown.unique().tolist() == [0.5]
    with pytest.raises(ValueError, match="lacks cameras"):
        nodes["DP3D_3DAwareNoise"].execute(vae, 64, 5, mode="random")
    cameras = {"labels": trajectory("arc", VIEWS)}
    own = run(mode="portrait", image=proxies[:1], cameras=cameras)
    assert torch.equal(own[0], latent[:1].expand_as(latent)) and torch.equal(own[1], noise)
    with pytest.raises(ValueError, match="lacks cameras and image, which mode portrait needs; connect them"):
        run(mode="portrait")
    with pytest.raises(ValueError, match="mode portrait takes one portrait; image has 3, choose one"):
        run(mode="portrait", image=proxies, cameras=cameras)
    with pytest.raises(ValueError, match="mode must be one of paper, .*, not 'best'"):
        path.patches.noise.ViewNoise(0, "best")


def test_zero_terminal_snr_is_warned_of(host, path, vae, prompt, latent, caplog):
    """The host's own node makes such a model; only where proxies would be lost, and once per run."""
    zero = host.nodes.NODE_CLASS_MAPPINGS["ModelSamplingDiscrete"]().patch(path.model, "v_prediction", True)[0]
    sampling, proxies = path.patches.sampling, torch.rand(2, 64, 64, 3)

    def warnings():
        found = [record for record in caplog.records if "zero terminal SNR" in record.message]
        caplog.clear()
        return len(found)

    def sample(model, samples, start):
        sampler, sigmas = sampling.DDIMSampler(0.0, start), torch.tensor([14.0, 1.0])
        sampling.sample_views(model, prompt, prompt, path.patches.noise.ViewNoise(0), samples, sampler, sigmas, 1.0)
        return warnings()

    empty = {"samples": torch.zeros_like(latent["samples"])}
    assert [sample(zero, latent, start) for start in sampling.STARTS] == [1, 0]
    assert sample(path.model, latent, "t=999") == sample(zero, empty, "t=999") == 0
    node = host.nodes.NODE_CLASS_MAPPINGS["DP3D_3DAwareNoise"]
    for model, mode, expected in ((zero, "paper", 1), (path.model, "paper", 0), (zero, "random", 0)):
        node.execute(vae, 64, 0, proxies=proxies, mode=mode, model=model)
        assert warnings() == expected


def test_negative_side_is_the_positive_s_prompt_without_control(path, prompt):
    with_control = [[prompt[0][0], {"control": object(), "control_apply_to_uncond": False, "mask": 1}]]
    assert path.patches.sampling.without_control(with_control) == [[prompt[0][0], {"mask": 1}]]


def test_errors(path):
    with pytest.raises(ValueError, match="eta must be between 0 and 1, not 2"):
        path.patches.sampling.DDIMSampler(2.0)
    with pytest.raises(ValueError, match="start must be one of"):
        path.patches.sampling.DDIMSampler(0.5, start="noon")
