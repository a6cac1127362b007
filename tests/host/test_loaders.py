"""Weight files to host objects."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffportrait3d.denoiser import Denoiser
from diffportrait3d.weights.files import save_network
from evaluation.goldens.core import NETWORKS
from evaluation.goldens.host import NARROW_CONFIG, HostPath, known_weights
from tools.host import ToolError

CONVENTIONS = {"linear_end": 0.00489, "reference_timestep": "zero", "middle_view_attention": "never"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_networks) -> Path:
    path = tmp_path_factory.mktemp("weights")
    write_networks(path, **CONVENTIONS)
    return path


@pytest.fixture(scope="module")
def loading(pack):
    return pack.host.loading


def test_model(host, loading, folder):
    model = loading.load_model(folder / "unet.safetensors")
    weights = {k.removeprefix("diffusion_model."): v for k, v in model.model.state_dict().items()}
    expected = known_weights(NARROW_CONFIG)["unet"]
    assert set(expected) <= set(weights) and all(torch.equal(weights[k], v) for k, v in expected.items())
    sigmas = model.get_model_object("model_sampling").sigmas
    betas = torch.linspace(0.00085**0.5, 0.00489**0.5, 1000, dtype=torch.float64) ** 2
    last = torch.cumprod(1 - betas, 0)[-1]
    assert sigmas[-1].item() == pytest.approx(((1 - last) / last).sqrt().item(), rel=1e-5)
    assert isinstance(model.model.latent_format, host.comfy.latent_formats.SD15)
    again = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
    assert type(again) is host.comfy.model_patcher.ModelPatcher


@pytest.mark.parametrize("kind", ["autoencoder", "unet", "view_controlnet", "reference_encoder", "novel_view"])
def test_network_goes_with_its_last_user(pack, folder, kind):
    """Without the garbage collector, which the host calls, with a line in the log, where a network stays behind."""
    loading = pack.host.loading
    read, part = {
        "autoencoder": (loading.load_vae, "first_stage_model"),
        "unet": (loading.load_model, "model"),
        "view_controlnet": (pack.patches.view_controlnet.load_view_controlnet, "control_model"),
        "reference_encoder": (loading.load_reference_encoder, "patcher"),
        "novel_view": (loading.load_novel_view, "patcher"),
    }[kind]
    gc.collect()
    gc.disable()
    try:
        loaded = read(folder / f"{kind}.safetensors")
        network = getattr(loaded, part)
        left = weakref.ref(getattr(network, "model", network))
        del loaded, network
        assert left() is None
    finally:
        gc.enable()


def test_missing_name_is_said_by_the_host(host, pack):
    """A list that is left out of a prompt, on a node behind a link: not an exception in our own check."""
    with pytest.raises(ToolError, match="required_input_missing.*Required input is missing") as caught:
        inputs = {"positive": ["load", 2], "control_net": ["net", 0], "image": ["load", 3], "strength": 1.0}
        prompt = {
            "load": {"class_type": "DP3D_LoadMiniature", "inputs": {"name": "miniature"}},
            "net": {"class_type": "DP3D_LoadViewControlNet", "inputs": {}},
            "apply": {
                "class_type": "DP3D_ViewControlNet",
                "inputs": inputs | {"start_percent": 0.0, "end_percent": 1.0},
            },
            "show": {"class_type": "PreviewAny", "inputs": {"source": ["apply", 0]}},
        }
        host.run_workflow(prompt)
    assert "exception" not in str(caught.value)


def test_few_norm_groups_as_in_the_core(host, pack):
    """What a narrow set of networks is trained with: all of them, in both passes."""
    config = replace(NARROW_CONFIG, norm_groups=8)
    generator = torch.Generator().manual_seed(3)
    shapes = {"x_noisy": (6, 4, 8, 8), "ref_latent": (1, 4, 8, 8), "context": (1, 7, 32)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["hint"] = torch.rand(6, 3, 64, 64, generator=generator) * 2 - 1
    inputs["t"], inputs["ref_latent2"] = torch.full((6,), 601), inputs["ref_latent"]
    networks = {}
    for kind, weights in known_weights(config).items():
        networks[kind] = NETWORKS[kind](config)
        networks[kind].load_state_dict(weights)
    core = Denoiser(**networks, middle_view_attention="unconditional")
    with torch.inference_mode():
        context = inputs["context"].expand(6, -1, -1)
        bank = core.bank(inputs["ref_latent"], inputs["t"], context)
        rest = (inputs["t"], context, bank, inputs["hint"], 6)
        expected = core.guided(inputs["x_noisy"], *rest)
        eps = HostPath(pack, host.comfy, config).predict(inputs, 1, True, True, 3.0)
        other = HostPath(pack, host.comfy, NARROW_CONFIG).predict(inputs, 1, True, True, 3.0)
    assert (eps - expected).abs().max() < 1e-4
    assert (other - expected).abs().max() > 0.1


def test_vae_equals_the_core_s(loading, folder):
    from diffportrait3d.weights.files import load_network

    vae = loading.load_vae(folder / "autoencoder.safetensors")
    core, _ = load_network(folder / "autoencoder.safetensors")
    images = torch.rand(2, 64, 64, 3)
    with torch.no_grad():
        latents = core.encode(images.movedim(-1, 1) * 2 - 1)
        decoded = (core.decode(latents).clamp(-1, 1) + 1) / 2
    assert torch.allclose(0.18215 * vae.encode(images), latents, atol=1e-5)
    assert torch.allclose(vae.decode(latents / 0.18215), decoded.movedim(1, -1), atol=1e-4)
    assert vae.spacial_compression_encode() == 8


def test_novel_view_equals_the_core_s(pack, loading, folder):
    from diffportrait3d.cameras.labels import orbit_camera
    from diffportrait3d.weights.files import load_network

    network = loading.load_novel_view(folder / "novel_view.safetensors")
    core, _ = load_network(folder / "novel_view.safetensors")
    labels = orbit_camera([-30.0, 0.0, 10.0, 20.0, 30.0], [0.0] * 5)
    portrait = torch.rand(1, 32, 32, 3)
    with torch.inference_mode():
        proxies = pack.host.novel_view.render_proxies(network, portrait, orbit_camera(0.0, 0.0), labels)
        source = (portrait.movedim(-1, 1) * 2 - 1).expand(5, -1, -1, -1)
        expected = core(source, orbit_camera(0.0, 0.0).expand(5, -1), labels)
    assert torch.allclose(proxies, (expected.movedim(1, -1) + 1) / 2, atol=1e-5)


def test_novel_view_is_loaded_whole(loading, folder):
    """Also where the host has no memory left to promise: it would leave behind what it can neither cast nor move."""
    patcher = loading.load_novel_view(folder / "novel_view.safetensors").patcher
    patcher.partially_load(torch.device("meta"), 0.1)  # what was moved has no data any more
    assert {t.device.type for t in (*patcher.model.parameters(), *patcher.model.buffers())} == {"meta"}
    assert patcher.loaded_size() == patcher.model_size()


def test_shards_make_one_network(pack, loading, tmp_path, folder):
    network = NETWORKS["view_consistency"](NARROW_CONFIG)
    network.load_state_dict(known_weights(NARROW_CONFIG)["view_consistency"])
    files = save_network(tmp_path / "views.safetensors", network, "view_consistency", max_shard_bytes=2**22)
    assert len(files) > 1
    loaded = loading.load_cross_view_attention(tmp_path / "views.safetensors")
    network.join_projections()  # as the loader does
    expected, found = network.state_dict(), loaded.patcher.model.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[k], v) for k, v in expected.items())
    files[-1].unlink()
    with pytest.raises(ValueError, match="parts of views.safetensors"):
        loading.load_cross_view_attention(tmp_path / "views.safetensors")


def test_conventions_come_from_the_file(pack, loading, folder):
    encoder = loading.load_reference_encoder(folder / "reference_encoder.safetensors")
    assert encoder.metadata["reference_timestep"] == "zero"
    model = loading.load_model(folder / "unet.safetensors")
    views = loading.load_cross_view_attention(folder / "view_consistency.safetensors")
    patched = pack.patches.cross_view_attention.apply_cross_view_attention(model, views)
    handlers = patched.model_options["transformer_options"]["patches"]["forward_timestep_embed_patch"]
    assert len(handlers) == 1, "no handler for the middle block where the file says never"


@pytest.mark.parametrize(
    "loader, file, message",
    [
        (
            "load_reference_encoder",
            "view_controlnet",
            "holds view ControlNet weights, but reference encoder weights",
        ),
        ("load_cross_view_attention", "unet", "holds base UNet weights, but view consistency weights are needed"),
        ("load_model", "autoencoder", "holds autoencoder weights, but base UNet weights are needed"),
        ("load_vae", "unet", "holds base UNet weights, but autoencoder weights are needed"),
        ("load_novel_view", "unet", "holds base UNet weights, but novel-view model weights are needed"),
    ],
)
def test_wrong_kind(loading, folder, loader, file, message):
    with pytest.raises(ValueError, match=message) as error:
        getattr(loading, loader)(folder / f"{file}.safetensors")
    assert f"{file}.safetensors" in str(error.value)


def test_damaged_and_foreign_files(loading, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        loading.load_model(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="not written by DiffPortrait3D"):
        loading.load_model(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="There is no file"):
        loading.load_model(tmp_path / "missing.safetensors")


def test_files_are_found_by_what_they_hold(host, pack, tmp_path, folder):
    files = pack.host.model_files
    paths = host.folder_paths.get_folder_paths("diffportrait3d")
    assert paths[0] == str(Path(host.folder_paths.models_dir) / "diffportrait3d")
    assert paths[-1].endswith("weights"), "the pack's own weights are the last resort"
    host.folder_paths.add_model_folder_path("diffportrait3d", str(tmp_path))
    try:
        (tmp_path / "deep").mkdir()
        target = tmp_path / "deep" / "any name.safetensors"
        target.write_bytes((folder / "view_consistency.safetensors").read_bytes())
        assert "deep/any name.safetensors" in files.network_names("view_consistency")
        assert "deep/any name.safetensors" not in files.network_names("unet")
        assert files.network_path("deep/any name.safetensors", "view_consistency") == target
    finally:
        host.folder_paths.folder_names_and_paths["diffportrait3d"][0].remove(str(tmp_path))
    with pytest.raises(ValueError, match="there is no view consistency .*models/diffportrait3d"):
        files.network_path("deep/any name.safetensors", "view_consistency")


def test_view_controlnets_also_in_models_controlnet(host, pack, folder):
    target = Path(host.folder_paths.models_dir) / "controlnet" / "camera.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((folder / "view_controlnet.safetensors").read_bytes())
    try:
        assert "camera.safetensors" in pack.host.model_files.network_names("view_controlnet")
        assert pack.host.model_files.network_path("camera.safetensors", "view_controlnet") == target
    finally:
        target.unlink()
