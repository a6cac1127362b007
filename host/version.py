"""The oldest ComfyUI that this pack runs in; checked before anything is imported that older ones may lack."""

from __future__ import annotations

OLDEST = "0.30.0"


def check_host_version() -> None:
    """Raises ImportError, which the host shows beside the pack's name, in a ComfyUI before `OLDEST`."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = "older"
    if _numbers(version) < _numbers(OLDEST):
        raise ImportError(f"DiffPortrait3D needs ComfyUI {OLDEST} or newer, and this one is {version}; update ComfyUI.")


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 30, 0) for 0.30.0 and for 0.30.0-3-gabc; (0,) for what is no version."""
    parts = version.split("-")[0].split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in parts)
