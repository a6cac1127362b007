"""The host boots, refuses what it should, and loads this pack as an installed one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tools.host import PACK_NAME, ToolError
from tools.server import pack_failure

IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 8, "batch_size": 2, "color": 0xFF8000}}


def _save(source: str) -> dict:
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": "test"}}


def test_modules_are_the_hosts_own(host):
    for module in (host.nodes, host.execution, host.folder_paths, host.comfy.samplers):
        assert Path(module.__file__).resolve().is_relative_to(host.path)
    assert host.comfy.model_management.get_torch_device() == torch.device("cpu")
    assert {"KSampler", "SamplerCustomAdvanced"} <= set(host.nodes.NODE_CLASS_MAPPINGS)


def test_stock_workflow_gives_values_and_files(host):
    result = host.run_workflow({"1": IMAGE, "2": _save("1")})
    image = result.values["1"][0]
    assert image.shape == (2, 8, 16, 3)
    assert torch.allclose(image[0, 0, 0], torch.tensor([1.0, 128 / 255, 0.0]))
    files = [host.base_directory / "output" / entry["filename"] for entry in result.outputs["2"]["images"]]
    assert len(files) == 2 and all(path.is_file() for path in files)


def test_one_invalid_output_refuses_the_workflow(host):
    """The host itself would run the valid half and drop the other silently."""
    unconnected = {"class_type": "SaveImage", "inputs": {"filename_prefix": "test"}}
    with pytest.raises(ToolError, match="required_input_missing"):
        host.run_workflow({"1": IMAGE, "2": _save("1"), "3": unconnected})


def test_failing_node_gives_its_own_exception(host):
    crop = {"class_type": "ImageFromBatch", "inputs": {"image": ["1", 0], "batch_index": 0, "length": 1}}
    prompt = {"1": IMAGE, "2": crop, "3": _save("2")}
    original = host.nodes.NODE_CLASS_MAPPINGS["EmptyImage"]
    try:
        host.nodes.NODE_CLASS_MAPPINGS["EmptyImage"] = _Failing
        with pytest.raises(ToolError, match="EmptyImage .node 1.: no image 16x8") as caught:
            host.run_workflow(prompt)
    finally:
        host.nodes.NODE_CLASS_MAPPINGS["EmptyImage"] = original
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert caught.value.__cause__.__traceback__ is not None


class _Failing:
    RETURN_TYPES, FUNCTION = ("IMAGE",), "execute"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {name: ("INT",) for name in ("width", "height", "batch_size", "color")}}

    def execute(self, width, height, batch_size, color):
        raise ArithmeticError(f"no image {width}x{height}")


def test_pack_loads_from_a_folder_with_a_hyphen(host, pack):
    assert pack.__name__.endswith("ComfyUI-DiffPortrait3D")
    module = "custom_nodes.ComfyUI-DiffPortrait3D"
    ours = {
        name: cls
        for name, cls in host.nodes.NODE_CLASS_MAPPINGS.items()
        if getattr(cls, "RELATIVE_PYTHON_MODULE", None) == module
    }
    assert ours, "the pack loaded but brought no node"
    for name, cls in ours.items():
        assert cls.__module__.startswith(pack.__name__), f"{name} comes from {cls.__module__}"


def test_pack_runs_its_own_core_and_hides_nothing(pack, repository):
    for name in ("nodes", "host", "patches", "diffportrait3d"):
        module = getattr(pack, name)
        assert module.__name__ == f"{pack.__name__}.{name}"
        assert Path(module.__file__).resolve().is_relative_to(repository / name)
    assert not any(Path(entry or ".").resolve() == repository for entry in sys.path)


@pytest.mark.parametrize(
    "code",
    [
        "raise LookupError('no such thing')",
        "def comfy_entrypoint(): raise LookupError('no such thing')",
        "# neither nodes nor an entrypoint",
    ],
)
def test_refused_pack_shows_the_hosts_words(host, tmp_path, code):
    """In-process as an error; from the server's log as the one line that `make demo` prints."""
    source, name = tmp_path / "source", f"{PACK_NAME}-{tmp_path.name}"
    source.mkdir()
    (source / "__init__.py").write_text(code + "\n")
    with pytest.raises(ToolError, match="refused the pack") as caught:
        host.load_pack(source, name=name)
    failure = pack_failure(str(caught.value))
    assert name in failure and ("no such thing" in failure or "lack of NODE_CLASS_MAPPINGS" in failure)
    if code.startswith("raise"):
        assert "LookupError: no such thing" in str(caught.value), "the traceback is missing"


@pytest.mark.parametrize("version", ["0.3.64", "0.29.9", "0.9.0-1-gabcdef"])
def test_older_host_is_told_in_one_sentence(host, monkeypatch, tmp_path, version):
    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", version)
    with pytest.raises(ToolError) as caught:
        host.load_pack(name=f"{PACK_NAME}-{tmp_path.name}")
    told = f"DiffPortrait3D needs ComfyUI 0.30.0 or newer, and this one is {version}; update ComfyUI."
    assert told in pack_failure(str(caught.value))


@pytest.mark.parametrize("version", ["0.30.0", "0.30.1", "0.100.2", "1.0.0-rc1"])
def test_this_host_and_newer_ones_are_welcome(pack, monkeypatch, repository, version):
    import comfyui_version

    oldest = pack.host.internals.OLDEST
    assert f'requires-comfyui = ">={oldest}"' in (repository / "pyproject.toml").read_text(encoding="utf-8")
    monkeypatch.setattr(comfyui_version, "__version__", version)
    pack.host.internals.check_host_version()


def test_loaded_pack_is_no_failure():
    log = f"Cannot import extras/nodes_glsl.py module for custom nodes: x\n   0.0 seconds: custom_nodes/{PACK_NAME}"
    assert pack_failure(log) is None


@pytest.mark.parametrize("damage", ["weight", "option", "module"])
def test_assert_clean_sees_damage(host, assert_clean, damage):
    inner = torch.nn.Sequential(torch.nn.Linear(3, 3))
    cpu = torch.device("cpu")
    model = host.comfy.model_patcher.ModelPatcher(inner, load_device=cpu, offload_device=cpu)
    with assert_clean(model):
        model.clone().set_model_attn1_patch(lambda *args: args)
    with pytest.raises(AssertionError, match=damage):
        with assert_clean(model):
            if damage == "weight":
                inner[0].weight.data[0, 0] += 1e-6
            elif damage == "option":
                model.set_model_attn1_patch(lambda *args: args)
            else:
                inner.append(torch.nn.Identity())
