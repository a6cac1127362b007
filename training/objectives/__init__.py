"""What the networks are trained on: the denoising step, losses, and the autoencoder's start values."""
