"""The core gives the authors' numbers: every golden output, and the intermediate tensors in running order."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.diffusion import Schedule, start_noise
from evaluation.goldens.core import core_outputs, core_taps, golden_denoiser
from evaluation.goldens.data import load_golden

SINGLE_PASS_TOLERANCE = 5e-5
TRAJECTORY_TOLERANCE = 1e-3  # relative: the random network is no denoiser, |x| grows
# The taps grow to a magnitude of about 20 inside the random network; float32 noise grows with them.
TAP_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def denoiser():
    return golden_denoiser()


@pytest.fixture(scope="module")
def outputs(golden, denoiser):
    return core_outputs(golden, denoiser)


def test_every_golden_output_is_computed(golden, outputs):
    assert set(outputs) == set(golden.outputs)


def test_single_passes(golden, outputs):
    errors = {k: (outputs[k] - v).abs().max().item() for k, v in golden.outputs.items() if k.startswith("eps_")}
    assert len(errors) == 11
    assert max(errors.values()) < SINGLE_PASS_TOLERANCE, errors


@pytest.mark.parametrize("name", ["ddim_eta0", "ddim_eta05"])
def test_ddim_trajectory(golden, outputs, name):
    assert torch.equal(outputs[f"{name}.timesteps"], golden.outputs[f"{name}.timesteps"])
    for part in ("x", "pred_x0"):
        expected = golden.outputs[f"{name}.{part}"]
        error = (outputs[f"{name}.{part}"] - expected).abs().max() / expected.abs().max()
        assert error < TRAJECTORY_TOLERANCE, f"{name}.{part}: {error}"


def test_intermediate_tensors(golden, denoiser):
    taps = core_taps(golden, denoiser)
    assert set(taps) == set(golden.taps)
    wrong = [k for k, v in golden.taps.items() if (taps[k] - v).abs().max() > TAP_TOLERANCE * max(1, v.abs().max())]
    assert not wrong, f"intermediate tensors differ, first at {wrong[0]}: {wrong}"


def test_reference_order_does_not_matter(golden, denoiser, outputs):
    """Attention over the joined tokens is a set operation; the second reference must be used all the same."""
    inputs, context = golden.inputs, golden.context
    swapped = torch.cat([inputs["ref_latent2"], inputs["ref_latent"]])
    with torch.no_grad():
        bank = denoiser.bank(swapped, inputs["t"], context)
        eps = denoiser.conditional(inputs["x_noisy"], inputs["t"], context, bank, inputs["hint"], 8)
    assert (eps - outputs["eps_full_2ref"]).abs().max() < SINGLE_PASS_TOLERANCE
    assert (eps - outputs["eps_full"]).abs().max() > 0.1


def test_schedule_is_the_release_s(golden):
    schedule = Schedule()
    assert schedule.alphas_cumprod[999].item() == pytest.approx(0.004660098, rel=1e-6)
    assert schedule.ddim_timesteps(50)[:2] == [1, 21] and schedule.ddim_timesteps(50)[-1] == 981
    assert schedule.ddim_timesteps(100)[-1] == 991
    start = start_noise(golden.inputs["proxy_latent"], golden.inputs["q_noise"], schedule)
    assert torch.allclose(start, golden.outputs["ddim_eta0.x"][0], atol=1e-6)
