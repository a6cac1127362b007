"""Run the real ComfyUI inside this process: boot it, load this pack as the host does, execute workflows.

For tests and for measurements that need the host's objects (ModelPatcher, sampler) and real tracebacks.
A process can hold one host only.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from pathlib import Path
from types import ModuleType

from tools.host import PACK, PACK_NAME, ToolError, exit_status, find_host, link_pack


@dataclass
class WorkflowResult:
    """What a finished workflow left behind.

    outputs: node id -> what the node sent to the frontend (e.g. {"images": [{"filename": ...}]})
    values: node id -> list of the node's output values, for every executed node
    messages: (event, data) pairs in the order in which they were sent
    """

    outputs: dict[str, dict]
    values: dict[str, list]
    messages: list[tuple[str, dict]] = field(repr=False)


@dataclass
class EmbeddedHost:
    """The booted host. `nodes`, `execution`, `folder_paths`, `comfy` are its own modules."""

    path: Path
    base_directory: Path
    loop: asyncio.AbstractEventLoop
    server: object
    nodes: ModuleType
    execution: ModuleType
    folder_paths: ModuleType
    comfy: ModuleType

    def load_pack(self, source: Path = PACK, name: str = PACK_NAME) -> ModuleType:
        """Link `source` into custom_nodes under `name` and load it through the host's own loader.

        Raises:
            ToolError: the host refused the pack; the message holds what the host logged.
        """
        folder = link_pack(self.base_directory, source, name)
        known = set(self.nodes.NODE_CLASS_MAPPINGS)
        with _captured_warnings() as warnings:
            loaded = self.loop.run_until_complete(
                self.nodes.load_custom_node(str(folder), known, module_parent="custom_nodes")
            )
        if not loaded:
            said = "\n".join(record.getMessage() for record in warnings)
            raise ToolError(f"ComfyUI refused the pack {folder}:\n{said}")
        package = str(folder).replace(".", "_x_")  # the host's name for it in sys.modules
        module = sys.modules[package]
        for part in ("diffportrait3d", "host", "patches", "nodes"):
            if (source / part).is_dir():
                importlib.import_module(f"{package}.{part}")
        return module

    def run_workflow(self, prompt: dict, executor=None) -> WorkflowResult:
        """Validate and execute a workflow in API format, as POST /prompt does.

        Args:
            prompt: node id -> {"class_type": ..., "inputs": {...}}
            executor: from `new_executor`, to keep its cache between runs; default: a fresh one

        Raises:
            ToolError: validation failed for any output, or a node raised (its exception is `__cause__`).
        """
        executor = executor or self.new_executor()
        prompt_id = str(uuid.uuid4())
        checked = asyncio.run(self.execution.validate_prompt(prompt_id, prompt, None))
        valid, error, outputs, node_errors = checked
        # The host runs a workflow when a single output is valid; here every one must be.
        if not valid or node_errors:
            details = json.dumps(node_errors, default=str)
            raise ToolError(f"ComfyUI refused the workflow: {error} {details}")
        executor.error = None
        executor.execute(prompt, prompt_id, {}, outputs)
        if not executor.success:
            _, details = executor.status_messages[-1]
            node = f"{details['node_type']} (node {details['node_id']})"
            message = details.get("exception_message", "interrupted").strip()
            raise ToolError(f"{node}: {message}") from executor.error
        values = asyncio.run(_cached_values(executor, prompt))
        return WorkflowResult(executor.history_result["outputs"], values, list(executor.status_messages))

    def new_executor(self):
        """A PromptExecutor with an empty classic cache that remembers the exception of a failed node."""
        execution = self.execution

        class Executor(execution.PromptExecutor):
            error = None

            def handle_execution_error(self, prompt_id, prompt, current_outputs, executed, error, ex):
                self.error = ex
                super().handle_execution_error(prompt_id, prompt, current_outputs, executed, error, ex)

        cache_args = {"lru": 0, "ram": 0, "ram_inactive": 0}
        return Executor(self.server, cache_type=execution.CacheType.CLASSIC, cache_args=cache_args)


@contextmanager
def temporary_host(**settings) -> Iterator[EmbeddedHost]:
    """`boot` with these settings in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="diffportrait3d-host-") as folder:
        yield boot(Path(folder), **settings)


def nodes_command(act: Callable[[dict[str, dict]], str]) -> int:
    """A command around `act`, which is given `pack_nodes` of a host that is booted for it and says what it has done."""

    def work() -> None:
        with temporary_host() as host:
            print(act(pack_nodes(host.load_pack())))

    return exit_status(work)


def pack_nodes(pack: ModuleType) -> dict[str, dict]:
    """Node id -> a node of the loaded pack as /object_info describes it."""
    nodes = [node for family in pack.nodes.FAMILIES for node in family.NODES]
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in nodes}


def boot(base_directory: Path, cpu: bool = True, options: Sequence[str] = (), as_program: bool = False) -> EmbeddedHost:
    """Import ComfyUI with all its stock nodes and no custom ones. No port is opened.

    Args:
        base_directory: an empty folder for the host's models, input, output, user and custom_nodes
        cpu: run on the CPU even where there is a GPU
        options: more of ComfyUI's own command line
        as_program: set up what its main.py sets up, too: dynamic VRAM, the allocator

    Raises:
        ToolError: no host (see tools/host.py), or another module hides one of its modules.
    """
    path = find_host()
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base_directory / name).mkdir(parents=True, exist_ok=True)
    sys.path[:] = [str(path), *(entry for entry in sys.path if Path(entry or os.curdir).resolve() != PACK)]
    stock = ("--use-pytorch-cross-attention", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")
    _parse_options(["--base-directory", str(base_directory), *stock, *["--cpu"] * cpu, *options])
    if as_program:
        importlib.import_module("cuda_malloc")  # before torch knows its devices
        importlib.import_module("main")

    import comfy.model_management
    import comfy.sample
    import execution
    import folder_paths
    import server

    import nodes

    if not Path(nodes.__file__).resolve().is_relative_to(path):
        raise ToolError(f"`import nodes` gave {nodes.__file__}, not ComfyUI's: take its folder off sys.path.")
    loop = asyncio.new_event_loop()
    prompt_server = server.PromptServer(loop)
    with _captured_warnings():
        loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return EmbeddedHost(path, base_directory, loop, prompt_server, nodes, execution, folder_paths, comfy)


def _parse_options(options: list[str]) -> None:
    """ComfyUI reads sys.argv when comfy.cli_args is imported, once for the process."""
    if "comfy.cli_args" in sys.modules:
        raise ToolError("ComfyUI was already imported in this process: boot() must come first.")
    import comfy.options

    arguments, sys.argv = sys.argv, ["main.py", *options]
    try:
        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401
    finally:
        sys.argv = arguments


@contextmanager
def _captured_warnings():
    """Collect the records of WARNING and above in the buffer of a handler, and keep them off the terminal."""
    root, collector = logging.getLogger(), BufferingHandler(capacity=sys.maxsize)
    collector.setLevel(logging.WARNING)
    handlers, root.handlers = root.handlers, [collector]
    try:
        yield collector.buffer
    finally:
        root.handlers = handlers


async def _cached_values(executor, prompt: dict) -> dict[str, list]:
    values = {}
    for node_id in prompt:
        entry = await executor.caches.outputs.get(node_id)
        if entry is not None:
            # One list per output slot, one item per execution of a list-mapped node: nearly always one.
            values[node_id] = [slot[0] if len(slot) == 1 else slot for slot in entry.outputs]
    return values
