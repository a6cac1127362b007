"""What adapts the host's own things: files, images, loaded models, the live view. Hooks into a run are in `patches`."""
