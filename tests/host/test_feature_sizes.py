"""Patches that resize features in the middle of the UNet, during a part of a run or all of it, beside ours."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from evaluation.goldens.host import NARROW_CONFIG, HostPath, host_path

VIEWS, STEPS = 4, 3
SIDES = {"square": (8, 8), "upright": (12, 8), "wide, not divided evenly": (8, 20)}


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read_portrait(path, model, size=(8, 8), count=1, mask=None, encoder=None, **settings):
    latents = path.references(draw(7, count, 4, *size), mask)
    return path.patches.reference.apply_reference_attention(model, encoder or path.encoder, latents, **settings)


def shrink(host, model, factor=2.0, block=3, start=0.0, end=1.0, after_skip=True):
    """The host's Deep Shrink; below 1 the factor enlarges."""
    deep_shrink = host.nodes.NODE_CLASS_MAPPINGS["PatchModelAddDownscale"]
    return deep_shrink.execute(model, block, factor, start, end, after_skip, "bicubic", "bicubic").args[0]


def cameras(path, size=(8, 8), seed=8):
    images = torch.rand(VIEWS, 8 * size[0], 8 * size[1], 3, generator=torch.Generator().manual_seed(seed))
    return path.patches.view_controlnet.apply_view_controlnet(prompt(4), path.control_net, images)


def prompt(seed):
    return [[draw(seed, 1, 7, 32), {}]]


def run(path, model, size=(8, 8), positive=None, sampler="ddim", views=VIEWS):
    noise = draw(6, views, 4, *size)
    torch.manual_seed(0)  # HyperTile and ToMe draw from the global generator
    with torch.inference_mode():
        return path.comfy.sample.sample(
            model,
            noise,
            STEPS,
            3.0,
            sampler,
            "normal",
            positive or prompt(4),
            prompt(5),
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=1,
        )


def difference(views, expected) -> float:
    return ((views - expected).norm() / expected.norm()).item()


def warnings(caplog) -> list[str]:
    found = [record.message for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return found


@pytest.fixture
def read(path, monkeypatch):
    """Tokens of every reading, as they reach the attentions: [(reference [1, R*M, C], own [N, L, C])]."""
    attention, run_type = path.patches.longer_attention, path.patches.reference.ReferenceRun
    seen, tokens, append, project = [], [], attention.append_reference, run_type.project

    def record(keys, *args):
        seen.append((tokens[-1], keys.shape))
        return append(keys, *args)

    def record_tokens(run, module, reference):
        tokens.append(reference.clone())
        return project(run, module, reference)

    monkeypatch.setattr(attention, "append_reference", record)
    monkeypatch.setattr(run_type, "project", record_tokens)
    return seen


@pytest.mark.parametrize("size", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("factor, after_skip", [(2.0, True), (1.5, False), (0.5, True), (0.5, False)])
def test_portrait_is_read_at_every_size(host, path, read, caplog, assert_clean, size, factor, after_skip):
    """Smaller and larger, before and after the skip connection, in either order of the nodes."""
    settings = {"factor": factor, "end": 0.5, "after_skip": after_skip}
    with assert_clean(path.model):
        alone = run(path, shrink(host, path.model, **settings), size)
        plain = run(path, read_portrait(path, path.model, size), size)
        read.clear()
        views = run(path, shrink(host, read_portrait(path, path.model, size), **settings), size)
        assert len(read) == 16 * STEPS
        assert all(reference.shape[1] == own[1] for reference, own in read)
        first, last = ([own[1] for _, own in step] for step in (read[:16], read[-16:]))
        assert first != last, "sizes change inside of the run"
        other_order = read_portrait(path, shrink(host, path.model, **settings), size)
        assert torch.equal(run(path, other_order, size), views)
    assert torch.isfinite(views).all()
    assert min(difference(views, alone), difference(views, plain)) > 1e-3
    assert not warnings(caplog)


@pytest.mark.parametrize("part", ["all of the run", "its beginning", "its end"])
@pytest.mark.parametrize("encoder", ["current", "zero"])
def test_encoder_runs_under_the_patch(host, path, read, part, encoder):
    """Every reading is what F_ref gives where the host itself samples the portraits under that patch."""
    current = path.encoder
    network = path.pack.host.loading.HostNetwork(
        "reference_encoder", current.patcher, current.config, {"reference_timestep": encoder}, current.path
    )
    start, end = {"all of the run": (0.0, 1.0), "its beginning": (0.0, 0.5), "its end": (0.5, 1.0)}[part]
    run(path, shrink(host, read_portrait(path, path.model, encoder=network), start=start, end=end))
    sampling = path.model.get_model_object("model_sampling")
    sigmas = path.comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)[:-1]
    patches = shrink(host, path.model, start=start, end=end).model_options["transformer_options"]["patches"]
    latents = path.model.model.process_latent_in(draw(7, 1, 4, 8, 8))
    for sigma, readings in zip(sigmas, torch.arange(16 * STEPS).split(16), strict=True):
        expected = []

        def write(tokens, keys, values, options, found=expected):
            found.append(tokens)
            return tokens, keys, values

        with torch.inference_mode():
            path.encoder.patcher.model(
                latents,
                sampling.timestep(sigma[None]) * (encoder == "current"),
                context=prompt(4)[0][0],
                transformer_options={"patches": {**patches, "attn1_patch": [write]}, "sigmas": sigma[None]},
            )
        for number, tokens in zip(readings.tolist(), expected, strict=True):
            assert torch.allclose(read[number][0], tokens, atol=1e-4), f"sigma {sigma}, attention {number % 16}"


def test_encoder_runs_once_a_step(host, path):
    """And once more where the run meets the patch; a patch at rest costs nothing."""
    batches = []
    hook = path.encoder.patcher.model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    run(path, shrink(host, read_portrait(path, path.model)))
    assert batches == [1] * (STEPS + 1)
    batches.clear()
    run(path, shrink(host, read_portrait(path, path.model), start=1.0))
    hook.remove()
    assert batches == [1] * STEPS


def test_other_patches_do_not_reach_the_encoder(host, path, read):
    """FreeU changes values, not sizes, and in place: under Deep Shrink it acts on the views alone."""
    run(path, shrink(host, read_portrait(path, path.model, (16, 16))), (16, 16))
    portraits = [reference for reference, _ in read[:16]]
    read.clear()
    free_u = host.nodes.NODE_CLASS_MAPPINGS["FreeU_V2"].execute(path.model, 1.3, 1.4, 0.9, 0.2).args[0]
    run(path, read_portrait(path, shrink(host, free_u), (16, 16)), (16, 16))
    assert all(torch.equal(again, first) for (again, _), first in zip(read[:16], portraits, strict=True))


def test_a_patch_that_resizes_the_views_alone(path, read):
    """One that F_ref cannot be run under (it looks at the batch): the tokens are resampled."""

    def halve(h, options):
        alone = options["block"][1] == 3 and h.shape[0] == 2 * VIEWS
        return torch.nn.functional.avg_pool2d(h, 2) if alone else h

    def enlarge(h, skip, options):
        return torch.nn.functional.interpolate(h, skip.shape[-2:]), skip

    model = read_portrait(path, path.model, (16, 16))
    model.set_model_input_block_patch_after_skip(halve)
    model.set_model_output_block_patch(enlarge)
    assert torch.isfinite(run(path, model, (16, 16))).all()
    assert len(read) == 16 * STEPS and all(reference.shape[1] == own[1] for reference, own in read)


def test_masks_and_several_references(host, path):
    """White masks are as none, grey ones as a lower strength, and two nodes as one batch, also at other sizes."""
    white = torch.ones(2, 64, 64)
    left = white.clone()
    left[..., 32:] = 0.0

    def views(mask=None, **settings):
        return run(path, shrink(host, read_portrait(path, path.model, count=2, mask=mask, **settings), end=0.5))

    full = views()
    assert difference(views(white), full) < 1e-5
    assert difference(views(0.5 * white), views(strength=0.5)) < 1e-5
    assert difference(views(left), full) > 1e-3
    both, reference = draw(7, 2, 4, 8, 8), path.patches.reference
    chained = path.model
    for latents in (both[:1], both[1:]):
        latents = path.references(latents)
        chained = reference.apply_reference_attention(chained, path.encoder, latents)
    assert difference(run(path, shrink(host, chained, end=0.5)), full) < 1e-5


@pytest.mark.parametrize("name, settings", [("HyperTile", (32, 2, 0, False)), ("TomePatchModel", (0.3,))])
def test_beside_hypertile_and_tome(host, path, name, settings):
    kind = host.nodes.NODE_CLASS_MAPPINGS[name]

    def beside(model):
        result = kind.execute(model, *settings)
        return (result.args if hasattr(result, "args") else result)[0]

    size = (16, 16)
    alone = run(path, shrink(host, beside(path.model)), size)
    views = run(path, shrink(host, beside(read_portrait(path, path.model, size))), size)
    assert torch.isfinite(views).all() and difference(views, alone) > 1e-3
    assert difference(run(path, read_portrait(path, shrink(host, beside(path.model)), size), size), views) < 1e-5


@pytest.mark.parametrize("split", [False, True])
def test_with_view_consistency_and_cameras(host, path, caplog, monkeypatch, assert_clean, split):
    """The whole method, also with positive and negative apart: nothing is left out, and everything counts."""
    if split:
        monkeypatch.setattr(path.model.model, "memory_required", lambda *args, **kwargs: 1e30)
    with assert_clean(path.model):
        model = shrink(
            host,
            path.patches.cross_view_attention.apply_cross_view_attention(read_portrait(path, path.model), path.views),
            end=0.5,
        )
        views = run(path, model, positive=cameras(path))
        assert torch.equal(run(path, model, positive=cameras(path)), views)
        assert not warnings(caplog)
        assert torch.isfinite(views).all()
        assert difference(run(path, model, positive=cameras(path, seed=9)), views) > 1e-3
    if split:
        monkeypatch.undo()
        assert difference(run(path, model, positive=cameras(path)), views) < 1e-5


def test_more_views_than_a_window(host, path, caplog):
    model = path.patches.cross_view_attention.apply_cross_view_attention(read_portrait(path, path.model), path.views)
    views = run(path, shrink(host, model, end=0.5), views=8)
    assert torch.isfinite(views).all() and not warnings(caplog)


@pytest.mark.parametrize("size", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_residuals_of_the_cameras_are_added_at_the_size_of_the_features(host, path, monkeypatch, caplog, size, factor):
    """Every one of the 13, also without any other patch of ours on the MODEL, and with another ControlNet before or
    after; the host by itself leaves them out."""
    added, module = [], path.comfy.ldm.modules.diffusionmodules.openaimodel
    apply_control = module.apply_control

    def record(h, control, name):
        residual = control[name][-1] if control and control.get(name) else None
        if residual is not None:
            added.append(residual.shape == h.shape)
        return apply_control(h, control, name)

    monkeypatch.setattr(module, "apply_control", record)
    model = shrink(host, path.model, factor)
    views = run(path, model, size, cameras(path, size))
    assert added == [True] * 13 * STEPS
    assert difference(views, run(path, model, size)) > 1e-3
    stock = path.comfy.controlnet.ControlNet.copy(path.control_net)
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    apply = host.nodes.NODE_CLASS_MAPPINGS["ControlNetApply"]().apply_controlnet
    added.clear()
    after = apply(cameras(path, size), stock, hint, 1.0)[0]
    run(path, model, size, after)
    images = torch.rand(VIEWS, 64, 64, 3, generator=torch.Generator().manual_seed(8))
    before = path.patches.view_controlnet.apply_view_controlnet(
        apply(prompt(4), stock, hint, 1.0)[0], path.control_net, images
    )
    run(path, model, size, before)
    assert len(added) >= 2 * 13 * STEPS and all(added)
    assert not warnings(caplog)


def test_residuals_of_the_right_size_stay_as_they_are(host, path):
    """At a size that nothing changes, the path through our patch gives the same views to the bit."""
    resting = shrink(host, path.model, start=1.0)
    assert torch.equal(run(path, resting, positive=cameras(path)), run(path, path.model, positive=cameras(path)))


def test_sizes_can_follow_each_other(host, path, read):
    """Two Deep Shrinks with ranges one after the other."""
    model = shrink(host, read_portrait(path, path.model, (16, 16)), 4.0, end=0.4)
    run(path, shrink(host, model, 2.0, block=6, start=0.4), (16, 16))
    sizes = [sorted({own[1] for _, own in step}) for step in (read[:16], read[16:32], read[32:])]
    assert any(first != second for first, second in pairwise(sizes))
    assert all(reference.shape[1] == own[1] for reference, own in read)
