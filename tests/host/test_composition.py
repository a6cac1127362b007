"""Our patches together with what people put around them, in the real host; docs/composition.md lists the rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from evaluation.goldens.host import NARROW_CONFIG, HostPath, host_path, known_weights

from .conftest import stock_control_net

VIEWS, STEPS = 4, 2
ATTENTIONS = 16


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ours(path, model, side=8, encoder=None, seed=7):
    """MODEL with reference attention and view consistency."""
    reference = path.patches.reference
    latents = path.references(draw(seed, 1, 4, side, side))
    model = reference.apply_reference_attention(model, encoder or path.encoder, latents)
    return path.patches.cross_view_attention.apply_cross_view_attention(model, path.views)


def prompts(path, side=8, tokens=7):
    """Cameras on the positive side, and two texts of different lengths unless asked otherwise."""
    images = torch.rand(VIEWS, 8 * side, 8 * side, 3, generator=torch.Generator().manual_seed(8))
    positive = [[draw(4, 1, 7, 32), {}]]
    control = path.patches.view_controlnet.apply_view_controlnet(positive, path.control_net, images)
    return control, [[draw(5, 1, tokens, 32), {}]]


def run(path, model, texts=None, side=8, cfg=3.0, sampler="ddim", steps=STEPS, views=VIEWS, callback=None):
    noise = draw(6, views, 4, side, side)
    torch.manual_seed(0)  # ToMe and HyperTile draw from the global generator
    with torch.inference_mode():
        return path.comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "normal",
            *(texts or prompts(path, side)),
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=1,
            callback=callback,
        )


def difference(views, expected) -> float:
    return ((views - expected).norm() / expected.norm()).item()


@contextmanager
def counted(path, monkeypatch):
    """Yields {"encoder": F_ref's batch sizes, "unet": UNet calls, "read": attentions that read the reference}."""
    counts = {"encoder": [], "unet": 0, "read": 0}
    append = path.patches.longer_attention.append_reference

    def count_read(*args):
        counts["read"] += 1
        return append(*args)

    def count_unet(*_):
        counts["unet"] += 1

    hooks = [
        path.encoder.patcher.model.register_forward_pre_hook(lambda _, args: counts["encoder"].append(len(args[0]))),
        path.model.model.diffusion_model.time_embed.register_forward_pre_hook(count_unet),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(path.patches.longer_attention, "append_reference", count_read)
        yield counts
    for hook in hooks:
        hook.remove()


def lora_weights():
    generator, weights = torch.Generator().manual_seed(3), {}
    for name in ("output_blocks_11_1", "middle_block_1"):
        channels = {"output_blocks_11_1": 32, "middle_block_1": 128}[name]
        key = f"lora_unet_{name}_transformer_blocks_0_attn1_to_v"
        weights[f"{key}.lora_up.weight"] = 0.3 * torch.randn(channels, 4, generator=generator)
        weights[f"{key}.lora_down.weight"] = 0.3 * torch.randn(4, channels, generator=generator)
    return weights


def lora(host, path, model):
    return path.comfy.sd.load_lora_for_models(model, None, lora_weights(), 1.0, 0.0)[0]


def merging(host, path, model):
    """The base model merged with another one."""
    weights = {key: 1.2 * tensor for key, tensor in known_weights(NARROW_CONFIG)["unet"].items()}
    other = path.pack.host.loading.build_model(weights, path.encoder.config, {})
    return host.nodes.NODE_CLASS_MAPPINGS["ModelMergeSimple"]().merge(model, other, 0.9)[0]


def image_prompt(host, path, model):
    """As IPAdapter does it: every cross-attention is replaced and also reads image tokens, the positive side's only."""
    attention = path.comfy.ldm.modules.attention.optimized_attention

    def read(q, k, v, options):
        text = attention(q, k, v, options["n_heads"], attn_precision=options["attn_precision"])
        tokens = draw(10, 1, 4, k.shape[-1]).to(k).expand(len(q), -1, -1)
        image = attention(q, tokens, tokens, options["n_heads"], attn_precision=options["attn_precision"])
        rows = len(q) // len(options["cond_or_uncond"])
        positive = torch.tensor([side == 0 for side in options["cond_or_uncond"]]).repeat_interleave(rows)
        return text + image * positive[:, None, None]

    model = model.clone()
    for part, numbers in (("input", (1, 2, 4, 5, 7, 8)), ("middle", (0,)), ("output", range(3, 12))):
        for number in numbers:
            model.set_model_attn2_replace(read, part, number)
    return model


def node(name, *settings):
    """A node of the host that takes a MODEL and gives one."""

    def compose(host, path, model):
        kind = host.nodes.NODE_CLASS_MAPPINGS[name]
        if hasattr(kind, "execute"):
            result = kind.execute(model, *settings)
            return (result.args if hasattr(result, "args") else result)[0]
        return getattr(kind(), kind.FUNCTION)(model, *settings)[0]

    return compose


@dataclass(frozen=True)
class Row:
    """What is composed, how many attentions read the portrait in a step, and how our one warning begins."""

    compose: Callable
    read: int = ATTENTIONS
    warning: str | None = None
    side: int = 8


@pytest.fixture(scope="module")
def by_ourselves(path):
    """by_ourselves(side): the views without anything composed."""
    return lru_cache(lambda side: run(path, ours(path, path.model, side), side=side))


LEFT_OUT = "Reference attention leaves out the self-attentions that another node replaces: middle 0"
ROWS = {
    "LoRA": Row(lora),
    "model merging": Row(merging),
    "IPAdapter-style image prompt": Row(image_prompt),
    "FreeU": Row(node("FreeU_V2", 1.3, 1.4, 0.9, 0.2), side=16),  # it divides by zero where a block is one pixel
    "ToMe": Row(node("TomePatchModel", 0.3)),
    "HyperTile": Row(node("HyperTile", 32, 2, 0, False)),
    "RescaleCFG": Row(node("RescaleCFG", 0.7)),
    "PAG": Row(node("PerturbedAttentionGuidance", 3.0), 2 * ATTENTIONS - 1, LEFT_OUT),
    "SAG": Row(node("SelfAttentionGuidance", 0.5, 2.0), ATTENTIONS - 1, LEFT_OUT, side=16),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(host, path, by_ourselves, monkeypatch, caplog, assert_clean, name):
    """After and before our nodes: F_ref once a step, every attention reads, both sides count, nothing is left."""
    row = ROWS[name]
    with assert_clean(path.model):
        alone = run(path, row.compose(host, path, path.model), side=row.side)
        plain = by_ourselves(row.side)
        results = []
        for model in (
            row.compose(host, path, ours(path, path.model, row.side)),
            ours(path, row.compose(host, path, path.model), row.side),
        ):
            caplog.clear()
            with counted(path, monkeypatch) as counts:
                results.append(run(path, model, side=row.side))
            assert counts["encoder"] == [1] * STEPS
            assert counts["read"] == row.read * STEPS
            said = [record.message for record in caplog.records if record.levelname == "WARNING"]
            assert len(said) == bool(row.warning) and all(line.startswith(row.warning) for line in said)
        assert torch.isfinite(results[0]).all()
        assert difference(results[1], results[0]) < 1e-5, "the order of the nodes must not count"
        assert min(difference(results[0], alone), difference(results[0], plain)) > 1e-4


def test_hypertile_reads_the_whole_portrait_in_every_tile(host, path):
    """A tile of a view reads its own part and the whole portrait: one tile equals no HyperTile."""
    attention = path.patches.longer_attention
    own, reference = draw(1, 4, 16, 8), draw(2, 1, 64, 8)
    for strength, expected in ((1.0, reference.expand(4, -1, -1)), (0.0, own[:, None].expand(-1, 4, -1, -1))):
        reading = attention.Reading(reference, 2 * reference, 1, strength)
        keys, values = attention.append_reference(own, own, [reading])
        assert keys.shape == values.shape == (4, 16 + 64, 8)
        assert torch.equal(keys[:, 16:], expected.reshape(4, 64, 8)), "at 0 own tokens, equally often"


def test_text_prompts_of_different_lengths(path, monkeypatch):
    with counted(path, monkeypatch) as counts:
        views = run(path, ours(path, path.model), prompts(path, tokens=14))
    assert counts == {"encoder": [1] * STEPS, "unet": STEPS, "read": ATTENTIONS * STEPS}
    assert torch.isfinite(views).all()


def test_lcm(host, path, monkeypatch):
    """LCM LoRA, LCM sampling and sampler, 4 steps without guidance."""
    lcm = node("ModelSamplingDiscrete", "lcm", False)
    model = lcm(host, path, lora(host, path, ours(path, path.model)))
    with counted(path, monkeypatch) as counts:
        views = run(path, model, sampler="lcm", cfg=1.0, steps=4)
    assert counts == {"encoder": [1] * 4, "unet": 4, "read": 4 * ATTENTIONS}
    assert torch.isfinite(views).all()


def test_lora_as_a_hook_on_one_prompt(path, monkeypatch, assert_clean):
    """The positive side has other weights than the negative: two UNet calls a step."""
    hooks = path.comfy.hooks.create_hook_lora(lora_weights(), 1.0, 0.0)
    positive, negative = prompts(path)
    hooked = path.comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    with assert_clean(path.model):
        plain = run(path, ours(path, path.model), (positive, negative))
        with counted(path, monkeypatch) as counts:
            views = run(path, ours(path, path.model), (hooked, negative))
        assert counts == {"encoder": [1] * STEPS, "unet": 2 * STEPS, "read": ATTENTIONS * STEPS}
        assert difference(views, plain) > 1e-4


def test_other_controlnets_before_and_after(host, path):
    """Two in one chain, in both orders, with the host's own Apply node for the other one."""
    images = torch.rand(VIEWS, 64, 64, 3, generator=torch.Generator().manual_seed(8))
    others = torch.rand(VIEWS, 64, 64, 3, generator=torch.Generator().manual_seed(9))
    other = stock_control_net(path)
    text, negative = [[draw(4, 1, 7, 32), {}]], [[draw(5, 1, 7, 32), {}]]
    cameras = path.patches.view_controlnet.apply_view_controlnet

    def stock(positive, negative):
        return host.nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, other, others, 0.5, 0.0, 1.0)

    first = stock(cameras(text, path.control_net, images), negative)
    last = stock(text, negative)
    last = cameras(last[0], path.control_net, images), last[1]
    model = ours(path, path.model)
    views = run(path, model, first)
    assert difference(run(path, model, last), views) < 1e-5
    alone = run(path, model, (cameras(text, path.control_net, images), negative))
    assert min(difference(views, alone), difference(views, run(path, model, stock(text, negative)))) > 1e-4


@pytest.mark.parametrize(
    "option, dtype, tolerance",
    [
        ("fp16_unet", torch.float16, 0.02),
        ("bf16_unet", torch.bfloat16, 0.1),
        ("fp8_e4m3fn_unet", torch.float8_e4m3fn, 0.6),
    ],
)
def test_weights_of_other_dtypes(path, by_ourselves, monkeypatch, option, dtype, tolerance):
    """As with the host's options --fp16-unet, --bf16-unet and --fp8_e4m3fn-unet."""
    monkeypatch.setattr(path.comfy.model_management.args, option, True)
    loading, weights = path.pack.host.loading, known_weights(NARROW_CONFIG)
    config, expected = path.encoder.config, by_ourselves(8)

    def cast(name):
        return {key: tensor.to(dtype) for key, tensor in weights[name].items()}

    low = HostPath.__new__(HostPath)
    low.comfy, low.patches = path.comfy, path.patches
    low.model = loading.build_model(cast("unet"), config, {})
    low.encoder = loading.build_reference_encoder(cast("reference_encoder"), config, {})
    low.views = loading.build_cross_view_attention(cast("view_consistency"), config, {})
    low.control_net = path.patches.view_controlnet.build_view_controlnet(cast("view_controlnet"), config)
    with counted(low, monkeypatch) as counts:
        views = run(low, ours(low, low.model))
    assert counts == {"encoder": [1] * STEPS, "unet": STEPS, "read": ATTENTIONS * STEPS}
    for network in (low.model, low.encoder.patcher, low.views.patcher, low.control_net.control_model_wrapped):
        assert {parameter.dtype for parameter in network.model.parameters()} == {dtype}
    assert difference(views, expected) < tolerance


def test_weights_that_do_not_fit_stay_where_they_are(host, path, by_ourselves, monkeypatch, assert_clean):
    """As with the host's option --novram: every layer of every network is brought in for its own call only."""
    loaded = path.comfy.model_management.LoadedModel
    load = loaded.model_load
    path.comfy.model_management.unload_all_models()
    with assert_clean(path.model):
        whole = run(path, lora(host, path, ours(path, path.model)))
        path.comfy.model_management.unload_all_models()
        with monkeypatch.context() as short_of_memory:
            short_of_memory.setattr(loaded, "model_load", lambda self, budget=0, **kwargs: load(self, 0.1, **kwargs))
            views = run(path, lora(host, path, ours(path, path.model)))
            control = path.control_net.control_model_wrapped
            for network in (path.model, path.encoder.patcher, path.views.patcher, control):
                layers = [m for m in network.model.modules() if list(m.parameters(recurse=False))]
                assert layers and all(layer.comfy_cast_weights for layer in layers)
                assert network.loaded_size() == 0
        assert difference(views, whole) < 1e-5


def test_several_gpus_are_refused(path):
    """Views and portrait of a run are on one device; the host's MultiGPU CFG Split leaves this mark on a MODEL."""
    split = path.model.clone()
    split.set_additional_models("multigpu", [path.model.clone()])
    with pytest.raises(ValueError, match="works on one GPU only; take MultiGPU CFG Split off this MODEL"):
        run(path, ours(path, split))


@pytest.mark.parametrize("views", [VIEWS, 8])
def test_interrupted_run_leaves_nothing_behind(path, assert_clean, views):
    """In the middle of a run, also between windows; the same MODEL afterwards gives what a fresh one gives."""
    management, texts = path.comfy.model_management, [[[draw(seed, 1, 7, 32), {}]] for seed in (4, 5)]

    def interrupt(step, *_):
        management.interrupt_current_processing()
        if views == VIEWS:
            management.throw_exception_if_processing_interrupted()

    with assert_clean(path.model):
        model = ours(path, path.model)
        with pytest.raises(management.InterruptProcessingException):
            run(path, model, texts, views=views, callback=interrupt)
        assert not any("diffportrait3d" in key for key in model.model_options["transformer_options"])
        again = run(path, model, texts, views=views)
        assert torch.equal(again, run(path, ours(path, path.model), texts, views=views))


def test_two_reference_models_in_one_graph(path):
    """Side by side and on one MODEL: each keeps to its own portrait and weights."""
    loading = path.pack.host.loading
    weights = {key: tensor * 1.1 for key, tensor in known_weights(NARROW_CONFIG)["reference_encoder"].items()}
    other = loading.build_reference_encoder(weights, path.encoder.config, {})
    models = [ours(path, path.model), ours(path, path.model, encoder=other, seed=11)]
    first, second = (run(path, model) for model in models)
    assert difference(second, first) > 1e-4
    assert torch.equal(run(path, models[0]), first) and torch.equal(run(path, models[1]), second)
    reference = path.patches.reference
    latents = path.references(draw(11, 1, 4, 8, 8))
    both = reference.apply_reference_attention(models[0], other, latents)
    calls = []
    for encoder in (path.encoder, other):
        calls.append(encoder.patcher.model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0]))))
    together = run(path, both)
    hooks, batches = calls[:2], calls[2:]
    for hook in hooks:
        hook.remove()
    assert batches == [1] * (2 * STEPS)
    assert min(difference(together, first), difference(together, second)) > 1e-4
