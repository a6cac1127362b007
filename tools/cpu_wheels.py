"""Import torchvision and torchaudio beside a CPU build of torch.

Package indexes serve both as CUDA builds. Their compiled parts cannot load without torch's CUDA libraries,
and both packages give up at import because of it, although ComfyUI uses only their Python parts on a CPU.
`install()` puts a finder in front of the import system that prepares torch right before either package runs:

* torchvision registers shape functions for its operators `nms` and `qnms`; their schemas are declared for it.
* torchaudio looks for its shared libraries with `Path.glob` and does without those that it does not find.

Does nothing where torch was built with CUDA. Does not import torch by itself. The set-up (`tools/bootstrap.py`) has
every Python of `.venv` call it at its start; nothing else has to.
"""

from __future__ import annotations

import pathlib
import sys
from contextlib import contextmanager, nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

_libraries = []  # torch.library.Library undefines its operators when it is collected


def _torch_is_cpu_only() -> bool:
    import torch

    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


@contextmanager
def _torchvision_schemas():
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    yield


@contextmanager
def _torchaudio_without_libraries():
    """Hide torchaudio/lib while the package imports, so that it falls back to Python."""
    original = pathlib.Path.glob

    def glob(path, pattern, *args, **kwargs):
        if path.parts[-2:] == ("torchaudio", "lib"):
            return iter(())
        return original(path, pattern, *args, **kwargs)

    pathlib.Path.glob = glob
    try:
        yield
    finally:
        pathlib.Path.glob = original


_PREPARATIONS = {"torchvision": _torchvision_schemas, "torchaudio": _torchaudio_without_libraries}


class _PreparedLoader(SourceFileLoader):
    def exec_module(self, module):
        with _PREPARATIONS[module.__name__]() if _torch_is_cpu_only() else nullcontext():
            super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        spec = PathFinder.find_spec(fullname, path) if fullname in _PREPARATIONS else None
        if spec is not None:
            spec.loader = _PreparedLoader(fullname, spec.origin)
        return spec


def install() -> None:
    """Install the finder once; later calls do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
