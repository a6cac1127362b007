"""The release's networks without metadata: told by keys and shapes, with the release's conventions, or refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from diffportrait3d.networks import CrossViewAttention, UNet, UNetConfig, ViewControlNet
from diffportrait3d.weights import identify
from diffportrait3d.weights.files import CheckpointError, load_network, read_kind, read_metadata, save_network
from diffportrait3d.weights.identify import OFFICIAL, official_kind, official_network

NARROW = UNetConfig(model_channels=32, context_dim=32, max_views=12)
PREFIXES = {kind: spec.prefix for kind, spec in OFFICIAL.items()}
BARE = ("reference_encoder", "view_consistency")


@pytest.fixture(scope="module")
def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Keys and shapes of each network of the method in the authors' checkpoint."""
    shapes = {kind: shapes_of(spec.module, spec.prefix) for kind, spec in OFFICIAL.items()}
    shapes["reference_encoder"]["control_model.input_hint_block.0.weight"] = (16, 3, 3, 3)  # one of those without use
    return shapes


def shapes_of(network: type, prefix: str = "") -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {prefix + name: tuple(tensor.shape) for name, tensor in network(UNetConfig()).state_dict().items()}


@pytest.fixture
def narrow_release(monkeypatch):
    """As if the release had been trained at a width that tests can afford."""
    monkeypatch.setattr(identify, "OFFICIAL_CONFIG", NARROW)


def plain(kind: str, prefix: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {prefix + name: 0.1 * torch.randn_like(t) for name, t in OFFICIAL[kind].module(NARROW).state_dict().items()}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_networks_are_told_by_their_keys(shapes, kind):
    found = official_network(shapes[kind])
    assert (found.spec.kind, found.config) == (kind, UNetConfig())
    assert not any("input_hint_block" in key for key in found.keys) or kind == "view_controlnet"
    assert all(PREFIXES[kind] + name == key for name, key in found.keys.items())
    assert official_kind(set(shapes[kind])) == kind
    assert OFFICIAL[kind].conventions.items() <= found.metadata.items()


@pytest.mark.parametrize("kind", BARE)
def test_the_prefix_may_be_gone(shapes, kind):
    bare = {name.removeprefix(PREFIXES[kind]): shape for name, shape in shapes[kind].items()}
    assert official_network(bare).spec.kind == official_kind(set(bare)) == kind


def test_the_positional_table_has_the_length_it_has(shapes):
    longer = {
        name: (1, 64, shape[2]) if name.endswith(".pe") else shape for name, shape in shapes["view_consistency"].items()
    }
    assert official_network(longer).config.max_views == 64


def test_the_whole_checkpoint_is_for_the_converter(shapes):
    together = {name: shape for part in shapes.values() for name, shape in part.items()}
    wanted = "reference encoder and view ControlNet and view consistency in one; split it with `python -m"
    with pytest.raises(ValueError, match=wanted):
        official_network(together)
    assert official_kind(set(together)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"control_model.middle_block.1.proj_in.weight": None},
            "but 1 are missing, middle_block.1.proj_in.weight first",
        ),
        ({"control_model.text_blip.weight": (3,)}, "but 1 are unknown, text_blip.weight first"),
        (
            {"control_model.middle_block.1.proj_in.weight": (1280, 1280)},
            "but 1 have another shape, middle_block.1.proj_in",
        ),
        (
            {"control_model.input_blocks.0.0.weight": (64, 4, 3, 3)},
            "64 channels wide, but no metadata: the number of its",
        ),
    ],
)
def test_deviations_are_named(shapes, change, message):
    changed = {name: shape for name, shape in (shapes["reference_encoder"] | change).items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        official_network(changed)


def test_other_networks_are_not_taken_for_the_release_s(shapes):
    unet, control = shapes_of(UNet), shapes_of(ViewControlNet)
    for others in (unet, control, {f"control_model.{name}": s for name, s in control.items()}, {"a": (1,)}):
        assert official_network(others) is None and official_kind(set(others)) is None


@pytest.mark.parametrize(("kind", "prefix"), [*PREFIXES.items(), *((kind, "") for kind in BARE)])
def test_a_file_without_metadata_runs_by_the_release_s_conventions(narrow_release, tmp_path, kind, prefix):
    tensors, path = plain(kind, prefix), tmp_path / "plain.safetensors"
    stored = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(stored | {"step": torch.zeros(1)} if prefix else stored, path, {"format": "pt"})
    network, metadata = load_network(path, expect=kind)
    assert read_kind(path) == kind and network.config == NARROW
    assert OFFICIAL[kind].conventions.items() <= metadata.items()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, stored[prefix + name].float()), name


def test_view_consistency_beside_its_unet(narrow_release, tmp_path):
    unet = {PREFIXES["view_consistency"] + name: t for name, t in UNet(NARROW).state_dict().items()}
    save_file(unet | plain("view_consistency", PREFIXES["view_consistency"]), tmp_path / "both.safetensors")
    assert load_network(tmp_path / "both.safetensors")[1]["network"] == "view_consistency"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_x.lora_down.weight"], "it is a LoRA; convert the authors' checkpoint"),
        (["conditioner.embedders.0.x"], "it is an SDXL checkpoint"),
        (["zero_convs.0.0.weight"], "keys of an ordinary ControlNet; .* Load ControlNet Model"),
        (["control_model.zero_convs.0.0.weight"], "keys of an ordinary ControlNet"),
        (["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"], "it is an AnimateDiff motion module"),
        (["x"], "its metadata lacks format=diffportrait3d"),
    ],
)
def test_other_files_are_named(tmp_path, names, message):
    path = tmp_path / "foreign.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    assert read_kind(path) is None
    with pytest.raises(CheckpointError, match=f"foreign.safetensors was not written by DiffPortrait3D.*{message}"):
        read_metadata(path)


def test_metadata_counts_before_keys(tmp_path):
    """A network of ours at the width of the release keeps its own conventions."""
    network = CrossViewAttention(NARROW)
    save_network(tmp_path / "views.safetensors", network, "view_consistency", middle_view_attention="never")
    assert read_metadata(tmp_path / "views.safetensors")["middle_view_attention"] == "never"
    assert read_kind(tmp_path / "views.safetensors") == "view_consistency"
