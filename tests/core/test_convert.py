"""The converter: the release's layout, every container it may come in, and one clear error for everything else."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffportrait3d import convert as command
from diffportrait3d.command import run_main
from diffportrait3d.conversion import Options, convert, inspect
from diffportrait3d.conversion.layout import TEXT, UNET, VAE, official_shapes
from diffportrait3d.conversion.report import findings, table
from diffportrait3d.diffusion import Schedule
from diffportrait3d.networks import NETWORKS, AutoencoderConfig, UNetConfig
from diffportrait3d.networks.sizes import SD15_AUTOENCODER
from diffportrait3d.weights import checkpoints
from diffportrait3d.weights.files import CheckpointError, load_network
from diffportrait3d.weights.text_encoder import TextEncoderSizes

TINY = UNetConfig(model_channels=32, context_dim=32)
TINY_AUTOENCODER = AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, patch_size=1)
TINY_TEXT = TextEncoderSizes(vocabulary=50, width=32, positions=77, hidden=128, layers=2)
KINDS = ("reference_encoder", "view_controlnet", "view_consistency")
FILES = [f"{kind}.safetensors" for kind in KINDS]
PREFIXES = {kind: NETWORKS[kind].prefix for kind in KINDS}
# SHA-256 over "KEY SHAPE" lines, sorted, of the authors' model class at full size.
OFFICIAL_KEYS = "1b537a3040494d6e7e6dc15cbf6d9d7a816139195aefe57145ecfb35eb117c49"


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    groups = official_shapes(TINY, TINY_AUTOENCODER, TINY_TEXT)
    return {name: shape for names in groups.values() for name, shape in names.items()}


def with_schedule(tensors: dict) -> dict:
    return tensors | {"betas": Schedule().betas, "alphas_cumprod": Schedule().alphas_cumprod}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A checkpoint of the release's layout, random, narrow."""
    generator = torch.Generator().manual_seed(0)
    return with_schedule({name: 0.05 * torch.randn(s, generator=generator) for name, s in tiny_shapes().items()})


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("release") / "model_state.th"
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "global_step": 540000}, path)
    return path


@pytest.fixture
def zeros() -> dict[str, torch.Tensor]:
    """All keys and shapes of a release; the values take no space in a pickle."""
    zero = torch.zeros(1)
    return with_schedule({name: zero.expand(shape) for name, shape in tiny_shapes().items()})


def save(tensors: object, path: Path, **kwargs) -> Path:
    torch.save(tensors, path, **kwargs)
    return path


def assert_holds(path: Path, weights: dict, prefix: str, dtype: torch.dtype = torch.float32) -> None:
    written = load_file(path)
    for name, tensor in written.items():
        assert torch.equal(tensor, weights[prefix + name].to(dtype)), name


def test_expected_keys_are_the_official_ones():
    groups = official_shapes(UNetConfig(), SD15_AUTOENCODER, TextEncoderSizes())
    shapes = {name: shape for names in groups.values() for name, shape in names.items()}
    lines = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    assert len(shapes) == 2937 and sum(map(math.prod, shapes.values())) == 2_871_412_307
    assert hashlib.sha256(lines.encode()).hexdigest() == OFFICIAL_KEYS


def test_splits_a_wrapped_pickle(checkpoint, weights, tmp_path):
    conversion = convert(checkpoint, Options(tmp_path / "out", verify=True))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*FILES, "base_checkpoint.safetensors"])
    for kind in KINDS:
        path = tmp_path / "out" / f"{kind}.safetensors"
        network, metadata = load_network(path, expect=kind)
        assert network.config == TINY and metadata["source"]["file"] == "model_state.th"
        assert_holds(path, weights, PREFIXES[kind])
    assert load_network(tmp_path / "out/reference_encoder.safetensors")[1]["reference_timestep"] == "current"
    assert load_network(tmp_path / "out/view_controlnet.safetensors")[1]["hint_range"] == [-1, 1]
    views = load_network(tmp_path / "out/view_consistency.safetensors")[1]
    assert views["middle_view_attention"] == "unconditional" and not views["middle_view_attention_is_zero"]
    base = load_file(tmp_path / "out/base_checkpoint.safetensors")
    expected = official_shapes(TINY, TINY_AUTOENCODER, TINY_TEXT)
    assert base.keys() == expected[UNET].keys() | expected[VAE].keys() | expected[TEXT].keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.items())
    assert all(cast == after for _, cast, after in conversion.sums.values())


def test_report_accounts_for_every_value(checkpoint, weights, tmp_path):
    conversion = convert(checkpoint, Options(tmp_path / "out", verify=True))
    text = "\n".join([table(conversion), *findings(conversion)])
    count, values = len(weights), sum(tensor.numel() for tensor in weights.values())
    assert f"{count} of the {count} keys of the release, 0 missing, 0 surplus" in text
    assert "every key begins with 'module.'" in text and "left out beside it: global_step" in text
    equation = next(line for line in text.splitlines() if "values in the checkpoint =" in line)
    assert equation.startswith(f"- {values / 1e6:.6f}") or equation.startswith(f"{values / 1e6:.6f}")
    shares = [round(1e6 * float(part.split()[0])) for part in equation.split("=")[1].split("+")]
    assert sum(shares) == values
    assert "16 tensors of input_hint_block" in text
    total = sum(float(weights[k].double().sum()) for k in weights if k.startswith("pose_control_model."))
    assert f"view_controlnet.safetensors: all values add up to {total:.10g} in the checkpoint" in text


@pytest.mark.parametrize("container", ["safetensors", "bare pickle", "old pickle"])
def test_other_containers_and_half_precision(container, weights, tmp_path):
    path, out = tmp_path / "release", tmp_path / "out"
    half = {name: tensor.half() for name, tensor in weights.items()}
    if container == "safetensors":
        save_file(half, path, {"format": "pt"})
    else:
        save(half, path, _use_new_zipfile_serialization=container == "bare pickle")
    conversion = convert(path, Options(out))
    read_whole = any("all 0.1 GB of it are in memory" in note for note in conversion.checkpoint.notes)
    assert read_whole == (container == "old pickle")
    for kind in KINDS:
        assert_holds(out / f"{kind}.safetensors", half, PREFIXES[kind], torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts(dtype, checkpoint, weights, tmp_path):
    conversion = convert(checkpoint, Options(tmp_path, dtype=dtype, verify=True))
    for kind in KINDS:
        assert_holds(tmp_path / f"{kind}.safetensors", weights, PREFIXES[kind], dtype)
    before, cast, after = conversion.sums["view_consistency.safetensors"]
    assert cast == after and before != cast


def test_files_are_mapped_anew_so_that_read_pages_are_let_go(checkpoint, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "REMAP_BYTES", 30_000_000)
    opened = []
    monkeypatch.setattr(checkpoints, "_unpickle", lambda *a, real=checkpoints._unpickle: opened.append(a) or real(*a))
    convert(checkpoint, Options(tmp_path))
    assert len(opened) >= 4
    assert_holds(tmp_path / "view_controlnet.safetensors", weights, "pose_control_model.")


def test_middle_view_attention_of_zeros_is_noticed(zeros, tmp_path):
    conversion = convert(save(zeros, tmp_path / "release.th"), Options(tmp_path / "out"))
    assert conversion.middle_is_zero
    assert load_network(tmp_path / "out/view_consistency.safetensors")[1]["middle_view_attention_is_zero"]
    assert any("middle block is all zero" in line for line in findings(conversion))


def sd15_of(weights: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    names = official_shapes(TINY, TINY_AUTOENCODER, TINY_TEXT)
    return {name: weights[name].to(dtype) for group in (UNET, VAE, TEXT) for name in names[group]}


def test_base_that_is_sd15_is_not_written(checkpoint, weights, tmp_path):
    save_file(sd15_of(weights, torch.float16), tmp_path / "sd15.safetensors")
    conversion = convert(checkpoint, Options(tmp_path / "out", base=tmp_path / "sd15.safetensors"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert table(conversion).count("equals --base; not written") == 3


def test_base_that_differs_is_written_and_the_difference_named(checkpoint, weights, tmp_path):
    base = sd15_of(weights, torch.float32)
    name = TEXT.prefix + "final_layer_norm.bias"
    base[name] = base[name] + torch.tensor([0.25] + [0.0] * 31)
    conversion = convert(checkpoint, Options(tmp_path / "out", base=save(base, tmp_path / "sd15.ckpt")))
    written = load_file(tmp_path / "out/base_checkpoint.safetensors")
    assert torch.equal(written[name], weights[name])
    lines = findings(conversion)
    assert f"text encoder: 1 of 36 tensors differ from --base, by up to 0.25; the first is {name}" in lines
    assert "base UNet: equal to --base in every one of 686 tensors" in lines


def test_base_of_another_kind(checkpoint, tmp_path):
    save_file({"conditioner.embedders.0.x": torch.zeros(1)}, tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match="no SD1.5 checkpoint of the same width; it looks like an SDXL"):
        convert(checkpoint, Options(tmp_path / "out", base=tmp_path / "xl.safetensors"))


def test_second_run_writes_nothing(checkpoint, tmp_path):
    convert(checkpoint, Options(tmp_path))
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    conversion = convert(checkpoint, Options(tmp_path))
    assert all(output.complete for output in conversion.outputs)
    assert before == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def test_interrupted_run_goes_on_where_it_stopped(checkpoint, weights, tmp_path, monkeypatch):
    get, stop_at = checkpoints.PickleCheckpoint.get, "pose_control_model.middle_block_out.0.weight"

    def interrupted(self, name):
        if name == stop_at:
            raise KeyboardInterrupt
        return get(self, name)

    monkeypatch.setattr(checkpoints.PickleCheckpoint, "get", interrupted)
    assert run_main(lambda: command.main([str(checkpoint), "--out", str(tmp_path)])) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["reference_encoder.safetensors"]
    monkeypatch.undo()
    conversion = convert(checkpoint, Options(tmp_path))
    assert [output.complete for output in conversion.outputs] == [True, False, False, False]
    assert_holds(tmp_path / "view_controlnet.safetensors", weights, "pose_control_model.")


def test_results_of_another_run_are_not_replaced_unasked(zeros, tmp_path):
    path = save(zeros, tmp_path / "release.th")
    convert(path, Options(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="view_consistency.safetensors.* exists, from another checkpoint"):
        convert(path, Options(tmp_path / "out", dtype=torch.float16))
    convert(path, Options(tmp_path / "out", dtype=torch.float16, overwrite=True))
    assert load_file(tmp_path / "out/view_consistency.safetensors").popitem()[1].dtype == torch.float16


def test_a_changed_checkpoint_is_not_taken_for_converted(zeros, tmp_path):
    path = save(zeros, tmp_path / "release.th")
    convert(path, Options(tmp_path / "out"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert(path, Options(tmp_path / "out"))


class Payload:
    """Unpickling it normally would create a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / "bad.th"
    keys = {
        "LoRA": ["lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight"],
        "SDXL": ["conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"],
        "ControlNet": ["control_model.zero_convs.0.0.weight", "model.diffusion_model.input_blocks.0.0.weight"],
        "bare ControlNet": ["zero_convs.0.0.weight", "input_blocks.0.0.weight"],
        "SDXL ControlNet": ["zero_convs.0.0.weight", "label_emb.0.0.weight"],
        "diffusers ControlNet": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
        "AnimateDiff": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
        "SD1.5": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
        "unknown": ["encoder.weight"],
    }
    if kind in keys:
        save_file({key: torch.zeros(4, 4) for key in keys[kind]}, path)
    elif kind == "truncated zip":
        path.write_bytes(save({"x": torch.zeros(50_000)}, path).read_bytes()[:100_000])
    elif kind == "truncated old pickle":
        save({"x": torch.zeros(50_000)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "truncated safetensors":
        save_file({"x": torch.zeros(50_000)}, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "picture":
        path.write_bytes(b"\xff\xd8\xff\xe0" * 100)
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "list":
        save([torch.zeros(3)], path)
    elif kind == "code in a zip":
        save({"state_dict": {"x": torch.zeros(3)}, "hook": Payload(folder / "ran")}, path)
    elif kind == "code in an old pickle":
        save({"x": Payload(folder / "ran")}, path, _use_new_zipfile_serialization=False)
    elif kind == "code alone":
        path.write_bytes(pickle.dumps(Payload(folder / "ran"), protocol=4))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "There is no file"),
        ("LoRA", "is a LoRA; the authors' checkpoint"),
        ("SDXL", "is an SDXL checkpoint"),
        ("ControlNet", "is a ControlNet checkpoint of another kind"),
        ("bare ControlNet", "is a ControlNet checkpoint of another kind"),
        ("SDXL ControlNet", "is a ControlNet checkpoint of another kind"),
        ("diffusers ControlNet", "is a ControlNet checkpoint of another kind"),
        ("AnimateDiff", "is an AnimateDiff motion module"),
        ("SD1.5", "is an ordinary Stable Diffusion 1.5 checkpoint"),
        ("unknown", "has no keys of the reference encoder .control_model.*Found: its first tensors are encoder.weight"),
        ("truncated zip", "is truncated or damaged"),
        ("truncated old pickle", "is truncated or damaged"),
        ("truncated safetensors", "is truncated or damaged"),
        ("picture", "is neither a torch checkpoint nor safetensors"),
        ("other zip", "is truncated or damaged|no network's checkpoint"),
        ("list", "holds no tensors by name, but list"),
        ("code in a zip", r"carries code: loading it would call \w+\.mkdir"),
        ("code in an old pickle", r"carries code: loading it would call \w+\.mkdir"),
        ("code alone", "asks for more than tensors"),
    ],
)
def test_bad_files_give_one_clear_error_and_write_nothing(kind, message, tmp_path, capsys):
    path = bad_file(kind, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        convert(path, Options(tmp_path / "out"))
    assert command.main([str(path), "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"Error: {path}" if kind != "missing" else "Error: There is")
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def prefixed(tensors: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def inside(tensors: dict, wrapper: str) -> dict:
    """A wrapper that stays inside the networks, as where each of them is compiled by itself."""
    return {re.sub(r"^((?:pose_)?control_model|model\.diffusion_model)\.", rf"\1.{wrapper}.", k): v
            for k, v in tensors.items()}  # fmt: skip


WRAPPED = {
    **{name: lambda t, name=name: {name: t, "epoch": 3} for name in (
        "model", "model_state_dict", "params_ema", "weights", "ema", "net", "anything at all")},
    **{prefix: lambda t, prefix=prefix: prefixed(t, prefix) for prefix in (
        "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "module.model.", "net.", "ema_model.module.",
        "_forward_module.", "_fsdp_wrapped_module._orig_mod.")},
    "two mappings deep": lambda t: {"checkpoint": {"model": t}, "args": {"lr": 1.0}},
    "mapping and prefix": lambda t: {
        "model": prefixed(t, "module._orig_mod."), "optimizer": {"state": {0: {"exp_avg": t["betas"]}}}},
    "weights and averages": lambda t: {"ema": {k: v + 1 for k, v in t.items()}, "model": t},
    "a mapping that does not fit": lambda t: {"discriminator": {"conv.weight": t["betas"]}, "generator": t},
    "a mapping a network": lambda t: {
        **{part: {k.removeprefix(f"{part}."): v for k, v in t.items() if k.startswith(f"{part}.")} for part in
           ("control_model", "pose_control_model", "model", "first_stage_model", "cond_stage_model")},
        **{k: v for k, v in t.items() if "." not in k},
    },
    "each network compiled": lambda t: inside(t, "_orig_mod"),
    "each network in DDP": lambda t: {"state_dict": inside(t, "module")},
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_are_taken_off_whatever_they_are_called(zeros, tmp_path, how):
    source = checkpoints.open_checkpoint(save(WRAPPED[how](zeros), tmp_path / "wrapped.th"))
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in zeros.items()}
    inspect(source.shapes, source.path)
    assert not source.get("pose_control_model.zero_convs.0.0.weight").any()  # the weights, not the averages
    assert torch.equal(source.get("betas"), zeros["betas"])
    if how != "a mapping a network":
        said = " ".join(source.notes)
        assert "the tensors are under" in said or "taken off" in said or "taken out" in said


def test_a_prefix_in_safetensors_and_in_the_base(weights, tmp_path):
    save_file(prefixed(weights, "module._orig_mod."), tmp_path / "release.safetensors")
    base = save({"weights": prefixed(sd15_of(weights, torch.float32), "model.")}, tmp_path / "sd15.ckpt")
    conversion = convert(tmp_path / "release.safetensors", Options(tmp_path / "out", base=base, verify=True))
    assert_holds(tmp_path / "out/view_controlnet.safetensors", weights, "pose_control_model.")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert "every key begins with 'module._orig_mod.', which is taken off" in conversion.checkpoint.notes


def test_what_is_beside_the_networks_under_a_prefix_is_named(zeros, tmp_path):
    """Lightning's way: the loss has weights, too. They stay what they are, surplus."""
    path = save({"state_dict": {**prefixed(zeros, "model."), "loss.vgg.weight": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="1 keys do not belong to the release: loss.vgg.weight"):
        convert(path, Options(tmp_path / "out"))
    convert(path, Options(tmp_path / "out", drop_surplus=True))


@pytest.mark.parametrize("content", [
    {"epoch": 1, "model": {"layer1.weight": torch.zeros(2, 3)}, "optimizer": {"state": {}}},
    {"epoch": 1, "weights": {"net": {"layer1.weight": torch.zeros(2, 3)}}},
])  # fmt: skip
def test_what_was_found_is_said(content, tmp_path):
    said = rf"top-level keys are {', '.join(content)}; its first tensors are layer1.weight \[2, 3\]"
    with pytest.raises(CheckpointError, match=f"has no keys of the reference encoder .*Found: its {said}"):
        convert(save(content, tmp_path / "x.pt"), Options(tmp_path / "out"))


def test_own_files_are_recognised(zeros, tmp_path):
    convert(save(zeros, tmp_path / "release.th"), Options(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="a network file of this pack already"):
        convert(tmp_path / "out/view_controlnet.safetensors", Options(tmp_path / "again"))


def shapes_without(*starts: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in tiny_shapes().items() if not name.startswith(starts)}


def test_missing_keys_are_named_and_counted():
    ten_names = r"14 keys of the reference encoder are missing: (control_model\.\S+, ){10}\.\.\."
    with pytest.raises(CheckpointError, match=ten_names):
        inspect(shapes_without("control_model.output_blocks.0.0.", "control_model.time_embed.0."), "file")
    with pytest.raises(CheckpointError, match="2 keys of the autoencoder are missing: first_stage_model.quant_conv"):
        inspect(shapes_without("first_stage_model.quant_conv."), "file")


def test_a_whole_network_missing():
    with pytest.raises(CheckpointError, match=r"has no keys of the view ControlNet \(pose_control_model"):
        inspect(shapes_without("pose_control_model."), "file")


def test_base_networks_may_be_absent_as_a_whole(zeros, tmp_path):
    kept = {name: tensor for name, tensor in zeros.items() if not name.startswith((VAE.prefix, TEXT.prefix))}
    conversion = convert(save(kept, tmp_path / "release.th"), Options(tmp_path / "out"))
    assert table(conversion).count("not in the checkpoint") == 2
    assert all(name.startswith(UNET.prefix) for name in load_file(tmp_path / "out/base_checkpoint.safetensors"))


def test_surplus_keys_are_errors_unless_known_or_dropped():
    extra = {"text_blip.weight": (3,), "control_model.lost": (2,)}
    names = ["control_model.lost", "text_blip.weight"]
    with pytest.raises(CheckpointError, match=f"2 keys do not belong to the release: {', '.join(names)}"):
        inspect(tiny_shapes() | extra, "file")
    assert inspect(tiny_shapes() | extra, "file", drop_surplus=True).surplus() == names
    known = {TEXT.prefix + "embeddings.position_ids": (1, 77), "model_ema.decay": ()}
    assert len(inspect(tiny_shapes() | known, "file").surplus()) == 2


def test_other_shapes_are_named():
    shapes = tiny_shapes() | {"control_model.middle_block.1.proj_in.weight": (128, 128)}  # SD2's linear layer
    wanted = r"control_model.middle_block.1.proj_in.weight \[128, 128\] instead of \[128, 128, 1, 1\]"
    with pytest.raises(CheckpointError, match=wanted):
        inspect(shapes, "file")


def test_wrong_schedule_dtype_and_values(zeros, tmp_path):
    path, name = tmp_path / "release.th", "control_model.time_embed.0.bias"
    cases = [
        ({"betas": Schedule(linear_end=0.02).betas}, "another noise schedule than SD1.5: betas"),
        ({name: torch.zeros(128, dtype=torch.int8)}, "quantised checkpoint cannot be converted"),
        ({name: torch.full((128,), float("nan"))}, f"{name} holds infinities or NaN"),
        ({name: torch.full((128,), 1e6)}, f"{name} holds values beyond the range of torch.float16"),
    ]
    for change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            convert(save(zeros | change, path), Options(tmp_path / "out", dtype=torch.float16))
        assert not list(tmp_path.glob("out/*"))


def test_full_disk_is_noticed_before_writing(zeros, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(CheckpointError, match="0.0 GB are free"):
        convert(save(zeros, tmp_path / "release.th"), Options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_old_lightning_checkpoints_are_read_without_their_objects(tmp_path):
    class ModelCheckpoint:
        def __reduce__(self):
            return "ModelCheckpoint"

    source = {"state_dict": {"x": torch.ones(3)}, "best": __import__("numpy").float64(0.5)}
    opened = checkpoints.open_checkpoint(save(source, tmp_path / "old.ckpt"))
    assert torch.equal(opened.get("x"), torch.ones(3))


def test_runs_as_a_file_for_pythons_without_the_current_folder(repository, tmp_path):
    script = repository / "diffportrait3d" / "convert.py"
    arguments = [sys.executable, "-I", str(script), "nothing.th", "--out", "out"]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.strip() == "Error: There is no file nothing.th; check the path."
