"""View consistency in the real host."""

from __future__ import annotations

import pytest
import torch

from evaluation.goldens.data import load_golden
from evaluation.goldens.host import NARROW_CONFIG, SINGLE_PASSES, HostPath, host_path

VIEWS, STEPS = 4, 2


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


@pytest.fixture(scope="module")
def prompts():
    """Two prompts of one length, so that the host puts both sides into one batch."""
    tokens = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4))
    return [[tokens[:1], {}]], [[tokens[1:], {}]]


def apply(path, model=None, **metadata):
    loading, views = path.pack.host.loading, path.views
    network = loading.HostNetwork(views.kind, views.patcher, views.config, metadata, views.path)
    return path.patches.cross_view_attention.apply_cross_view_attention(model or path.model, network)


def run(path, model, prompts, views=VIEWS, cfg=3.0, sampler="ddim"):
    noise = torch.randn(views, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return path.comfy.sample.sample(
            model,
            noise,
            STEPS,
            cfg,
            sampler,
            "normal",
            *prompts,
            torch.zeros(views, 4, 8, 8),
            disable_pbar=True,
            seed=1,
        )


def difference(views: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance; what the random networks give is a few hundred in size."""
    return ((views - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["eps_full", "eps_uncond"])
def test_golden(pack, host, name):
    golden = load_golden()
    with torch.inference_mode():
        eps = host_path(pack, host.comfy).predict(golden.inputs, *SINGLE_PASSES[name])
    assert (eps - golden.outputs[name]).abs().max() < 5e-5


def test_model_is_left_as_it_was_and_no_key_moves(path, prompts, assert_clean):
    keys = []
    with assert_clean(path.model):
        base = run(path, path.model, prompts)
        model = apply(path)
        model.set_model_input_block_patch(
            lambda h, options: (keys.append(list(path.model.model.diffusion_model.state_dict())), h)[1]
        )
        views = run(path, model, prompts)
        assert difference(views, base) > 0.01
        assert torch.equal(run(path, path.model, prompts), base)
        assert torch.equal(run(path, model, prompts), views)
    assert keys[0] == list(path.model.model.diffusion_model.state_dict())


def test_exception_in_a_run_leaves_nothing_behind(path, prompts, assert_clean):
    base = run(path, path.model, prompts)

    def fail(h, hsp, options):
        raise RuntimeError("boom")

    with assert_clean(path.model):
        broken = apply(path)
        broken.set_model_output_block_patch(fail)
        with pytest.raises(RuntimeError, match="boom"):
            run(path, broken, prompts)
        assert not any("diffportrait3d" in key for key in broken.model_options["transformer_options"])
        assert torch.equal(run(path, path.model, prompts), base)


@pytest.mark.parametrize("middle", ["unconditional", "always", "never"])
def test_split_batch_equals_joint_batch(path, prompts, monkeypatch, middle):
    model = apply(path, middle_view_attention=middle)
    joint = run(path, model, prompts)
    monkeypatch.setattr(path.model.model, "memory_required", lambda *args, **kwargs: 1e30)
    split = run(path, model, prompts)
    assert difference(split, joint) < 1e-5


def test_middle_block_of_the_chosen_pass_only(path, prompts):
    def views(middle, cfg):
        return run(path, apply(path, middle_view_attention=middle), prompts, cfg=cfg)

    positive = {middle: views(middle, 1.0) for middle in ("unconditional", "always", "never")}
    assert torch.equal(positive["unconditional"], positive["never"])
    assert difference(positive["always"], positive["never"]) > 1e-4
    negative = {middle: views(middle, 0.0) for middle in ("unconditional", "always", "never")}
    assert difference(negative["unconditional"], negative["always"]) < 1e-5
    assert difference(negative["unconditional"], negative["never"]) > 1e-4


def test_every_module_runs(path, prompts):
    """27 sites: 11 + 1 + 15 modules, two of them after each block that ends in an Upsample."""
    from collections import Counter

    calls, hooks = Counter(), []
    for name, module in path.views.patcher.model.named_modules():
        if name.endswith("temporal_transformer"):
            hooks.append(module.register_forward_hook(lambda *_, name=name: calls.update([name])))
    run(path, apply(path), prompts)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 27 and set(calls.values()) == {STEPS}


def test_any_number_of_views_from_two_up(path, prompts):
    model = apply(path)
    for views in (2, 5, 6, 7):
        assert run(path, model, prompts, views).shape[0] == views
    with pytest.raises(ValueError, match="at least 2 views in one batch, got 1"):
        run(path, model, prompts, 1)


def test_windows_of_the_host(path, prompts, host_windows):
    model = host_windows(apply(path), 4, 2)
    assert torch.isfinite(run(path, model, prompts, views=10)).all()
    model.model_options["context_handler"].context_length = 8
    with pytest.raises(ValueError, match="reaches 6 views at once .*, got 8; make the context windows smaller"):
        run(path, model, prompts, views=10)


def test_with_reference_and_control_in_any_order(path, prompts):
    reference, control = path.patches.reference, path.patches.view_controlnet
    drawn = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    latents = path.references(drawn)
    images = torch.rand(VIEWS, 64, 64, 3, generator=torch.Generator().manual_seed(8))
    positive = control.apply_view_controlnet(prompts[0], path.control_net, images)

    def with_reference(model):
        return reference.apply_reference_attention(model, path.encoder, latents)

    first = run(path, apply(path, with_reference(path.model)), (positive, prompts[1]))
    assert torch.equal(first, run(path, with_reference(apply(path)), (positive, prompts[1])))


def test_errors_name_the_numbers(pack, host, path):
    with pytest.raises(ValueError, match="already has view consistency"):
        apply(path, apply(path))
    with pytest.raises(ValueError, match="middle_view_attention is 'sometimes'"):
        apply(path, middle_view_attention="sometimes")
    with pytest.raises(ValueError, match=r"model_channels 32.*model_channels 64"):
        apply(path, host_path(pack, host.comfy).model)
