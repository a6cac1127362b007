"""More views than the cross-view modules hold, in the real host."""

from __future__ import annotations

import logging

import pytest
import torch

from diffportrait3d.views import view_windows, window_weights
from evaluation.goldens.host import NARROW_CONFIG, HostPath, host_path

from .conftest import stock_control_net

WINDOW, STEPS = 6, 2  # the narrow networks' positional table holds 6 views


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prompts():
    return [[draw(4, 1, 7, 32), {}]], [[draw(5, 1, 7, 32), {}]]


def apply(path, model=None, **settings):
    return path.patches.cross_view_attention.apply_cross_view_attention(model or path.model, path.views, **settings)


def with_reference(path, model):
    reference = path.patches.reference
    latents = path.references(draw(7, 1, 4, 8, 8))
    return reference.apply_reference_attention(model, path.encoder, latents)


def images(views):
    return torch.rand(views, 64, 64, 3, generator=torch.Generator().manual_seed(8))


def run(path, model, prompts, views=8, noise=None, steps=STEPS, sampler="ddim", cfg=3.0, callback=None):
    noise = draw(6, views, 4, 8, 8) if noise is None else noise
    with torch.inference_mode():
        return path.comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "normal",
            *prompts,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=1,
            callback=callback,
        )


def difference(views, expected) -> float:
    return ((views - expected).norm() / expected.norm()).item()


def batches(module):
    """(list that fills with the batch sizes of `module`'s calls, hook)."""
    seen = []
    return seen, module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))


def predict(path, model, x, positive, negative):
    """Denoised views of one evaluation at the highest noise level."""

    class Probe(path.comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            return model_wrap(noise, sigmas[0].expand(noise.shape[0]), **extra_args)

    guider = path.comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    with torch.inference_mode():
        return guider.sample(x, torch.zeros_like(x), Probe(), torch.tensor([14.0, 0.0]), seed=0)


@pytest.mark.parametrize("closed", [False, True])
def test_each_window_is_as_a_batch_of_its_views(path, prompts, closed):
    """Windows with reference, cameras and another ControlNet equal the weighted mean of separate runs."""
    positive, negative = prompts
    control, x, hints, others = path.patches.view_controlnet, draw(9, 8, 4, 8, 8) * 14, images(8), images(9)[1:]
    stock = stock_control_net(path)

    def conditions(views):
        chain = [[positive[0][0], {"control": stock.copy().set_cond_hint(others[views].movedim(-1, 1), 0.5)}]]
        return control.apply_view_controlnet(chain, path.control_net, hints[views]), negative

    model = apply(path, with_reference(path, path.model), closed_orbit=closed)
    total, weights = torch.zeros_like(x), torch.zeros(8, 1, 1, 1)
    for window in view_windows(8, WINDOW, 2, closed):
        weight = torch.tensor(window_weights(WINDOW))[:, None, None, None]
        total[window] += weight * predict(path, model, x[window], *conditions(window))
        weights[window] += weight
    together = predict(path, model, x, *conditions(list(range(8))))
    assert difference(together, total / weights) < 1e-5


def test_encoder_runs_once_a_step_and_calls_stay_small(path, prompts, assert_clean):
    with assert_clean(path.model):
        base = run(path, path.model, prompts)
        model = apply(path, with_reference(path, path.model))
        seen, hook = batches(path.encoder.patcher.model)
        sizes, other = batches(path.model.model.diffusion_model.time_embed)
        shown = []
        views = run(path, model, prompts, callback=lambda step, x0, x, total: shown.append((step, len(x0), total)))
        hook.remove()
        other.remove()
        assert seen == [1] * STEPS
        assert max(sizes) == 2 * WINDOW
        assert shown == [(step, 8, STEPS) for step in range(STEPS)], "previews show all views, once per step"
        assert difference(views, base) > 0.01
        assert torch.equal(run(path, model, prompts), views)
        assert "context_handler" not in model.model_options
        assert torch.equal(run(path, path.model, prompts), base)


def test_closed_orbits_join_end_to_end(path, prompts):
    """Twelve views in three windows: turning the orbit by a window turns the result, only if it is closed."""
    noise = draw(6, 12, 4, 8, 8)
    for closed, same in ((True, True), (False, False)):
        model = apply(path, closed_orbit=closed)
        turned = run(path, model, prompts, noise=noise.roll(4, 0)).roll(-4, 0)
        assert (difference(turned, run(path, model, prompts, noise=noise)) < 1e-4) == same


def test_every_view_learns_of_every_other(path, prompts):
    noise = draw(6, 10, 4, 8, 8)
    other = noise.clone()
    other[0] += draw(11, 4, 8, 8)
    model = apply(path, overlap=1)
    changed = run(path, model, prompts, noise=other, steps=3) - run(path, model, prompts, noise=noise, steps=3)
    assert changed.abs().amax(dim=(1, 2, 3)).min() > 0


def test_split_batch_equals_joint_batch(path, prompts, monkeypatch):
    model = apply(path, with_reference(path, path.model), closed_orbit=True)
    joint = run(path, model, prompts)
    monkeypatch.setattr(path.model.model, "memory_required", lambda *args, **kwargs: 1e30)
    assert difference(run(path, model, prompts), joint) < 1e-5


def test_stock_sampler_nodes_and_ours_give_the_same(host, path, prompts):
    nodes, latent = host.nodes.NODE_CLASS_MAPPINGS, {"samples": torch.zeros(7, 4, 8, 8)}
    settings, windows = {"preset": "custom", "steps": 2, "eta": 0.5, "start": "t=999"}, {"closed_orbit": True}
    noise = path.patches.noise.ViewNoise(3)
    own = (
        nodes["DP3D_ViewConsistencySampler"]
        .execute(
            path.model,
            prompts[0],
            dict(latent),
            noise,
            cfg=3.0,
            negative=prompts[1],
            view_consistency=path.views,
            **settings,
            **windows,
        )
        .args[0]
    )
    model = nodes["DP3D_ApplyViewConsistency"].execute(path.model, path.views, **windows).args[0]
    sampler, sigmas = nodes["DP3D_ViewConsistencySchedule"].execute(model, **settings).args
    guider = nodes["CFGGuider"].execute(model, *prompts, 3.0).args[0]
    stock = nodes["SamplerCustomAdvanced"].execute(noise, guider, sampler, sigmas, dict(latent)).args[0]
    assert torch.equal(own["samples"], stock["samples"])
    (views,) = host.nodes.KSampler().sample(model, 1, 2, 3.0, "dpmpp_2m", "karras", *prompts, dict(latent))
    assert torch.isfinite(views["samples"]).all()


def test_samplers_with_several_evaluations_a_step(path, prompts):
    assert torch.isfinite(run(path, apply(path), prompts, sampler="heun")).all()


def test_window_size(path, prompts):
    sizes, hook = batches(path.model.model.diffusion_model.time_embed)
    run(path, apply(path, window_size=4), prompts, views=6, steps=1)
    hook.remove()
    assert max(sizes) == 8
    network = path.pack.host.loading.HostNetwork(
        path.views.kind, path.views.patcher, path.views.config, {"num_views": 5}, path.views.path
    )
    assert path.patches.cross_view_attention.trained_views(network) == 5
    assert path.patches.cross_view_attention.trained_views(path.views) == 6
    with pytest.raises(ValueError, match="window_size 7 is more than the 6 views"):
        apply(path, window_size=7)
    with pytest.raises(ValueError, match="windows of 2 views must be 0 to 1, not 2"):
        apply(path, window_size=2)


def test_memory_is_budgeted_for_a_window(path, prompts, monkeypatch):
    shapes, helpers = [], path.comfy.sampler_helpers
    estimate = helpers.estimate_memory

    def record(model, shape, conds):
        shapes.append(shape[0])
        return estimate(model, shape, conds)

    monkeypatch.setattr(helpers, "estimate_memory", record)
    for model in (apply(path, with_reference(path, path.model)), with_reference(path, apply(path))):
        run(path, model, prompts, steps=1)
    assert shapes == [WINDOW + 1 + 2] * 2, "a window, one reference, and keys twice as long"


def test_self_attention_guidance_is_skipped_with_one_warning(host, path, prompts, caplog):
    guidance = host.nodes.NODE_CLASS_MAPPINGS["SelfAttentionGuidance"]
    model = guidance.execute(apply(path), 0.5, 2.0).args[0]
    views = run(path, model, prompts)
    assert len([r for r in caplog.records if "Self-Attention Guidance is skipped" in r.message]) == 1
    assert difference(views, run(path, apply(path), prompts)) < 1e-5
    assert model.model_options["sampler_post_cfg_function"], "only the run goes without it"


@pytest.mark.parametrize(("name", "warnings"), [("EasyCache", 1), ("LazyCache", 0)])
def test_caches_of_the_host_around_windows(host, path, prompts, caplog, name, warnings):
    """EasyCache compares windows with each other and is warned of; LazyCache leaves out whole steps."""
    model = host.nodes.NODE_CLASS_MAPPINGS[name].execute(apply(path), 3.0, 0.0, 1.0, False).args[0]
    sizes, hook = batches(path.model.model.diffusion_model.time_embed)
    run(path, model, prompts, steps=6)
    hook.remove()
    assert len(sizes) < 12, "two windows in six steps"
    assert name == "EasyCache" or len(sizes) % 2 == 0
    assert len([record for record in caplog.records if "EasyCache does not fit" in record.message]) == warnings


def test_animatediff_is_refused(path, prompts):
    """The marks that AnimateDiff-Evolved leaves on a MODEL, set through the host as that pack sets them."""
    extension = path.comfy.patcher_extension
    motion = path.model.clone()
    motion.set_attachments("ADE_params", object())
    motion.set_additional_models("ADE", [path.encoder.patcher])
    motion.set_injections("ADE", [extension.PatcherInjection(lambda patcher: None, lambda patcher: None)])
    with pytest.raises(ValueError, match="View consistency and AnimateDiff cannot share a MODEL"):
        apply(path, motion)
    late = apply(path)
    late.set_additional_models("ADE", [path.encoder.patcher])
    with pytest.raises(ValueError, match="take one of them off"):
        run(path, late, prompts, views=4)


def test_animatediff_sampling_without_a_motion_model_is_no_animatediff(path, prompts):
    """Its sampling node alone: wrappers under its name, which take no frames."""
    wrappers, sampling_only = path.comfy.patcher_extension.WrappersMP, path.model.clone()
    for kind in (wrappers.OUTER_SAMPLE, wrappers.CALC_COND_BATCH):
        sampling_only.add_wrapper_with_key(kind, "ADE", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    assert torch.equal(
        run(path, apply(path, sampling_only), prompts, views=4), run(path, apply(path), prompts, views=4)
    )


def window_lines(caplog) -> list[str]:
    """What the log says about windows; emptied for the next run."""
    lines = [record.getMessage() for record in caplog.records if "window" in record.getMessage().lower()]
    caplog.clear()
    return lines


def test_log_names_the_windows_once(path, prompts, host, caplog):
    """One line per run, none per window and step; afterwards, also after an error, the host logs as before."""
    caplog.set_level(logging.INFO)
    filters = list(logging.getLogger().filters)
    run(path, apply(path), prompts)
    assert window_lines(caplog) == [f"View consistency: 8 views in windows of {WINDOW}, overlap 2."]

    def interrupted(step, x0, x, total):
        logging.info("Context window said by somebody else, between the windows")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(path, apply(path), prompts, callback=interrupted)
    assert window_lines(caplog)[1:] == ["Context window said by somebody else, between the windows"]
    assert logging.getLogger().filters == filters
    run(path, apply(path), prompts, views=WINDOW)
    assert window_lines(caplog) == [], "no windows, no line"


def test_log_of_an_error_inside_a_window(path, prompts, caplog):
    """The UNet fails in the middle of a window: nothing of ours stays in the log's filters."""
    caplog.set_level(logging.INFO)
    filters = list(logging.getLogger().filters)

    def broken(module, args):
        raise RuntimeError("out of memory, say")

    hook = path.model.model.diffusion_model.time_embed.register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            run(path, apply(path), prompts)
    finally:
        hook.remove()
    assert logging.getLogger().filters == filters


def test_windows_of_the_host_go_on_telling(path, prompts, caplog, host_windows):
    """Context windows that a person has set up by the host's own node keep the host's lines."""
    caplog.set_level(logging.INFO)
    model = host_windows(apply(path), 4, 1)
    run(path, model, prompts)
    assert sum(line.startswith("Context window 1/") for line in window_lines(caplog)) == STEPS
