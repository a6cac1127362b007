"""DiffPortrait3D for ComfyUI: consistent novel views of a head from one portrait."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
