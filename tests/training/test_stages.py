"""Every stage trains exactly its own network, on the loss that its formula says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffportrait3d.weights.files import load_network, read_metadata
from training.dataset.images import ImageFiles, MultiViewDataset, pick, pick_latents, to_network
from training.engine.config import ConfigError, load_config
from training.engine.loop import finished, run_stage
from training.latent_colours import fit_latent_colours, shown_colours

from .conftest import DENOISING, STAGES, stage_config, trainer_of


def values_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_changes_exactly_the_trained_network(stage, dataset, networks, tmp_path):
    trainer = trainer_of(stage, dataset, networks, tmp_path)
    frozen = {name: values_of(module) for name, module in trainer.stage.frozen.items()}
    before = values_of(trainer.stage.trainable)
    for _ in range(2):  # layers behind zero-initialised ones move from the second step on
        trainer.one_step(0.0)
    for name, module in trainer.stage.frozen.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, frozen[name][key]), f"{name}.{key} changed"
        assert all(p.grad is None for p in module.parameters())
    moved = {key for key, value in trainer.stage.trainable.state_dict().items() if not torch.equal(value, before[key])}
    with_gradient = {key for key, p in trainer.stage.trainable.named_parameters() if p.grad is not None}
    assert moved and moved <= with_gradient
    unmoved = {key for key in with_gradient - moved if before[key].any()}
    assert not unmoved, f"trained, but did not move: {sorted(unmoved)[:5]}"


@pytest.mark.parametrize("stage", STAGES)
def test_images_read_when_needed_make_the_same_step(stage, dataset, networks, tmp_path):
    def step(in_memory: str) -> tuple[dict, dict]:
        settings = f"data.in_memory={in_memory}", "loop.seed=5"
        trainer = trainer_of(stage, dataset, networks, tmp_path / in_memory, *settings)
        assert isinstance(trainer.stage.data.images, ImageFiles) == (in_memory == "false")
        trainer.one_step(0.0)
        return trainer.read(), values_of(trainer.stage.trainable)

    (losses, weights), (wanted_losses, wanted) = step("false"), step("true")
    assert losses == wanted_losses
    assert all(torch.equal(value, wanted[key]) for key, value in weights.items())


@pytest.mark.parametrize("targets", [1, 3])
def test_reference_loss_is_the_formula(dataset, networks, tmp_path, targets):
    """Also where several targets share their reference's pass of F_ref."""
    stage = trainer_of("reference", dataset, networks, tmp_path, f"targets_per_reference={targets}").stage
    batch = next(stage.sampler)
    torch.manual_seed(3)
    loss = float(stage.loss(stage.inputs(batch, ""), "")["loss"].detach())

    unet, _ = load_network(networks["unet"])
    autoencoder, _ = load_network(networks["autoencoder"])
    with torch.no_grad():
        target = autoencoder.encode(pick(stage.data.images, batch.targets.ravel(), batch.target_flips))
        reference = autoencoder.encode(pick(stage.data.images, batch.references, batch.flips))
        torch.manual_seed(3)
        t, noise = torch.randint(0, 1000, (2,)), torch.randn(target.shape)
        t_ref, t = t, t.repeat_interleave(targets)
        betas = torch.linspace(0.00085**0.5, 0.005**0.5, 1000, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)[t].float()[:, None, None, None]
        x = abar.sqrt() * target + (1 - abar).sqrt() * noise
        context = torch.zeros(2, 1, 32)
        bank = [tokens.repeat_interleave(targets, 0) for tokens in stage.trainable(reference, t_ref, context)]
        eps = unet(x, t, context.repeat_interleave(targets, 0), bank=bank)
        expected = float((eps - noise).square().mean())
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_starts_from_the_file_of_its_own_kind(stage, dataset, networks, tmp_path):
    kind = STAGES[stage].kind
    file = networks.get(kind)
    if file is None:  # the kinds that no other stage builds on
        trainer = trainer_of(stage, dataset, networks, tmp_path / "earlier")
        trainer.stage.finish(tmp_path, {})
        file = str(tmp_path / f"{kind}.safetensors")
    trained = trainer_of(stage, dataset, networks, tmp_path / "later", f"inputs.{kind}={file}").stage.trainable
    expected = load_network(file)[0].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in trained.state_dict().items())


def test_loss_weighting_leaves_validation_alone(dataset, networks, tmp_path):
    stages = [
        trainer_of("base", dataset, networks, tmp_path / weighting, f"loss_weighting={weighting}").stage
        for weighting in ("epsilon", "velocity")
    ]
    stages[1].trainable.load_state_dict(stages[0].trainable.state_dict())
    error, t = torch.randn(4, 4, 8, 8), torch.full((4,), 900)
    plain, weighted = (stage.losses(error, t) for stage in stages)
    assert set(plain) == {"loss"} and torch.equal(plain["loss"], weighted["square"])
    assert weighted["loss"] > 2 * plain["loss"]
    with torch.no_grad():
        first, second = (stage.validation_loss(stage.validation_batch()) for stage in stages)
    assert first == second


def test_velocity_weighting_is_the_mean_square_of_the_velocity(dataset, networks, tmp_path):
    stage = trainer_of("base", dataset, networks, tmp_path, "loss_weighting=velocity").stage
    draw = torch.Generator().manual_seed(0)
    z, noise, eps = (torch.randn(4, 4, 8, 8, generator=draw) for _ in range(3))
    t = torch.tensor([1, 300, 700, 999])
    abar = stage.schedule.alphas_cumprod[t][:, None, None, None]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    x = stage.schedule.q_sample(z, t, noise)
    guess = (x - sigma * eps) / alpha  # the clean image that a prediction of eps means
    velocity = (alpha * noise - sigma * z) - (alpha * eps - sigma * guess)
    losses = stage.losses(eps - noise, t)
    assert torch.allclose(losses["loss"], velocity.square().mean(), rtol=1e-4)
    assert torch.equal(losses["square"], (eps - noise).square().mean())


def test_an_unknown_loss_weighting_is_refused(dataset, networks, tmp_path):
    with pytest.raises(ValueError, match="'loss_weighting': .*'epsilon' or 'velocity', not 'v'"):
        trainer_of("base", dataset, networks, tmp_path, "loss_weighting=v")


def test_reference_timestep_zero_gives_the_encoder_zero(dataset, networks, tmp_path):
    stage = trainer_of("reference", dataset, networks, tmp_path, "reference_timestep=zero").stage
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([700, 20])
    wanted = stage.trainable(z, torch.zeros(2), torch.zeros(2, 1, 32))
    for got, want in zip(stage.references(z, t), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("timestep_per", "distinct"), [("group", 2), ("view", 8)])
def test_timesteps_of_view_groups(dataset, networks, tmp_path, timestep_per, distinct):
    stage = trainer_of("view_consistency", dataset, networks, tmp_path, f"timestep_per={timestep_per}").stage
    torch.manual_seed(0)
    t = stage.draw_timesteps(8)
    assert len(t) == 8 and len(t.unique()) == distinct
    if timestep_per == "group":
        assert (t.view(2, 4) == t.view(2, 4)[:, :1]).all()


def test_cubic_timesteps_are_mostly_noisy(dataset, networks, tmp_path):
    stage = trainer_of("base", dataset, networks, tmp_path, "timesteps=cubic").stage
    torch.manual_seed(0)
    t = stage.draw_timesteps(20000)
    assert t.min() >= 0 and t.max() == 999
    assert t.float().mean() == pytest.approx(750, abs=5)  # E[1 - u^3] = 3/4


def test_view_consistency_starts_as_the_system_without_it(dataset, networks, tmp_path):
    """Its output layers start at zero: the first loss is that of the other networks alone."""
    stage = trainer_of("view_consistency", dataset, networks, tmp_path).stage
    batch = next(stage.sampler)
    t, noise = stage.draw_timesteps(8), torch.randn(8, 4, 8, 8)
    with torch.no_grad():
        z = pick_latents(stage.latents, batch.targets.ravel(), batch.target_flips)
        x = stage.schedule.q_sample(z, t, noise)
        bank = stage.references(stage.reference_latents(batch, stage.latents).repeat_interleave(4, 0), t)
        stage.denoiser.view_consistency = None
        alone = stage.denoiser.conditional(
            x, t, torch.zeros(8, 1, 32), bank, stage.camera_images(batch, stage.data), None
        )
        together = stage.predict(x, t, stage.denoiser_inputs(batch, stage.data, stage.latents))
    assert torch.allclose(alone, together, atol=1e-5)


def test_view_control_hint_is_the_condition_in_network_range(dataset, networks, tmp_path):
    stage = trainer_of("view_control", dataset, networks, tmp_path, "data.flip=true", "loop.batch_size=16").stage
    batch = next(stage.sampler)
    camera_images = stage.camera_images(batch, stage.data)
    assert camera_images.min() >= -1 and camera_images.max() <= 1 and camera_images.min() < -0.1
    for row, flip, image in zip(batch.targets, batch.flips, camera_images, strict=True):
        want = stage.data.conditions[row].float() / 127.5 - 1
        assert torch.allclose(image, want.flip(-1) if flip else want, atol=1e-6)
    assert 0 < batch.flips.sum() < 16


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_its_network_and_summary(stage, dataset, networks, tmp_path):
    stage_class, config = stage_config(stage, dataset, networks, tmp_path / stage)
    summary = run_stage(stage_class.build, config)
    kind = STAGES[stage].kind
    metadata = read_metadata(tmp_path / stage / f"{kind}.safetensors")
    assert metadata["network"] == kind and metadata["image_size"] == 64
    assert metadata["training"]["steps"] == summary["steps"] == 2
    if stage in DENOISING:
        assert metadata["linear_end"] == 0.005
    assert list((tmp_path / stage / "validation").glob("*.png"))
    assert finished(tmp_path / stage)["stage"] == stage
    load_network(tmp_path / stage / f"{kind}.safetensors")


def test_the_saved_autoencoder_is_normalised_and_deterministic(dataset, networks, tmp_path):
    counts = ["statistics_images=27", "validation_images=9"]
    stage_class, config = stage_config("autoencoder", dataset, networks, tmp_path, *counts)
    run_stage(stage_class.build, config)
    autoencoder, _ = load_network(tmp_path / "autoencoder.safetensors")
    images = to_network(MultiViewDataset(dataset, "train").images)
    latents = torch.cat([autoencoder.encode(images), autoencoder.encode(images.flip(-1))])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-3
    assert (autoencoder.moments(images)[1] == -30).all()
    assert_colours_fit(tmp_path / "autoencoder.safetensors", to_network(MultiViewDataset(dataset, "val").images))


def assert_colours_fit(path: Path, images):
    """What the file says of its latents' colours shows them as the best linear map for `images` does."""
    autoencoder, metadata = load_network(path)
    latents = autoencoder.encode(images)
    best = shown_colours(latents, fit_latent_colours(latents, images))
    assert (shown_colours(latents, metadata["latent_rgb"]) - best).abs().max() < 0.01


def test_a_missing_input_is_named(dataset, networks, tmp_path):
    stage_class, config = stage_config("reference", dataset, {"autoencoder": networks["autoencoder"]}, tmp_path)
    with pytest.raises(ValueError, match="inputs.unet"):
        run_stage(stage_class.build, config)


def test_unknown_keys_are_refused(tmp_path):
    from training.base import BaseConfig

    with pytest.raises(ConfigError, match="optimizer.learning_rate"):
        load_config(BaseConfig, None, ["optimizer.learning_rate=1"])


def test_decoder_only_training_keeps_every_latent(dataset, networks, tmp_path):
    more = ["decoder_only=true", f"inputs.autoencoder={networks['autoencoder']}"]
    stage_class, config = stage_config("autoencoder", dataset, networks, tmp_path, *more)
    run_stage(stage_class.build, config)
    before, _ = load_network(networks["autoencoder"])
    after, _ = load_network(tmp_path / "autoencoder.safetensors")
    images = to_network(MultiViewDataset(dataset, "val").images)
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.equal(before.decode(torch.zeros(1, 4, 8, 8)), after.decode(torch.zeros(1, 4, 8, 8)))


def test_unconditional_batches_see_neither_reference_nor_camera(dataset, networks, tmp_path):
    stage = trainer_of("view_consistency", dataset, networks, tmp_path, "unconditional=0.5").stage
    batch, t, x = next(stage.sampler), stage.draw_timesteps(8), torch.randn(8, 4, 8, 8)
    assert set(stage.inputs(batch, "unconditional")) == {"z"}
    assert set(stage.inputs(batch, "")) == {"z", "references", "camera_images"}
    with torch.no_grad():
        got = stage.predict(x, t, {})
        want = stage.denoiser.unet(x, t, torch.zeros(8, 1, 32))  # the modules' output layers still are zero
        # Validation always shows the condition.
        conditional = stage.predict(x, t, stage.denoiser_inputs(batch, stage.data, stage.latents))
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(conditional, want, atol=1e-3)


def test_unconditional_batches_are_the_same_after_resuming(dataset, networks, tmp_path):
    stage = trainer_of("view_consistency", dataset, networks, tmp_path, "unconditional=0.3").stage

    def variants(first: int) -> list[str]:
        found = []
        for stage.sampler.position in range(first, 400):
            found.append(stage.variant(0.0))
        return found

    whole = variants(0)
    assert variants(100) == whole[100:]
    assert whole.count("unconditional") == pytest.approx(120, abs=30)


@pytest.mark.parametrize("kept", ["device", "host"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_tensor_of_a_step_stays_behind_on_the_cpu(stage, kept, dataset, networks, tmp_path):
    """With everything on "meta", an operand that was left on the CPU fails as it would beside a GPU's."""
    built = trainer_of(stage, dataset, networks, tmp_path).stage
    meta = torch.device("meta")
    built.device = meta
    for module in (built.trainable, *built.frozen.values()):
        module.to(meta)
    if kept == "device":
        built.data.images, built.data.conditions = built.data.images.to(meta), built.data.conditions.to(meta)
        if stage in DENOISING:
            built.latents = built.latents.to(meta)
    losses = built.loss(built.inputs(next(built.sampler), ""), "")
    losses["loss"].backward()
    assert {loss.device for loss in losses.values()} == {meta}
    assert {p.grad.device for p in built.trainable.parameters() if p.grad is not None} == {meta}
