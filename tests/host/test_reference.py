"""Reference attention in the real host."""

from __future__ import annotations

import pytest
import torch

from evaluation.goldens.data import load_golden
from evaluation.goldens.host import NARROW_CONFIG, SINGLE_PASSES, HostPath, host_path

VIEWS, STEPS = 4, 3


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


@pytest.fixture(scope="module")
def references():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def apply(path, references, model=None, mask=None, encoder=None, **settings):
    reference = path.patches.reference
    latents = path.references(references, mask)
    return reference.apply_reference_attention(model or path.model, encoder or path.encoder, latents, **settings)


def zero_timestep(path):
    """The same encoder as if it had been trained at timestep 0."""
    current, metadata = path.encoder, {"reference_timestep": "zero"}
    return path.pack.host.loading.HostNetwork(
        "reference_encoder", current.patcher, current.config, metadata, current.path
    )


def run(path, model, negative_tokens=7, cfg=3.0, steps=STEPS, positive=None):
    """Views [4, 4, 8, 8] from the host's stock sampler."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    noise, tokens, negative = draw(VIEWS, 4, 8, 8), draw(1, 7, 32), draw(1, negative_tokens, 32)
    with torch.inference_mode():
        return path.comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "ddim",
            "normal",
            positive or [[tokens, {}]],
            [[negative, {}]],
            torch.zeros(VIEWS, 4, 8, 8),
            disable_pbar=True,
            seed=1,
        )


def difference(views: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance; what the random networks give is a few hundred in size."""
    return ((views - expected).norm() / expected.norm()).item()


class Counter:
    """Batch sizes with which a module is called, while the `with` lasts."""

    def __init__(self, module):
        self.module, self.batches = module, []

    def __enter__(self):
        self.hook = self.module.register_forward_pre_hook(lambda _, args: self.batches.append(args[0].shape[0]))
        return self.batches

    def __exit__(self, *_):
        self.hook.remove()


def lengthened(model) -> set[tuple]:
    """Puts an attention function of its own on `model`; the set fills with the attentions that read more tokens."""
    seen = set()

    def probe(attention, q, k, v, *args, **kwargs):
        if k.shape[1] > q.shape[1] and k.shape[2] == q.shape[2] and k.shape[1] != 7:  # not the text's
            options = kwargs["transformer_options"]
            seen.add((*options["block"], options["block_index"]))
        return attention(q, k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = probe
    return seen


@pytest.mark.parametrize("name", ["eps_ref", "eps_full_2ref"])
def test_golden(pack, host, name):
    golden = load_golden()
    with torch.inference_mode():
        eps = host_path(pack, host.comfy).predict(golden.inputs, *SINGLE_PASSES[name])
    assert (eps - golden.outputs[name]).abs().max() < 5e-5


def test_all_self_attentions_read_and_the_encoder_runs_once_a_step(path, references, assert_clean):
    with assert_clean(path.model):
        base = run(path, path.model)
        model = apply(path, references[:1])
        seen = lengthened(model)
        with Counter(path.encoder.patcher.model) as batches:
            views = run(path, model)
        assert batches == [1] * STEPS, "the encoder must see the references only, once per step"
        assert len(seen) == 16
        assert difference(views, base) > 0.01
        assert torch.equal(run(path, path.model), base), "the model that came in must stay as it was"
        assert torch.equal(run(path, model), views), "a second run must give the same"


def test_exception_in_a_run_leaves_nothing_behind(path, references, assert_clean):
    model = apply(path, references)
    views = run(path, model)

    def fail(h, options):
        raise RuntimeError("boom")

    with assert_clean(path.model):
        broken = model.clone()
        broken.set_model_input_block_patch(fail)
        with pytest.raises(RuntimeError, match="boom"):
            run(path, broken)
        assert not any("diffportrait3d" in key for key in broken.model_options["transformer_options"])
    assert torch.equal(run(path, model), views)


def test_split_batch_equals_joint_batch(path, references, monkeypatch):
    model = apply(path, references)
    layouts = []

    def probe(tokens, keys, values, options):
        layouts.append(tuple(options["cond_or_uncond"]))
        return tokens, keys, values

    model.set_model_attn1_patch(probe)
    joint = run(path, model)
    assert set(map(len, layouts)) == {2}
    layouts.clear()
    monkeypatch.setattr(path.model.model, "memory_required", lambda *args, **kwargs: 1e30)
    with Counter(path.encoder.patcher.model) as batches:
        split = run(path, model)
    assert set(map(len, layouts)) == {1}
    assert batches == [2] * STEPS
    assert difference(split, joint) < 1e-5


def test_unconditional_rows_are_as_without_reference(path, references):
    """At guidance 0 only the negative counts, and it has no reference."""
    assert difference(run(path, apply(path, references), cfg=0.0), run(path, path.model, cfg=0.0)) < 1e-5


def test_two_nodes_in_a_row_equal_one_batch(path, references):
    chained = apply(path, references[1:], apply(path, references[:1]))
    with Counter(path.encoder.patcher.model) as batches:
        views = run(path, chained)
    assert batches == [1] * (2 * STEPS)
    assert difference(views, run(path, apply(path, references))) < 1e-5


def test_two_positive_prompts(path, references):
    """Three chunks in one batch: every positive one reads the portrait."""
    tokens = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5))
    both = [[tokens[:1], {}], [tokens[1:], {}]]
    model = apply(path, references[:1])
    with Counter(path.encoder.patcher.model) as batches:
        views = run(path, model, positive=both)
    assert batches == [1] * STEPS
    assert difference(views, run(path, path.model, positive=both)) > 0.01


def test_encoder_runs_once_a_step_for_all_windows_of_the_host(path, references, host_windows):
    model = host_windows(apply(path, references[:1]), 2, 1)
    seen = lengthened(model)
    with Counter(path.encoder.patcher.model) as batches:
        run(path, model)
    assert batches == [1] * STEPS
    assert len(seen) == 16


def test_strength(path, references):
    base, full = run(path, path.model), run(path, apply(path, references))
    assert torch.equal(run(path, apply(path, references, strength=0.0)), base)
    assert difference(run(path, apply(path, references, strength=1e-7)), base) < 1e-5
    half = run(path, apply(path, references, strength=0.5))
    assert min(difference(half, base), difference(half, full)) > 0.01


def test_percent_range(path, references):
    with Counter(path.encoder.patcher.model) as batches:
        run(path, apply(path, references[:1], end_percent=0.5), steps=4)
    assert batches == [1, 1]
    with Counter(path.encoder.patcher.model) as batches:
        run(path, apply(path, references[:1], start_percent=1.0), steps=4)
    assert batches == []


def test_encoder_trained_at_timestep_zero_runs_once(path, references):
    model = apply(path, references[:1], encoder=zero_timestep(path))
    with Counter(path.encoder.patcher.model) as batches:
        views = run(path, model)
    assert batches == [1]
    assert difference(views, run(path, apply(path, references[:1]))) > 1e-4


@pytest.mark.parametrize("blocks, count", [(("input",), 6), (("middle",), 1), (("output",), 9), ((), 0)])
def test_parts_of_the_unet(path, references, blocks, count):
    model = apply(path, references[:1], blocks=blocks)
    seen = lengthened(model)
    run(path, model, steps=1)
    assert len(seen) == count and {place[0] for place in seen} == set(blocks)


def test_mask_lets_tokens_through_one_by_one(path, references):
    base, full = run(path, path.model), run(path, apply(path, references))
    white, left = torch.ones(1, 64, 64), torch.zeros(1, 64, 64)
    left[..., :32] = 1.0
    assert difference(run(path, apply(path, references, mask=white)), full) < 1e-5
    half = run(path, apply(path, references, mask=left))
    assert min(difference(half, base), difference(half, full)) > 0.01
    grey = run(path, apply(path, references, mask=0.5 * white))
    assert difference(grey, run(path, apply(path, references, strength=0.5))) < 1e-5
    second = torch.cat([1e-6 * white, white])
    chained = apply(path, references[1:], apply(path, references[:1], mask=second[:1]))
    assert difference(run(path, apply(path, references, mask=second)), run(path, chained)) < 1e-5


def test_mask_is_cropped_with_the_reference(path):
    """A wide reference loses its sides; a mask of another size is stretched over it first."""
    sides = torch.ones(1, 10, 20)
    sides[..., 5:15] = 0.0
    references = path.references(torch.zeros(1, 4, 8, 16), sides)
    assert references.mask_at(8, 8).max() < 0.01
    assert path.references(torch.zeros(1, 4, 8, 16)).mask_at(8, 8) is None


def test_masked_split_batch_equals_joint_batch(path, references, monkeypatch):
    mask = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(3)).round()
    model = apply(path, references, mask=mask, blocks=("input", "output"), strength=0.8)
    joint = run(path, model)
    monkeypatch.setattr(path.model.model, "memory_required", lambda *args, **kwargs: 1e30)
    assert difference(run(path, model), joint) < 1e-5


def test_a_node_that_replaces_self_attention_is_left_alone_with_one_warning(host, path, references, caplog):
    guidance = host.nodes.NODE_CLASS_MAPPINGS["PerturbedAttentionGuidance"]
    model = guidance.execute(apply(path, references), 3.0).args[0]
    views = run(path, model)
    assert torch.isfinite(views).all()
    warnings = [record for record in caplog.records if "Reference attention leaves out" in record.message]
    assert len(warnings) == 1 and "middle 0" in warnings[0].message


def test_several_nodes_warn_once_in_a_run(host, path, references, caplog):
    """However many steps and reference nodes; the next run says it again."""
    guidance = host.nodes.NODE_CLASS_MAPPINGS["PerturbedAttentionGuidance"]
    model = guidance.execute(apply(path, references[1:], apply(path, references[:1])), 3.0).args[0]
    for runs in (1, 2):
        run(path, model, steps=4)
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == runs


def test_lora_before_and_after_give_the_same(path, references):
    key = "diffusion_model.output_blocks.11.1.transformer_blocks.0.attn1.to_v.weight"
    weight = dict(path.model.model.named_parameters())[key]
    patch = {key: ("diff", (torch.full_like(weight, 0.1),))}
    after = apply(path, references)
    before = path.model.clone()
    assert after.add_patches(patch, 1.0) and before.add_patches(patch, 1.0)
    views = run(path, after)
    assert torch.equal(views, run(path, apply(path, references, model=before)))
    assert difference(views, run(path, apply(path, references))) > 1e-4


def test_memory_is_budgeted(path, references, monkeypatch):
    shapes, helpers = [], path.comfy.sampler_helpers
    estimate = helpers.estimate_memory

    def record(model, shape, conds):
        shapes.append(list(shape))
        return estimate(model, shape, conds)

    monkeypatch.setattr(helpers, "estimate_memory", record)
    run(path, apply(path, references))
    assert shapes == [[VIEWS + 2 + 2, 4, 8, 8]]


def test_latents_of_another_size_are_resized(path):
    small = torch.randn(1, 4, 6, 5)
    assert torch.isfinite(run(path, apply(path, small))).all()


def test_errors_name_the_numbers(pack, host, path, references):
    wide = host_path(pack, host.comfy)
    with pytest.raises(ValueError, match=r"model_channels 32, context_dim 32.*model_channels 64, context_dim 96"):
        apply(path, references, model=wide.model)
    with pytest.raises(ValueError, match="strength must be between 0 and 1, not 2"):
        apply(path, references, strength=2.0)
    with pytest.raises(ValueError, match="at least one reference"):
        apply(path, references[:0])
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        apply(path, references, start_percent=0.8, end_percent=0.2)
    with pytest.raises(ValueError, match="among input, middle, output, not down"):
        apply(path, references, blocks=["down"])
    white = torch.ones(2, 8, 8)
    with pytest.raises(ValueError, match="3 reference masks for 2 references"):
        apply(path, references, mask=torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match="Reference mask 2 of 2 is empty"):
        apply(path, references, mask=white * torch.tensor([1.0, 0.0])[:, None, None])
    with pytest.raises(ValueError, match="mask contains NaN"):
        apply(path, references, mask=white * torch.nan)


def test_area_conditioning_is_refused(path, references):
    tokens = torch.randn(1, 7, 32)
    with pytest.raises(ValueError, match="64 tokens where a view has 32.*area"):
        run(path, apply(path, references[:1]), positive=[[tokens, {"area": (4, 8, 0, 0), "strength": 1.0}]])
