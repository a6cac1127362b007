"""View ControlNet in the real host."""

from __future__ import annotations

import pytest
import torch

from evaluation.goldens.data import load_golden
from evaluation.goldens.host import NARROW_CONFIG, SINGLE_PASSES, HostPath, host_path

from .conftest import stock_control_net

VIEWS, STEPS = 4, 2


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


@pytest.fixture(scope="module")
def images():
    """Camera conditions [4, 64, 64, 3] that differ from view to view."""
    return torch.rand(VIEWS, 64, 64, 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def prompt():
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4)), {}]]


def apply(path, prompt, images, control_net=None, **settings):
    return path.patches.view_controlnet.apply_view_controlnet(
        prompt, control_net or path.control_net, images, **settings
    )


def run(path, positive, negative, model=None, views=VIEWS, cfg=3.0):
    noise = torch.randn(views, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return path.comfy.sample.sample(
            model or path.model,
            noise,
            STEPS,
            cfg,
            "ddim",
            "normal",
            positive,
            negative,
            torch.zeros(views, 4, 8, 8),
            disable_pbar=True,
            seed=1,
        )


def difference(views: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance; what the random networks give is a few hundred in size."""
    return ((views - expected).norm() / expected.norm()).item()


def hints_seen(control_net, call) -> list[torch.Tensor]:
    """The hints the network gets during `call()`."""
    hints = []
    hook = control_net.control_model.register_forward_pre_hook(
        lambda _, args, kwargs: hints.append(kwargs["hint"].clone()), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return hints


def test_golden(pack, host):
    golden = load_golden()
    with torch.inference_mode():
        eps = host_path(pack, host.comfy).predict(golden.inputs, *SINGLE_PASSES["eps_ref_cn"])
    assert (eps - golden.outputs["eps_ref_cn"]).abs().max() < 5e-5


def test_positive_side_only_and_in_the_range_of_the_training(path, prompt, images, assert_clean):
    with assert_clean(path.model):
        base = run(path, prompt, prompt)
        positive = apply(path, prompt, images)
        hints = hints_seen(path.control_net, lambda: run(path, positive, prompt))
        assert [hint.shape[0] for hint in hints] == [VIEWS] * STEPS, "one pass a step, the positive one"
        assert torch.allclose(hints[0], images.movedim(-1, 1) * 2 - 1)
        views = run(path, positive, prompt)
        assert difference(views, base) > 0.01
        assert difference(run(path, positive, prompt, cfg=0.0), run(path, prompt, prompt, cfg=0.0)) < 1e-5
        assert torch.equal(run(path, positive, prompt), views)
    assert "control" not in prompt[0][1], "the prompt that came in must stay as it was"


def test_one_image_serves_all_views_and_others_must_match(path, prompt, images):
    one = run(path, apply(path, prompt, images[:1]), prompt)
    same = run(path, apply(path, prompt, images[:1].expand(VIEWS, -1, -1, -1)), prompt)
    assert difference(one, same) < 1e-5
    with pytest.raises(ValueError, match="3 condition images for 4 views"):
        run(path, apply(path, prompt, images[:3]), prompt)
    with pytest.raises(ValueError, match="View ControlNet: image is an empty batch"):
        apply(path, prompt, images[:0])
    with pytest.raises(ValueError, match="View ControlNet: image contains NaN"):
        apply(path, prompt, images * torch.nan)


def test_images_of_another_size_are_resized(path, prompt, images):
    large = images.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    hints = hints_seen(path.control_net, lambda: run(path, apply(path, prompt, large), prompt))
    assert torch.allclose(hints[0], images.movedim(-1, 1) * 2 - 1, atol=1e-5)


def test_hints_follow_the_windows_of_the_host(path, prompt, images, host_windows):
    """Six views in windows of four: the host's own class would give every window the first four hints."""
    six = torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(6))
    model = host_windows(path.model, 4, 2)
    hints = hints_seen(path.control_net, lambda: run(path, apply(path, prompt, six), prompt, model=model, views=6))
    expected = six.movedim(-1, 1) * 2 - 1
    assert len(hints) == 2 * STEPS
    assert torch.allclose(hints[0], expected[0:4]) and torch.allclose(hints[1], expected[2:6])


def test_two_in_a_row_add_up(path, prompt, images):
    half = apply(path, apply(path, prompt, images, strength=0.5), images, strength=0.5)
    assert difference(run(path, half, prompt), run(path, apply(path, prompt, images), prompt)) < 1e-5


def test_strength_and_percent_range(path, prompt, images):
    assert apply(path, prompt, images, strength=0.0) is prompt
    hints = hints_seen(path.control_net, lambda: run(path, apply(path, prompt, images, start_percent=1.0), prompt))
    assert hints == []
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        apply(path, prompt, images, start_percent=0.9, end_percent=0.1)


def test_control_net_of_the_host_s_loader_gets_our_range(path, prompt, images):
    stock = stock_control_net(path)
    views = run(path, apply(path, prompt, images, control_net=stock), prompt)
    assert torch.equal(views, run(path, apply(path, prompt, images), prompt))
    with pytest.raises(ValueError, match="not T2IAdapter"):
        adapter = path.comfy.controlnet.T2IAdapter(None, 3, 8, "nearest-exact")
        apply(path, prompt, images, control_net=adapter)


def test_stock_apply_node_takes_our_control_net(host, path, prompt, images):
    positive, _ = host.nodes.ControlNetApplyAdvanced().apply_controlnet(
        prompt, prompt, path.control_net, images, 1.0, 0.0, 1.0
    )
    assert difference(run(path, positive, prompt), run(path, apply(path, prompt, images), prompt)) < 1e-5


def test_stock_apply_node_with_images_for_other_views(host, path, prompt, images):
    """The host would repeat them; on a MODEL with a patch of ours the run is stopped before the first step."""
    stock = host.nodes.ControlNetApplyAdvanced().apply_controlnet
    model = path.patches.cross_view_attention.apply_cross_view_attention(path.model, path.views)
    for count in (3, VIEWS + 1):
        batch = images.repeat(2, 1, 1, 1)[:count]
        positive, negative = stock(prompt, prompt, path.control_net, batch, 1.0, 0.0, 1.0)
        with pytest.raises(ValueError, match=f"Apply ControlNet got {count} condition images for 4 views"):
            run(path, positive, negative, model=model)
    for batch in (images, images[:1]):
        positive, _ = stock(prompt, prompt, path.control_net, batch, 1.0, 0.0, 1.0)
        assert (
            difference(
                run(path, positive, prompt, model=model), run(path, apply(path, prompt, batch), prompt, model=model)
            )
            < 1e-5
        )


def test_keyframes_of_other_packs_find_the_hosts_own_class(path, prompt, images):
    """Advanced-ControlNet gives keyframes and masks to `type(control) == ControlNet` only, and makes its own class of
    it with the same network, hint and range."""
    assert type(path.control_net) is path.comfy.controlnet.ControlNet

    class Keyframes(path.comfy.controlnet.ControlNet):
        """Strength 0.3, as its timestep keyframe would set it."""

        def get_control(self, *args, **kwargs):
            self.strength = 0.3
            return super().get_control(*args, **kwargs)

    control = Keyframes(path.control_net.control_model, preprocess_image=path.control_net.preprocess_image)
    path.control_net.copy().set_cond_hint(images.movedim(-1, 1)).copy_to(control)
    control.control_model_wrapped = path.control_net.control_model_wrapped
    views = run(path, [[prompt[0][0], {"control": control, "control_apply_to_uncond": False}]], prompt)
    assert difference(views, run(path, apply(path, prompt, images, strength=0.3), prompt)) < 1e-5


def test_context_windows_of_animatediff_evolved(path, prompt, images):
    """They tell a ControlNet the numbers of a window's views; the next run without them knows of none."""
    positive = apply(path, prompt, images)
    control = positive[0][1]["control"]
    control.sub_idxs, control.full_latent_length = [1, 3], VIEWS
    views = run(path, positive, prompt, views=2)
    assert torch.equal(views, run(path, apply(path, prompt, images[[1, 3]]), prompt, views=2))
    assert control.sub_idxs is None
    assert torch.equal(run(path, positive, prompt), run(path, apply(path, prompt, images), prompt))
