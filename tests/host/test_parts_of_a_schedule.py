"""Runs over parts of a schedule, a batch and a picture: each with what it must equal, through the host's nodes."""

from __future__ import annotations

import pytest
import torch

from evaluation.sampler_table import SEED, SIDE, VIEWS, Bench, Sampler, difference

OURS = Sampler("ours", 0.5)
CUSTOM = Sampler("SamplerCustomAdvanced", 0.5)
STEPS = CUSTOM.steps


@pytest.fixture(scope="module")
def bench(host, pack) -> Bench:
    return Bench(host, pack)


@pytest.fixture(scope="module")
def whole(bench):
    """The views of one run with eta 0.5 [V, 4, h, w]."""
    return bench.run(CUSTOM, bench.latent)


def sigmas_of(bench, scheduler: str, denoise: float = 1.0, steps: int = 5):
    return bench.nodes["BasicScheduler"].execute(bench.model, scheduler, steps, denoise).args[0]


def in_parts(bench, sampler, sigmas, cuts, change=lambda latent: latent):
    """SAMPLER on SIGMAS in parts, the later ones with DisableNoise; `change` is done to each LATENT in between."""
    node, latent = "SamplerCustomAdvanced", bench.latent
    for first, last in zip([0, *cuts], [*cuts, len(sigmas) - 1], strict=True):
        latent = change(latent) if first else latent
        latent = bench.custom(node, sampler, sigmas[first : last + 1], latent, first == 0, bench.model)
    return latent["samples"]


@pytest.mark.parametrize("cuts", [(1,), (3,), (1, 2), (1, 2, 3)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("start", ["t=999", "schedule"])
def test_parts_make_the_whole(bench, cuts, eta, start):
    sampler, sigmas = bench.schedule(Sampler("SamplerCustomAdvanced", eta), start, STEPS)
    expected = in_parts(bench, sampler, sigmas, ())
    assert difference(in_parts(bench, sampler, sigmas, cuts), expected) < 1e-5


def test_first_part_may_have_no_steps(bench, whole):
    """SplitSigmas at 0: the first part only adds the noise, handed over at the start."""
    sampler, sigmas = bench.schedule(CUSTOM, "t=999", STEPS)
    high, low = bench.nodes["SplitSigmas"].execute(sigmas, 0).args
    noised = bench.custom("SamplerCustomAdvanced", sampler, high, bench.latent, True, bench.model)
    out = bench.custom("SamplerCustomAdvanced", sampler, low, noised, False, bench.model)
    assert difference(out["samples"], whole) < 1e-5


@pytest.mark.parametrize("scheduler", ["normal", "karras", "ddim_uniform", "beta"])
def test_parts_of_the_host_s_schedules(bench, scheduler):
    """Our SAMPLER on sigmas of the host: cut anywhere, also where they pass the release's last level."""
    sampler, _ = bench.schedule(CUSTOM, "t=999", STEPS)
    sigmas = sigmas_of(bench, scheduler)
    expected = in_parts(bench, sampler, sigmas, ())
    for cut in range(1, len(sigmas) - 1):
        assert difference(in_parts(bench, sampler, sigmas, (cut,)), expected) < 1e-5, cut


def test_early_end_is_the_host_s(bench):
    """A part's latents are on the host's scale: with eta 0, what euler leaves at the same place."""
    sampler, sigmas = bench.schedule(Sampler("SamplerCustomAdvanced", 0.0), "schedule", STEPS)
    euler = bench.nodes["KSamplerSelect"].execute("euler").args[0]
    for end in range(1, STEPS):
        ours, host = (
            bench.custom("SamplerCustomAdvanced", each, sigmas[: end + 1], bench.latent, True, bench.model)["samples"]
            for each in (sampler, euler)
        )
        assert difference(ours, host) < 1e-6


@pytest.mark.parametrize("denoise", [0.1, 0.5, 0.9])
def test_low_denoise_stays_near_the_latents(bench, denoise):
    """SplitSigmasDenoise with start t=999: the same as start schedule, and as euler."""
    results = []
    for start in ("t=999", "schedule"):
        sampler, sigmas = bench.schedule(Sampler("SamplerCustomAdvanced", 0.0), start, 20)
        low = bench.nodes["SplitSigmasDenoise"].execute(sigmas, denoise).args[1]
        results.append(bench.custom("SamplerCustomAdvanced", sampler, low, bench.latent, True, bench.model)["samples"])
    assert torch.equal(*results)


# What lies between two parts of a run, or between latents and sampler.


def test_views_chosen_between_two_parts(bench, whole):
    """LatentFromBatch and RebatchLatents between the parts: the views keep their numbers and their seed."""
    sampler, sigmas = bench.schedule(CUSTOM, "t=999", STEPS)

    def chosen(latent):
        return bench.nodes["LatentFromBatch"]().frombatch(latent, 2, 2)[0]

    assert difference(in_parts(bench, sampler, sigmas, (2,), chosen), whole[2:]) < 1e-5

    def rebatched(latent):
        return bench.nodes["RebatchLatents"].execute([latent], [3]).args[0][1]

    assert difference(in_parts(bench, sampler, sigmas, (2,), rebatched), whole[3:]) < 1e-5


def test_views_of_two_seeds_joined_between_two_parts(bench, whole):
    """LatentBatch of two runs: each view goes on with the seed it came with."""
    sampler, sigmas = bench.schedule(CUSTOM, "t=999", STEPS)
    other = bench.noises.ViewNoise(SEED + 1)
    guider = bench.nodes["CFGGuider"].execute(bench.model, bench.prompt, bench.prompt, 1.0).args[0]
    node = bench.nodes["SamplerCustomAdvanced"]
    expected = node.execute(other, guider, sampler, sigmas, bench.latent).args[0]["samples"]
    first = bench.custom("SamplerCustomAdvanced", sampler, sigmas[:3], bench.latent, True, bench.model)
    second = node.execute(other, guider, sampler, sigmas[:3], bench.latent).args[0]
    joined = bench.nodes["LatentBatch"].execute(first, second).args[0]
    out = bench.custom("SamplerCustomAdvanced", sampler, sigmas[2:], joined, False, bench.model)["samples"]
    assert difference(out, torch.cat([whole, expected])) < 1e-5


def test_changed_latents_are_numbered_from_0(bench):
    """Nothing is known of latents that another node has changed: they run as any latents do, twice the same."""
    sampler, sigmas = bench.schedule(CUSTOM, "t=999", STEPS)
    runs = [in_parts(bench, sampler, sigmas, (2,), lambda latent: {"samples": 1.01 * latent["samples"]}) for _ in "ab"]
    assert torch.equal(*runs) and torch.isfinite(runs[0]).all()


@pytest.mark.parametrize("noise", ["3D-Aware Noise", "shared", "RandomNoise"])
@pytest.mark.parametrize("node", ["ours", "SamplerCustomAdvanced"])
def test_views_out_of_a_batch(bench, noise, node):
    """Every way in which the host takes views out of a batch, with every kind of noise."""
    drawn = {
        "3D-Aware Noise": bench.noises.ViewNoise(SEED),
        "shared": bench.noises.ViewNoise(SEED, "shared"),
        "RandomNoise": bench.nodes["RandomNoise"].execute(SEED).args[0],
    }[noise]
    guider = bench.nodes["CFGGuider"].execute(bench.model, bench.prompt, bench.prompt, 1.0).args[0]

    def run(latent):
        if node == "ours":
            return (
                bench.nodes["DP3D_ViewConsistencySampler"]
                .execute(bench.model, bench.prompt, latent, drawn, 1.0, "custom", STEPS, 0.5, "t=999")
                .args[0]["samples"]
            )
        sampler, sigmas = bench.schedule(CUSTOM, "t=999", STEPS)
        return bench.nodes[node].execute(drawn, guider, sampler, sigmas, latent).args[0]["samples"]

    views, rebatch = run(bench.latent), bench.nodes["RebatchLatents"]
    part = bench.nodes["LatentFromBatch"]().frombatch(bench.latent, 1, 2)[0]
    assert difference(run(part), views[1:3]) < 1e-5
    again = bench.nodes["LatentFromBatch"]().frombatch(part, 1, 1)[0]
    assert difference(run(again), views[2:3]) < 1e-5
    rebatched = rebatch.execute([bench.latent], [1]).args[0]
    assert len(rebatched) == VIEWS and difference(run(rebatched[3]), views[3:]) < 1e-5
    fixed = bench.nodes["LatentBatchSeedBehavior"].execute(part, "fixed").args[0]
    same = run({**fixed, "samples": bench.latent["samples"][1:2].expand(2, -1, -1, -1)})
    assert difference(same, views[1:2].expand(2, -1, -1, -1)) < 1e-5


# Noise masks.


def mask_of(kind: str):
    mask = torch.ones(VIEWS, 1, 8 * SIDE, 8 * SIDE)
    mask[1] = 0
    if kind == "soft":
        mask[2, :, 24:40] = 0.5
    return mask


@pytest.mark.parametrize("kind", ["hard", "soft", "Differential Diffusion"])
@pytest.mark.parametrize("sampler", [OURS, CUSTOM, Sampler("ours", 0.0), Sampler("SamplerCustom", 1.0)], ids=str)
def test_kept_areas_are_the_input(bench, sampler, kind):
    model = bench.nodes["DifferentialDiffusion"].execute(bench.model).args[0] if kind.startswith("D") else bench.model
    latent = {**bench.latent, "noise_mask": mask_of(kind)}
    out = bench.run(sampler, latent, model=model)
    assert difference(out[1], bench.latent["samples"][1]) < 1e-6
    assert difference(out[0], bench.latent["samples"][0]) > 1e-2
    low = bench.run(sampler, latent, model=model, denoise=0.3)
    assert difference(low[1], bench.latent["samples"][1]) < 1e-6


def test_every_sampler_of_the_host_keeps_masked_areas_on_our_sigmas(bench, host):
    """The SIGMAS end at 0, so that nothing of the last noise level is left."""
    _, sigmas = bench.schedule(CUSTOM, "t=999", STEPS)
    latent, names = {**bench.latent, "noise_mask": mask_of("hard")}, host.comfy.samplers.KSampler.SAMPLERS
    for name in sorted({*names} - {"dpm_fast", "dpm_adaptive"}):  # which choose their own levels and end above 0
        sampler = bench.nodes["KSamplerSelect"].execute(name).args[0]
        out = bench.custom("SamplerCustomAdvanced", sampler, sigmas, latent, True, bench.model)["samples"]
        left = 2e-3 if name.startswith("uni_pc") else 1e-5  # the host's UniPC stops at sigma 0.001 in place of 0
        assert difference(out[1], bench.latent["samples"][1]) < left, name


# View-Consistency Sampler as KSampler (Advanced).


def test_denoise_is_the_last_part_of_a_longer_schedule(bench):
    ours = bench.run(OURS, bench.latent, denoise=0.3)  # 3 steps
    sampler, sigmas = bench.schedule(CUSTOM, "t=999", 10)
    part = bench.custom("SamplerCustomAdvanced", sampler, sigmas[-4:], bench.latent, True, bench.model)
    assert difference(ours, part["samples"]) < 1e-6


def sample(bench, latent=None, preset="custom", steps=STEPS, **settings):
    return (
        bench.nodes["DP3D_ViewConsistencySampler"]
        .execute(
            bench.model,
            bench.prompt,
            latent or bench.latent,
            bench.noises.ViewNoise(SEED),
            1.0,
            preset,
            steps,
            0.0,
            "schedule",
            **settings,
        )
        .args[0]["samples"]
    )


def test_early_end_without_leftover_noise(bench, host):
    """As KSampler (Advanced) with euler on the same sigmas: the last step goes to 0."""
    sigmas = bench.schedule(CUSTOM, "schedule", STEPS)[1]
    to_zero = torch.cat([sigmas[:2], torch.zeros(1)])
    euler = bench.nodes["KSamplerSelect"].execute("euler").args[0]
    expected = bench.custom("SamplerCustomAdvanced", euler, to_zero, bench.latent, True, bench.model)["samples"]
    assert difference(sample(bench, end_at_step=2), expected) < 1e-6
    left = sample(bench, end_at_step=2, return_with_leftover_noise=True)
    assert difference(left, expected) > 0.05
    rest = sample(bench, {"samples": left}, start_at_step=2, add_noise=False)
    assert difference(rest, sample(bench)) < 1e-5


@pytest.mark.parametrize("settings", [{"denoise": 0.0}, {"start_at_step": STEPS}, {"end_at_step": 0}])
def test_no_steps_change_nothing(bench, settings):
    assert torch.equal(sample(bench, **settings), bench.latent["samples"])


@pytest.mark.parametrize(
    ("preset", "settings", "message"),
    [
        (
            "release",
            {"denoise": 0.01},
            "preset release with denoise 0.01 takes 5000 steps, and this MODEL has 1000 noise "
            "levels: choose preset custom with fewer steps or a higher denoise",
        ),
        ("fast", {"denoise": 0.001}, "preset fast with denoise 0.001 takes 8000 steps"),
    ],
)
def test_more_steps_than_noise_levels(bench, preset, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(bench, preset=preset, **settings)


@pytest.mark.parametrize(
    ("preset", "steps", "message"),
    [
        (
            "paper",
            1,
            "preset paper takes 100 steps, and this MODEL has 50 noise levels: choose preset custom with 4 to 8 "
            "steps and guidance 1, as LCM wants it, or Apply View Consistency with the host's KSampler",
        ),
        ("custom", 51, "preset custom takes 51 steps, and this MODEL has 50 noise levels: .* 4 to 8 steps"),
    ],
)
def test_lcm_says_what_to_choose(bench, preset, steps, message):
    lcm = bench.nodes["ModelSamplingDiscrete"]().patch(bench.model, "lcm", False)[0]
    for node, inputs in (
        ("DP3D_ViewConsistencySchedule", ()),
        ("DP3D_ViewConsistencySampler", (bench.prompt, bench.latent, bench.noises.ViewNoise(SEED), 1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            bench.nodes[node].execute(lcm, *inputs, preset, steps, 0.0, "t=999")


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("release", "preset release, 50 steps of DDIM with eta 0.5"),
        ("fast", "preset fast, 8 steps of DPM-Solver"),
        ("custom", "preset custom, 3 steps of DDIM with eta 0.1"),
    ],
)
def test_log_says_what_is_used(bench, caplog, preset, said):
    with caplog.at_level("INFO"):
        bench.nodes["DP3D_ViewConsistencySchedule"].execute(bench.model, preset, 3, 0.1, "t=999")
    assert [record.message for record in caplog.records if said in record.message]
