"""What golden data cannot show: initial states, gradients, any number of views, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffportrait3d.diffusion import Schedule, ddim_sample, dpmpp_2m_sample, view_noise
from diffportrait3d.networks import (
    AutoencoderConfig,
    AutoencoderKL,
    CrossViewAttention,
    ReferenceEncoder,
    UNet,
    UNetConfig,
    ViewControlNet,
)

TINY = UNetConfig(model_channels=32, context_dim=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,))


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return module


@pytest.fixture(scope="module")
def unet():
    return randomise(UNet(TINY), 1)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    return x, torch.full((4,), 300), torch.randn(4, 3, 16, generator=generator)


def test_sd15_has_sixteen_self_attentions_and_27_view_modules():
    config = UNetConfig()
    with torch.device("meta"):
        unet, views = UNet(config), CrossViewAttention(config)
        cam, encoder = ViewControlNet(config), ReferenceEncoder(config)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert sum(n.endswith("attn1.to_q.weight") for n, _ in unet.named_parameters()) == 16
    assert sum(n.endswith("temporal_transformer.proj_in.weight") for n, _ in views.named_parameters()) == 27
    assert (count(unet), count(cam)) == (859_520_964, 361_279_120)
    assert count(unet) - count(encoder) == 12_164  # the output layer
    assert count(views) == 581_733_120


def test_new_branches_start_as_the_identity(unet, batch):
    x, t, context = batch
    cam, views = ViewControlNet(TINY), CrossViewAttention(TINY)
    cam.load_from_unet(unet.state_dict())
    hint = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        base = unet(x, t, context)
        controlled = unet(x, t, context, residuals=cam(x, hint, t, context))
        crossed = unet(x, t, context, cross_view=views, num_views=4, cross_view_in_middle=True)
    assert torch.equal(base, controlled) and torch.equal(base, crossed)


def test_reference_bank_of_the_view_itself_changes_nothing(unet, batch):
    """Keys and values seen twice leave the softmax average where it was."""
    x, t, context = batch
    encoder = ReferenceEncoder(TINY)
    encoder.load_from_unet(unet.state_dict())
    with torch.no_grad():
        first = encoder(x, t, context)
        same = unet(x, t, context, bank=first)
        other = unet(x, t, context, bank=[tokens.flip(0) for tokens in first])
        base = unet(x, t, context)
    assert (same - base).abs().max() < 1e-5 < (other - base).abs().max()


def test_gradients_reach_every_used_reference_weight(unet, batch):
    x, t, context = batch
    encoder = randomise(ReferenceEncoder(TINY), 3)
    unet(x, t, context, bank=encoder(x[:1], t[:1], context[:1])).square().mean().backward()
    without = {n for n, p in encoder.named_parameters() if p.grad is None}
    last = "output_blocks.3.1.transformer_blocks.0."
    assert without == {n for n, _ in encoder.named_parameters() if n.startswith(last) and ".norm1." not in n} | {
        "output_blocks.3.1.proj_out.weight",
        "output_blocks.3.1.proj_out.bias",
    }


@pytest.mark.parametrize("num_views", [2, 4])
def test_view_attention_mixes_views_but_not_groups(unet, batch, num_views):
    x, t, context = batch
    views = randomise(CrossViewAttention(TINY), 4)

    def run(latents):
        with torch.no_grad():
            return unet(latents, t, context, cross_view=views, num_views=num_views)

    changed = x.clone()
    changed[0] += 1.0
    moved = (run(changed) - run(x)).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert moved.tolist() == [index < num_views for index in range(4)]


def test_without_positions_the_order_of_views_does_not_matter(unet, batch):
    x, t, context = batch
    views = randomise(CrossViewAttention(TINY), 5)
    order = torch.tensor([2, 0, 3, 1])

    def run(rows):
        with torch.no_grad():
            return unet(x[rows], t[rows], context[rows], cross_view=views, num_views=4)

    plain = torch.arange(4)
    assert (run(order) - run(plain)[order]).abs().max() > 1e-3
    views.remove_positions()
    assert (run(order) - run(plain)[order]).abs().max() < 1e-5


@pytest.mark.parametrize("num_views", [None, 1, 3, 33])
def test_impossible_view_counts_are_named(unet, batch, num_views):
    x, t, context = batch
    with pytest.raises(ValueError, match=str(num_views)):
        unet(x, t, context, cross_view=CrossViewAttention(TINY), num_views=num_views)


def test_foreign_bank_and_hint_size_are_named(unet, batch):
    x, t, context = batch
    with pytest.raises(ValueError, match="another base model"):
        unet(x, t, context, bank=[torch.zeros(1, 4, 48)] * 3)
    with pytest.raises(ValueError, match="has 1 entries"):
        unet(x, t, context, bank=[torch.zeros(1, 4, 32)])
    with pytest.raises(ValueError, match="need \\(64, 64\\)"):
        ViewControlNet(TINY)(x, torch.zeros(4, 3, 32, 32), t, context)


def test_autoencoder_normalisation_keeps_the_image_and_whitens_latents():
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderConfig())
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images)
        decoded = vae.decode(before)
        vae.normalise(before.mean((0, 2, 3)), before.std((0, 2, 3)))
        vae.make_deterministic()
        after = vae.encode(images)
        assert before.shape == (6, 4, 8, 8)
        assert torch.allclose(after.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(after.std((0, 2, 3)), torch.ones(4), atol=1e-4)
        assert torch.allclose(vae.decode(after), decoded, atol=1e-4)
        assert (vae.moments(images)[1] == -30).all()


def test_ddim_recovers_a_known_image_exactly():
    """With the true noise at every step, DDIM(0) ends at the image diffused to the last noise level."""
    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    last = schedule.ddim_timesteps(20)[-1]
    end = ddim_sample(lambda x, t: noise, schedule.q_sample(x0, last, noise), schedule, steps=20, eta=0.0)
    assert torch.allclose(end, schedule.q_sample(x0, 0, noise), atol=1e-4)


def test_dpmpp_2m_is_exact_and_of_second_order():
    """Exact for a known image; for Gaussian data, whose ODE has a closed form, the error falls as steps^-2."""
    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    end = dpmpp_2m_sample(lambda x, t: noise, schedule.q_sample(x0, 999, noise), schedule)
    assert torch.allclose(end, x0, atol=1e-4)

    variance, half = 0.25, 499

    def eps(x, t):  # E[eps | x] for images drawn from N(0, variance)
        abar = schedule.alphas_cumprod.double()[t][:, None, None, None]
        return (1 - abar).sqrt() * x / (abar * variance + 1 - abar)

    def error(steps):
        states = []
        dpmpp_2m_sample(eps, noise, schedule, steps, lambda step, x, pred_x0: states.append(x))
        spread = [1 - (1 - variance) * schedule.alphas_cumprod[t].double() for t in (999, half)]
        return (states[steps // 2 - 1] - noise * (spread[1] / spread[0]).sqrt()).abs().max().item()

    errors = [error(steps) for steps in (20, 40, 80)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors


def test_trailing_timesteps():
    schedule, seen = Schedule(), []
    assert schedule.trailing_timesteps(8) == [124, 249, 374, 499, 624, 749, 874, 999]
    assert schedule.trailing_timesteps(1) == [999] and schedule.trailing_timesteps(1000) == list(range(1000))
    dpmpp_2m_sample(lambda x, t: seen.append(t.tolist()) or x, torch.zeros(2, 4, 1, 1), schedule, 3)
    assert seen == [[999, 999], [666, 666], [332, 332]]


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts(steps):
    for timesteps in (Schedule().ddim_timesteps, Schedule().trailing_timesteps):
        with pytest.raises(ValueError, match=str(steps)):
            timesteps(steps)


def test_view_noise_depends_on_seed_view_and_stream_alone():
    shape = (4, 8, 8)
    all_views = view_noise(7, range(6), shape)
    assert torch.equal(view_noise(7, [4, 1], shape), all_views[[4, 1]])
    others = [view_noise(8, range(6), shape), view_noise(7, range(6), shape, stream=1)]
    rows = torch.cat([all_views, *others]).flatten(1)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.3 and abs(all_views.std().item() - 1) < 0.1


@torch.no_grad()
def test_view_attention_over_more_pixels_than_a_kernel_takes(monkeypatch):
    """2048 px: 2**16 pixels and more go through in parts, which give what fewer pixels give."""
    config = UNetConfig(model_channels=32, context_dim=32, max_views=4)
    module, sizes = randomise(CrossViewAttention(config), 6).input_blocks_motion_module[0][0], []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest: sizes.append(len(q)) or attend(q, *rest))
    x = torch.randn(4, 32, 4, 1, generator=torch.Generator().manual_seed(7)).repeat(1, 1, 46, 184)
    views = module(x, 2)
    assert views.shape == x.shape and sum(sizes) == 2 * 2 * 184 * 184 > 2 * 2**16 and max(sizes) < 2**16
    assert torch.allclose(views, module(x[..., :4, :1].contiguous(), 2).repeat(1, 1, 46, 184), atol=1e-5)
