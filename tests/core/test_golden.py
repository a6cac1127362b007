"""The core gives the authors' numbers: every golden output, and the intermediate tensors in running order."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffportrait3d.denoiser import Denoiser
from diffportrait3d.diffusion import Schedule, start_noise
from evaluation.goldens.core import NUM_VIEWS, core_outputs, golden_denoiser
from evaluation.goldens.data import Golden, load_golden, sample_tap

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


def test_data_of_another_width_are_refused(tmp_path):
    for name in ("inputs", "outputs", "taps"):
        save_file({"context": torch.zeros(1, 7, 768)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"inputs.safetensors has prompts of 768 numbers per token.*read 96"):
        load_golden(tmp_path)


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


@torch.no_grad()
def core_taps(golden: Golden, denoiser: Denoiser) -> dict[str, Tensor]:
    """Samples of the intermediate tensors of both passes, so that an error shows where it starts."""
    inputs, context = golden.inputs, golden.context
    x, t, hint = inputs["x_noisy"], inputs["t"], inputs["hint"]
    unet, views = denoiser.unet, denoiser.view_consistency
    bank = denoiser.bank(inputs["ref_latent"], t, context)
    residuals = denoiser.view_controlnet(x, hint, t, context)
    taps = {f"bank.{i:02d}": tokens for i, tokens in enumerate(bank)}
    taps |= {f"pose.{i:02d}": residual[:2] for i, residual in enumerate(residuals)}

    hooks = _record("input_blocks", unet.input_blocks, taps)
    hooks += _record("output_blocks", unet.output_blocks, taps)
    hooks += _record("input_blocks_motion_module", (m[-1] for m in views.input_blocks_motion_module), taps)
    hooks += _record("output_blocks_motion_module", (m[-1] for m in views.output_blocks_motion_module), taps)
    hooks.append(unet.middle_block[-1].register_forward_hook(_keep(taps, "middle_block")))
    denoiser.conditional(x, t, context, bank, hint, NUM_VIEWS)
    for hook in hooks:
        hook.remove()

    middle = views.middle_block_motion_module[0]
    hook = middle.register_forward_hook(_keep(taps, "uncond.middle_motion.out", "uncond.middle_motion.in"))
    denoiser.unconditional(x, t, context, NUM_VIEWS)
    hook.remove()
    return {name: sample_tap(tensor) for name, tensor in taps.items()}


def _record(name: str, modules: Iterable[nn.Module], taps: dict[str, Tensor]) -> list:
    return [m.register_forward_hook(_keep(taps, f"{name}.{i:02d}")) for i, m in enumerate(modules)]


def _keep(taps: dict[str, Tensor], output_name: str, input_name: str | None = None):
    def hook(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # a block of F also gives its tokens
        taps[output_name] = hidden[:2]  # the golden taps hold the first two views
        if input_name is not None:
            taps[input_name] = arguments[0][:2]

    return hook


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
