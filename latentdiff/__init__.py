"""Latent diffusion in Keras 3: a prompt goes in, a picture comes out."""

__version__ = "0.1.0"
