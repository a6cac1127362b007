"""One real ComfyUI for all host tests. Without a host they fail and say how to get one; they never skip."""

from __future__ import annotations

import asyncio
import importlib.util
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from evaluation.goldens.narrow_files import write_networks as write_narrow_networks
from tools.embedded import EmbeddedHost, boot


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> EmbeddedHost:
    """The booted ComfyUI on the CPU: `.nodes`, `.execution`, `.folder_paths`, `.comfy`, `.run_workflow()`."""
    return boot(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def pack(host):
    """This pack as the host loaded it: `pack.nodes`, `pack.patches`, and its own `pack.diffportrait3d`.

    These modules are not the installed `diffportrait3d`: classes of one are not classes of the other.
    """
    return host.load_pack()


@pytest.fixture
def run_workflow(host, pack):
    """run_workflow(prompt in API format) -> WorkflowResult; see tools.embedded.EmbeddedHost.run_workflow."""
    return host.run_workflow


@pytest.fixture(scope="session")
def photograph() -> Path:
    """scikit-image's astronaut; the package is not imported, its file is opened."""
    [folder] = importlib.util.find_spec("skimage").submodule_search_locations
    return Path(folder) / "data/astronaut.png"


@pytest.fixture(scope="session")
def write_networks():
    """write_networks(folder, **metadata): see evaluation.goldens.narrow_files."""
    return write_narrow_networks


@pytest.fixture(scope="session")
def stock_autoencoder(host):
    """stock_autoencoder(channels): random weights of the host's smallest VAE, for latents of so many channels."""
    from comfy.taesd.taesd import TAESD

    def weights(channels: int = 4):
        generator, tensors = torch.Generator().manual_seed(0), TAESD(latent_channels=channels).state_dict()
        for tensor in tensors.values():
            if tensor.ndim:  # the host's layers come with whatever was in memory
                torch.nn.init.normal_(tensor, std=0.05, generator=generator)
        return tensors

    return weights


@pytest.fixture
def ask_server(host):
    """ask_server(path, values) -> (status, content type, body) of the host's own routes under a real HTTP server."""

    def ask(path: str, values: dict) -> tuple[int, str, bytes]:
        async def post():
            app = web.Application()
            app.add_routes([route for route in host.server.routes if route.path == path])
            async with TestClient(TestServer(app)) as client:
                response = await client.post(path, json=values)
                return response.status, response.content_type, await response.read()

        return asyncio.run(post())

    return ask


@pytest.fixture
def host_windows(host):
    """host_windows(model, length, overlap): the MODEL with context windows as the host's own node sets them up."""
    node = host.nodes.NODE_CLASS_MAPPINGS["ContextWindowsManual"]

    def windows(model, length: int, overlap: int):
        return node.execute(
            model,
            context_length=length,
            context_overlap=overlap,
            context_schedule="standard_static",
            context_stride=1,
            closed_loop=False,
            fuse_method="pyramid",
            dim=0,
            freenoise=False,
            causal_window_fix=False,
        ).args[0]

    return windows


@pytest.fixture
def assert_clean(host):
    """`with assert_clean(model): ...` fails if the ModelPatcher is not bit for bit what it was before.

    Compares, after everything is unloaded (which ejects injected modules): weights, module tree, overridden
    forwards, patches and model options.
    """

    def state(model):
        host.comfy.model_management.unload_all_models()
        inner = model.model
        return {
            "weights": {name: tensor.detach().clone() for name, tensor in inner.state_dict().items()},
            "modules": [(name, type(module), id(module)) for name, module in inner.named_modules()],
            "forwards": [name for name, module in inner.named_modules() if "forward" in vars(module)],
            "hooks": [
                name for name, module in inner.named_modules() if module._forward_hooks or module._forward_pre_hooks
            ],
            "options": _outline(model.model_options),
            "patches": sorted(model.patches),
            "object patches": sorted(model.object_patches),
            "injections": sorted(model.injections),
            "additional models": sorted(model.additional_models),
            "wrappers": _outline(model.wrappers),
            "callbacks": _outline(model.callbacks),
        }

    @contextmanager
    def clean(model):
        before = state(model)
        yield
        after = state(model)
        weights, expected = after.pop("weights"), before.pop("weights")
        assert list(weights) == list(expected), "the model's tensors have other names"
        changed = [name for name in expected if not torch.equal(weights[name], expected[name])]
        assert not changed, f"{len(changed)} weights changed, first {changed[0]}"
        for part in before:
            assert after[part] == before[part], f"the model's {part} changed"

    return clean


def _outline(value):
    """Nested dicts and lists with every other object as its identity."""
    if isinstance(value, dict):
        return {key: _outline(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_outline(item) for item in value]
    return value if isinstance(value, str | int | float | None) else id(value)


def stock_control_net(path):
    """The ControlNet of a `HostPath` as one of the host's loaders gives it: no range of ours. The host takes a second
    patcher around one module, left behind by a test, for a memory leak; so both share theirs."""
    control_net = path.comfy.controlnet.ControlNet.copy(path.control_net)
    control_net.preprocess_image = path.comfy.controlnet.ControlBase().preprocess_image
    return control_net
