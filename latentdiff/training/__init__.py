"""What `fit` trains, and what keeps a run of it.

The autoencoder, the CLIP pair and latent diffusion are each a Keras model over the networks it trains, whose `compile`
and `fit` are the ordinary ones; the weights stay in the networks, to be saved from there.
"""

from latentdiff.training.autoencoder import AutoencoderTraining
from latentdiff.training.checkpoint import Checkpoint, KeepFreedMemory
from latentdiff.training.clip import CLIPTraining
from latentdiff.training.diffusion import DiffusionTraining

__all__ = ["AutoencoderTraining", "CLIPTraining", "Checkpoint", "DiffusionTraining", "KeepFreedMemory"]
