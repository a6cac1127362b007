"""Outputs of the authors' code, and the core's and ComfyUI's own beside them."""
