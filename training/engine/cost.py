"""What a step costs: kernels, bytes that they move, FLOPs, and where the host waits; counted without a GPU, too.

Everything is counted where torch hands an operator to its kernel. A kernel of a GPU takes microseconds, so that Python
and the number of kernels often decide how long a step takes. With `compute_below` networks do not even compute:
operators on more elements give empty tensors of the right shape, so that a step at SD1.5's width is counted in seconds
and little memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

GROUPS = {
    "attention": ("scaled_dot_product",),
    "convolutions": ("convolution", "convolution_backward"),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "norms": tuple(f"native_{kind}_norm{way}" for kind in ("group", "layer") for way in ("", "_backward")),
    "copies": ("clone", "copy_", "_to_copy", "cat", "stack", "repeat", "index", "index_select", "fill_", "zero_"),
}
OTHER = "elementwise"
NO_KERNEL = "empty new_empty empty_like _unsafe_view _reshape_alias resize_ detach lift_fresh set_".split()
NO_KERNEL += ["_local_scalar_dense"]
READ_BACK = ("_local_scalar_dense", "nonzero", "equal")  # the host needs the values: it waits for the device
TO_HOST = ("cpu", "numpy", "tolist")
SMALL = 4096  # elements of what is computed also where networks are only counted, as noise levels are
NORMS = (nn.GroupNorm, nn.LayerNorm)
TORCH = str(Path(torch.__file__).parent)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# torch counts the attention kernels of GPUs only.
for target, count in {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}.items():
    if target not in flop_registry:  # this file may be loaded beside that of another checkout
        register_flop_formula(target)(count)


class Cost(NamedTuple):
    """Of one step: operators that run kernels, bytes that they read and write (a cache may spare some), and FLOPs (a
    multiplication and an addition are two)."""

    operators: int
    bytes: int
    flops: int


class StepCounts(TorchDispatchMode):
    """Operators that run kernels, bytes of their tensors, FLOPs, and places where the host waits, while `counting`.

    Under `torch.no_grad` or with gradients: in inference mode composite operators would arrive whole. (torch's
    `FlopCounterMode` puts hooks on every module's inputs, which keep recomputed activations alive.)

    Args:
        compute_below: elements above which operators are not computed; None computes everything.
        networks: whose forward passes that holds for; none means everywhere.

    Attributes:
        kernels, bytes, flops: of each group of operators; views of a tensor are no kernels, and one on a list of
            tensors, such as AdamW's, is one.
        waits: "file:line" -> how often a value was read from the device there, or sent from memory that is not pinned.
    """

    def __init__(self, compute_below: int | None = None, networks: Sequence[nn.Module] = (), counting: bool = True):
        super().__init__()
        self.compute_below, self.counting = compute_below, counting
        self._networks, self._depth, self._hooks = networks, int(not networks), []
        self.kernels, self.bytes, self.flops = Counter[str](), Counter[str](), Counter[str]()
        self.waits = Counter[str]()
        self._reads = _ReadsOnTheHost(self)

    def cost(self) -> Cost:
        return Cost(self.kernels.total(), self.bytes.total(), self.flops.total())

    def __enter__(self):
        for network in self._networks:
            self._hooks.append(network.register_forward_pre_hook(lambda *_: self._deeper(1)))
            self._hooks.append(network.register_forward_hook(lambda *_: self._deeper(-1), always_call=True))
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)
        return self._reads.__exit__(*error)

    def _deeper(self, by: int) -> None:
        self._depth += by

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._computed(func, args, kwargs):
            out = func(*args, **kwargs)
        else:
            out = _without_computing(func, args, kwargs)
        if self.counting:
            self._count(func, args, kwargs, out)
        return out

    def _computed(self, func, args, kwargs) -> bool:
        name = _name(func)
        if self.compute_below is None or self._depth == 0 or func.is_view or name in NO_KERNEL:
            return True
        sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return max(sizes, default=0) <= self.compute_below

    def _count(self, func, args, kwargs, out) -> None:
        name = _name(func)
        if name in READ_BACK or (name in ("_to_copy", "copy_") and _waits(args, kwargs, out)):
            self.waits[caller()] += 1
        if func.is_view or name in NO_KERNEL or func.namespace == "prim":  # what fake tensors ask themselves
            return
        group = next((group for group, names in GROUPS.items() if _belongs(name, names)), OTHER)
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        formula = flop_registry.get(func.overloadpacket)
        self.kernels[group] += 1
        self.bytes[group] += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors.values())
        self.flops[group] += formula(*args, **kwargs, out_val=out) if formula else 0  # torch knows those of no others


class _ReadsOnTheHost(TorchFunctionMode):
    """Tensors taken to the host: on a CPU these calls reach no operator."""

    def __init__(self, counts: StepCounts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.counts.counting and getattr(func, "__name__", "") in TO_HOST:
            self.counts.waits[caller()] += 1
        return func(*args, **kwargs)


def caller() -> str:
    """The innermost line of Python outside of torch and of this file: "folder/file.py:line"."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    if frame is None:
        return "unknown"
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"


def norms_as_on_gpus(network: nn.Module) -> None:
    """Gives norms float32, as autocast does on GPUs; on CPUs they compute in the type of their input. Those that a
    training step has told their type keep it."""
    for layer in network.modules():
        if isinstance(layer, NORMS) and "forward" not in vars(layer):
            layer.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _name(func) -> str:
    return func._schema.name.removeprefix("aten::")


def _belongs(name: str, names: tuple[str, ...]) -> bool:
    return name in names or (names == GROUPS["attention"] and "scaled_dot_product" in name)


def _waits(args, kwargs, out) -> bool:
    """Whether a copy makes the host wait: one to it, or from memory of its own that is not pinned."""
    given = [t for t in args if isinstance(t, Tensor)][-1]
    if given.is_cuda:
        return out.is_cpu
    return out.is_cuda and not given.is_pinned()


def _without_computing(func, args, kwargs) -> Any:
    """Empty tensors as the operator would give them; what it would change in place stays as it is."""
    on_meta = tree_map_only(Tensor, _to_meta, (args, kwargs))
    if "device" in on_meta[1]:
        on_meta[1]["device"] = torch.device("meta")
    made = func(*on_meta[0], **on_meta[1])
    if func._schema.is_mutable:
        changed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return changed[0] if func._schema.returns else None
    return tree_map_only(Tensor, _empty, made)


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _empty(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return made.zero_() if made.numel() <= SMALL else made  # what the host may look at is finite
