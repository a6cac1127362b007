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

import importlib.abc
import importlib.machinery
import sys
from contextlib import contextmanager

_libraries = []  # torch.library.Library undefines its operators when it is collected


def _torch_is_cpu_only() -> bool:
    import torch

    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


@contextmanager
def _torchvision_schemas():
    """Declare the operators whose shape functions torchvision registers at import."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    yield


@contextmanager
def _torchaudio_without_libraries():
    """Hide torchaudio/lib while the package imports, so that it falls back to Python."""
    import pathlib

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


class _PreparedLoader(importlib.abc.Loader):
    def __init__(self, loader, preparation):
        self._loader, self._preparation = loader, preparation

    def __getattr__(self, name):  # resource readers and source inspection ask the real loader
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        if not _torch_is_cpu_only():
            return self._loader.exec_module(module)
        with self._preparation():
            return self._loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _PREPARATIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _PreparedLoader(spec.loader, _PREPARATIONS[fullname])
        return spec


def install() -> None:
    """Install the finder once; later calls do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
