"""The authors' release in the host: converted files give the golden numbers, files without metadata are recognised."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffportrait3d.conversion import Options, convert
from diffportrait3d.networks import CrossViewAttention, ViewControlNet
from diffportrait3d.networks.view_controlnet import build_hint_block
from diffportrait3d.weights.files import save_network
from diffportrait3d.weights.identify import OFFICIAL
from evaluation.goldens.data import GOLDEN_CONFIG, PREFIXES, load_golden, sample_tap
from evaluation.goldens.host import LATENT_SCALE, NARROW_CONFIG, SINGLE_PASSES, GivenNoise, HostPath, known_weights

TOLERANCE = 5e-5


def release_checkpoint() -> dict[str, torch.Tensor]:
    """The golden weights under the release's keys; in half precision what is exact in it."""
    weights = known_weights(GOLDEN_CONFIG)
    tensors = {PREFIXES[kind] + name: t for kind, named in weights.items() for name, t in named.items()}
    unused = build_hint_block(GOLDEN_CONFIG).state_dict()
    tensors |= {
        PREFIXES["reference_encoder"] + OFFICIAL["reference_encoder"].unused + name: t for name, t in unused.items()
    }
    return {name: t if name.endswith(".pe") else t.half() for name, t in tensors.items()}


@pytest.fixture(scope="module")
def converted():
    """Folder of the files the converter makes of a checkpoint with the golden weights."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model_state.th"
        torch.save({"state_dict": release_checkpoint()}, checkpoint)
        convert(checkpoint, Options(Path(folder) / "converted"))
        checkpoint.unlink()
        yield Path(folder) / "converted"


@pytest.fixture(scope="module")
def path(host, pack, converted) -> HostPath:
    """The host path of the converted files; Load Checkpoint knows SD1.5's full width only, so the UNet goes past it."""
    stored = load_file(converted / "base_checkpoint.safetensors")
    unet = {name.removeprefix(PREFIXES["unet"]): tensor for name, tensor in stored.items()}
    config = pack.diffportrait3d.networks.UNetConfig.from_dict(GOLDEN_CONFIG.to_dict())
    control_net = pack.patches.view_controlnet.load_view_controlnet(converted / "view_controlnet.safetensors")
    model = pack.host.loading.build_model(unet, config, {})
    return HostPath.of_files(pack, host.comfy, converted, model, control_net)


@pytest.mark.parametrize("name", ["eps_full", "eps_uncond"])
def test_converted_files_give_the_golden_passes(path, name):
    golden = load_golden()
    with torch.inference_mode():
        eps = path.predict(golden.inputs, *SINGLE_PASSES[name])
    assert (eps - golden.outputs[name]).abs().max() < TOLERANCE


def test_converted_controlnet_gives_the_golden_residuals(path):
    golden = load_golden()
    with torch.inference_mode():
        residuals = path.residuals(golden.inputs)
    assert len(residuals) == 13
    for index, residual in enumerate(residuals):
        expected = golden.taps[f"pose.{index:02d}"]
        assert (sample_tap(residual[:2]) - expected).abs().max() < TOLERANCE * max(1, expected.abs().max()), index


@pytest.fixture
def golden_step_noise(pack, monkeypatch):
    """The authors' noise per step in place of what follows from a seed: the one thing no input of a node can give."""
    noises = load_golden().inputs["ddim_noise"]
    monkeypatch.setattr(pack.patches.sampling, "step_noise_of", lambda views: lambda step, x: noises[step].to(x))


@pytest.mark.parametrize(("eta", "name"), [(0.0, "ddim_eta0"), (0.5, "ddim_eta05")])
@pytest.mark.parametrize("sampling", ["our sampler", "the host's SamplerCustomAdvanced"])
def test_golden_trajectories_through_the_nodes(host, path, golden_step_noise, sampling, eta, name):
    golden, nodes = load_golden(), host.nodes.NODE_CLASS_MAPPINGS
    inputs, expected = golden.inputs, golden.outputs[f"{name}.x"][-1]
    model, positive = path.prepare(inputs, references=1, control=True, views=False)
    latent, noise = {"samples": inputs["proxy_latent"] / LATENT_SCALE}, GivenNoise(inputs["q_noise"])
    schedule = {"preset": "custom", "steps": 5, "eta": eta, "start": "t=999"}
    if sampling == "our sampler":
        sampler = nodes["DP3D_ViewConsistencySampler"]
        views = sampler.execute(model, positive, latent, noise, 3.0, **schedule, view_consistency=path.views).args[0]
    else:
        model = nodes["DP3D_ApplyViewConsistency"].execute(model, path.views).args[0]
        sampler, sigmas = nodes["DP3D_ViewConsistencySchedule"].execute(model, **schedule).args
        guider = nodes["CFGGuider"].execute(model, positive, [[inputs["context"], {}]], 3.0).args[0]
        views = nodes["SamplerCustomAdvanced"].execute(noise, guider, sampler, sigmas, latent).args[0]
    assert (LATENT_SCALE * views["samples"] - expected).abs().max() < 1e-3 * expected.abs().max()


def test_conventions_come_with_the_converted_files(pack, path):
    assert OFFICIAL["reference_encoder"].conventions.items() <= path.encoder.metadata.items()
    assert OFFICIAL["view_consistency"].conventions.items() <= path.views.metadata.items()
    assert path.views.config.max_views == 32
    assert pack.patches.cross_view_attention.trained_views(path.views) == 8, (
        "views per window unless the artist says more"
    )


def test_heads_that_the_host_has_guessed_are_refused(host, pack):
    """The stock loader knows SD1.5's heads at 320 channels; to a ControlNet of another width it gives others."""
    network = ViewControlNet(GOLDEN_CONFIG)
    target = Path(host.folder_paths.models_dir) / "controlnet" / "narrow.safetensors"
    save_network(target, network, "view_controlnet", torch.float16)
    try:
        stock = host.nodes.NODE_CLASS_MAPPINGS["ControlNetLoader"]().load_controlnet("narrow.safetensors")[0]
    finally:
        target.unlink()
    message = "a ControlNet of 64 channels with attention heads as in SD2 and SDXL: .* with Load View ControlNet"
    prompt, images = [[torch.zeros(1, 77, 96), {}]], torch.rand(2, 64, 64, 3)
    with pytest.raises(ValueError, match=message):
        pack.patches.view_controlnet.apply_view_controlnet(prompt, stock, images)


@pytest.fixture
def narrow_release(pack, monkeypatch):
    """As if the release had been trained at a width that tests can afford."""
    sizes = pack.diffportrait3d.networks.UNetConfig.from_dict(NARROW_CONFIG.to_dict())
    monkeypatch.setattr(pack.diffportrait3d.weights.identify, "OFFICIAL_CONFIG", sizes)


def test_files_without_metadata_are_listed_and_loaded(host, pack, tmp_path, narrow_release):
    loading, files = pack.host.loading, pack.host.model_files
    weights = known_weights(NARROW_CONFIG)
    for kind in OFFICIAL:
        save_file({PREFIXES[kind] + name: t for name, t in weights[kind].items()}, tmp_path / f"{kind}.safetensors")
    save_file({"lora_unet.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "view_consistency.safetensors").read_bytes()[:9999])
    host.folder_paths.add_model_folder_path("diffportrait3d", str(tmp_path))
    try:
        for kind in OFFICIAL:
            assert {f"{kind}.safetensors"} == set(files.network_names(kind)) & {p.name for p in tmp_path.iterdir()}
    finally:
        host.folder_paths.folder_names_and_paths["diffportrait3d"][0].remove(str(tmp_path))
    encoder = loading.load_reference_encoder(tmp_path / "reference_encoder.safetensors")
    views = loading.load_cross_view_attention(tmp_path / "view_consistency.safetensors")
    control_net = pack.patches.view_controlnet.load_view_controlnet(tmp_path / "view_controlnet.safetensors")
    assert encoder.metadata["reference_timestep"] == "current"
    assert views.metadata["middle_view_attention"] == "unconditional" and views.metadata["trained_views"] == 8
    joined = CrossViewAttention(NARROW_CONFIG)
    joined.load_state_dict(weights["view_consistency"])
    joined.join_projections()  # as the loader does
    weights = {**weights, "view_consistency": joined.state_dict()}
    found = encoder.patcher.model.state_dict(), views.patcher.model.state_dict(), control_net.control_model.state_dict()
    for kind, tensors in zip(OFFICIAL, (found[0], found[2], found[1]), strict=True):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in weights[kind].items()), kind


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet.lora_down.weight"], "it is a LoRA"),
        (["conditioner.embedders.0.x"], "it is an SDXL checkpoint"),
        (["zero_convs.0.0.weight"], "it has the keys of an ordinary ControlNet"),
    ],
)
def test_loaders_name_what_they_got_instead(pack, tmp_path, names, message):
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "wrong.safetensors")
    loading, view_controlnet = pack.host.loading, pack.patches.view_controlnet
    wanted = f"wrong.safetensors was not written by DiffPortrait3D: {message}"
    for load in (
        loading.load_reference_encoder,
        loading.load_cross_view_attention,
        view_controlnet.load_view_controlnet,
    ):
        with pytest.raises(ValueError, match=wanted):
            load(tmp_path / "wrong.safetensors")
