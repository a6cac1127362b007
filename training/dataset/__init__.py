"""Multi-view data sets on disk: format, batches of views, latents kept on disk."""
