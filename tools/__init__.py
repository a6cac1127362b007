"""Command-line helpers around the pack: set-up, the ComfyUI host, the demo. No artist needs it."""
