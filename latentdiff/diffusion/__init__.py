"""The mathematics of diffusion: no networks, no images; plain arrays of any shape (B, ...)."""
