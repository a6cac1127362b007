"""How the networks of DiffPortrait3D are hooked into ComfyUI: the only code that knows comfy's internals."""
