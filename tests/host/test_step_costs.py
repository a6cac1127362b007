"""What a step asks of the device, counted in the real host: nothing is done twice, and nothing is read back."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from diffportrait3d.networks import UNetConfig
from evaluation.goldens.host import NARROW_CONFIG, GivenNoise, HostPath, host_path
from training.engine.cost import StepCounts

VIEWS, STEPS = 4, 3


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(views):
    shapes = {
        "context": (1, 7, 32),
        "ref_latent": (1, 4, 8, 8),
        "ref_latent2": (1, 4, 8, 8),
        "hint": (views, 3, 64, 64),
    }
    return {name: draw(seed, *shape).clamp(-1, 1) for seed, (name, shape) in enumerate(shapes.items())}


def run(path, parts=(1, True, True), views=VIEWS, cfg=3.0, callback=None, change=lambda model: model, **settings):
    """Views [V, 4, 8, 8] of the release's sampler with references, cameras and view consistency."""
    given = inputs(views) | settings.pop("given", {})
    model, positive = path.prepare(given, *parts)
    sampling, negative = path.patches.sampling, [[draw(9, 1, 7, 32), {}]]
    sigmas = sampling.ddim_sigmas(model.get_model_object("model_sampling"), STEPS)
    latent, noise = {"samples": draw(7, views, 4, 8, 8)}, GivenNoise(draw(8, views, 4, 8, 8))
    arguments = change(model), positive, negative, noise, latent, sampling.DDIMSampler(0.5), sigmas, cfg, callback
    with torch.no_grad():
        return sampling.sample_views(*arguments, **settings)["samples"]


@contextmanager
def inputs_of(*modules):
    """(number of the module, shape of its input) of every call, while the block runs."""
    seen, hooks = [], []
    for number, module in enumerate(modules):
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, n=number: seen.append((n, tuple((*args, *kwargs.values())[0].shape))),
                with_kwargs=True,
            )
        )
    yield seen
    for hook in hooks:
        hook.remove()


def difference(views, expected) -> float:
    return ((views - expected).norm() / expected.norm()).item()


def self_attentions(path):
    unet = path.model.model.diffusion_model
    return [module for name, module in unet.named_modules() if name.endswith("attn1")]


def attention_lengths(path, seen):
    """change= of `run`: (rows, queries, keys) of every self-attention are added to `seen`."""

    def probe(attention, q, k, v, *args, **kwargs):
        if k.shape[1] != 7:  # not the text's
            seen.append((len(q), q.shape[1], k.shape[1]))
        return attention(q, k, v, *args, **kwargs)

    def change(model):
        model.model_options["transformer_options"]["optimized_attention_override"] = probe
        return model

    return change


@pytest.mark.parametrize("views", [VIEWS, 10])
def test_the_portrait_is_projected_once_a_step(path, views):
    """Also where the views are in two windows: F's to_k and to_v see 1 x M tokens of it, and each view's own."""
    attentions = self_attentions(path)
    with inputs_of(*(getattr(a, name) for a in attentions for name in ("to_k", "to_v"))) as seen:
        run(path, views=views)
    portrait = Counter(number for number, shape in seen if shape[0] == 1)
    assert len(portrait) == 2 * 16 and set(portrait.values()) == {STEPS}
    own = {shape[1] for _, shape in seen if shape[0] > 1}
    assert own == {shape[1] for _, shape in seen if shape[0] == 1}, "no copy of the portrait for a view"


def test_view_attention_makes_queries_keys_and_values_in_one_product(path):
    """Two attentions in each of the release's 27 modules."""
    named = dict(path.views.patcher.model.named_modules())
    joined = [module for name, module in named.items() if name.endswith(".to_qkv")]
    assert not [name for name in named if name.endswith((".to_q", ".to_k", ".to_v"))]
    with inputs_of(*joined) as seen:
        run(path)
    assert Counter(number for number, _ in seen) == dict.fromkeys(range(2 * 27), STEPS)


@pytest.mark.parametrize("camera", [True, False])
def test_the_unconditional_pass_reads_its_own_tokens_only(path, camera):
    """Whether cameras are there or not, both sides are in one UNet call, and only one of them is longer."""
    seen = []
    with inputs_of(path.model.model.diffusion_model.time_embed) as calls:
        run(path, (1, camera, True), change=attention_lengths(path, seen))
    assert len(calls) == STEPS
    assert len(seen) == 2 * 16 * STEPS and {rows for rows, *_ in seen} == {VIEWS}
    assert Counter(keys // queries for _, queries, keys in seen) == {1: 16 * STEPS, 2: 16 * STEPS}


def test_one_call_for_both_sides_gives_what_two_give(path, monkeypatch):
    """F_cam runs on the positive side alone; where memory is short for all of us or for F, there are two calls."""
    control = path.control_net.control_model
    with inputs_of(path.model.model.diffusion_model.time_embed, control) as calls:
        together = run(path)
    assert [shape[0] for number, shape in calls if number == 0] == [2 * VIEWS] * STEPS
    assert [shape[0] for number, shape in calls if number == 1] == [VIEWS] * STEPS
    free = path.comfy.model_management.get_free_memory(torch.device("cpu"))
    for needed in (free / 2, 1e30):  # the first is enough for the host
        monkeypatch.setattr(path.model.model, "memory_required", lambda *args, needed=needed, **kwargs: needed)
        with inputs_of(path.model.model.diffusion_model.time_embed) as calls:
            assert difference(run(path), together) < 1e-5
        assert [shape[0] for _, shape in calls] == [VIEWS] * 2 * STEPS
    monkeypatch.undo()
    without = run(path, (1, False, True), cfg=0.0)
    assert difference(run(path, cfg=0.0), without) < 1e-5, "the unconditional pass sees no camera"


def test_a_control_net_on_both_sides_acts_on_both(path):
    """Given to the negative side by the user, it is not left out there."""
    given = inputs(VIEWS)
    model, positive = path.prepare(given, 1, True, True)
    negative = [[draw(9, 1, 7, 32), {"control": positive[0][1]["control"], "control_apply_to_uncond": False}]]
    noise, zeros = draw(6, VIEWS, 4, 8, 8), torch.zeros(VIEWS, 4, 8, 8)
    with inputs_of(path.control_net.control_model) as calls:
        path.comfy.sample.sample(
            model, noise, STEPS, 3.0, "ddim", "normal", positive, negative, zeros, disable_pbar=True, seed=1
        )
    assert {shape[0] for _, shape in calls} == {2 * VIEWS}


def test_a_step_reads_nothing_back_from_the_device(path):
    """But for what the host itself looks at."""
    counts, steps = StepCounts(counting=False), []

    def second_step_only(*_):
        steps.append(None)
        counts.counting = len(steps) == 1

    with counts:
        run(path, callback=second_step_only)
    assert counts.kernels and not [place for place in counts.waits if place.startswith("patches/")]


def costs(path, monkeypatch) -> tuple:
    """Of a run: what the host loads after how many steps, calls of F, F_ref and F_cam, kernels of all steps but the
    first, and the views."""
    steps, loads, counts = [], [], StepCounts()
    loaded_model = path.comfy.model_management.LoadedModel
    load = loaded_model.model_load

    def noted(loaded, *args, **kwargs):
        loads.append((type(loaded.model.model).__name__, len(steps)))
        return load(loaded, *args, **kwargs)

    def after_step(*_):
        steps.append(None)
        counts.counting = True

    monkeypatch.setattr(loaded_model, "model_load", noted)
    networks = path.model.model.diffusion_model, path.encoder.patcher.model, path.control_net.control_model
    with inputs_of(*networks) as calls, counts:
        views = run(path, callback=after_step)
    monkeypatch.undo()
    return Counter(loads), Counter(number for number, _ in calls), counts.kernels, views


def test_a_later_run_costs_what_the_first_does(pack, path, host, monkeypatch):
    """Also after other networks have come and gone: each of ours is loaded once a run, none at a step."""
    host.comfy.model_management.unload_all_models()
    first = costs(path, monkeypatch)
    networks = ("BaseModel", "UNetModel", "ControlNet", "CrossViewAttention")
    assert first[0] == {(name, 0): 1 for name in networks}
    assert first[1] == dict.fromkeys(range(3), STEPS) and first[2].total() > 0
    for unload in (False, True):
        others = HostPath(pack, host.comfy, NARROW_CONFIG)
        run(others)
        if unload:
            host.comfy.model_management.unload_all_models()
        del others
        again = costs(path, monkeypatch)
        assert again[:3] == first[:3] and torch.equal(again[3], first[3])


def test_guidance_in_a_part_of_the_schedule(path):
    """Steps outside of it are single passes, and the views those of a run in two parts."""
    unet = path.model.model.diffusion_model.time_embed
    part = path.patches.run_state.SigmaRange
    with inputs_of(unet) as calls:
        views = run(path, guided=part(0.0, 0.4))
    assert [shape[0] for _, shape in calls] == [2 * VIEWS, VIEWS, VIEWS]  # at timesteps 667, 334 and 1
    assert torch.equal(run(path, guided=part(0.0, 1.0)), run(path))
    assert torch.equal(run(path, guided=part(1.0, 1.0)), run(path, cfg=1.0))
    assert min(difference(views, run(path)), difference(views, run(path, cfg=1.0))) > 1e-3


def test_the_encoder_can_be_read_once(path):
    """As of any timestep; that of the only step gives what reading at every step gives."""
    given = inputs(VIEWS)
    latents, encoder = path.references(given["ref_latent"] / 0.18215), path.encoder

    def views(timestep, steps):
        model = path.patches.reference.apply_reference_attention(
            path.model, encoder, latents, reference_timestep=timestep
        )
        noise, text = draw(6, VIEWS, 4, 8, 8), [[draw(4, 1, 7, 32), {}]]
        arguments = steps, 3.0, "ddim", "normal", text, text, torch.zeros(VIEWS, 4, 8, 8)
        return path.comfy.sample.sample(model, noise, *arguments, disable_pbar=True, seed=1)

    with inputs_of(encoder.patcher.model) as calls:
        once = views(500, STEPS)
    assert len(calls) == 1
    assert difference(once, views(None, STEPS)) > 1e-4
    assert difference(views(999, 1), views(None, 1)) < 1e-4


@pytest.fixture
def compiled_path(pack, host):
    """Smaller networks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = UNetConfig(32, context_dim=32, channel_mult=(1,), num_res_blocks=1, attention_levels=(0,), max_views=VIEWS)
    yield HostPath(pack, host.comfy, config)
    torch._dynamo.reset()


def compiled(host):
    """change= of `run`: the host's TorchCompileModel. Torch's own code generator takes minutes, so the graph is run as
    it was traced."""
    return lambda model: host.nodes.NODE_CLASS_MAPPINGS["TorchCompileModel"].execute(model, "eager").args[0]


def test_torch_compile_takes_the_whole_unet_as_one_graph(host, compiled_path):
    """All patches, F_ref included, without a break, and F_cam as another; another portrait needs none of its own."""
    counters = torch._dynamo.utils.counters
    for given in ({}, {"ref_latent": draw(77, 1, 4, 8, 8)}):
        plain = run(compiled_path, given=given)
        assert torch.equal(run(compiled_path, change=compiled(host), given=given), plain)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_settings_changed_under_torch_compile_act(host, compiled_path):
    """TorchCompileModel takes a graph without a look at what patches keep in transformer options; ours is not there."""
    path, text, seen = compiled_path, [[draw(4, 1, 7, 32), {}]], []
    references = path.references(inputs(VIEWS)["ref_latent"] / 0.18215)
    noise, zeros = draw(6, VIEWS, 4, 8, 8), torch.zeros(VIEWS, 4, 8, 8)
    for settings in ({}, {"strength": 0.5}, {"end_percent": 0.4}, {"blocks": ["input"]}):
        model = path.patches.reference.apply_reference_attention(path.model, path.encoder, references, **settings)
        plain, views = (
            path.comfy.sample.sample(
                change(model), noise, STEPS, 3.0, "ddim", "normal", text, text, zeros, disable_pbar=True, seed=1
            )
            for change in (lambda model: model, compiled(host))
        )
        assert torch.equal(views, plain) and not any(torch.equal(views, other) for other in seen)
        seen.append(views)


def test_nothing_compiled_is_left_on_the_conditioning(host, compiled_path):
    """F_cam is compiled during the run, and itself afterwards: the same CONDITIONING may meet another MODEL."""
    path, seen = compiled_path, []
    model, positive = path.prepare(inputs(VIEWS), 1, True, True)
    control, negative = positive[0][1]["control"], [[draw(9, 1, 7, 32), {}]]
    arguments = draw(6, VIEWS, 4, 8, 8), STEPS, 3.0, "ddim", "normal", positive, negative, torch.zeros(VIEWS, 4, 8, 8)
    for change in (compiled(host), lambda model: model):
        path.comfy.sample.sample(
            change(model), *arguments, disable_pbar=True, seed=1, callback=lambda *_: seen.append(control.control_model)
        )
        assert control.control_model is path.control_net.control_model
    assert seen[0] is not control.control_model and seen[-1] is control.control_model
