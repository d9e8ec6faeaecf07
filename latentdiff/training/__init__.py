"""What `fit` trains, and what keeps a run of it.

The autoencoder, the CLIP pair and latent diffusion are each a Keras model over the networks it trains, whose `compile`
and `fit` are the ordinary ones; the weights stay in the networks, to be saved from there.
"""

from latentdiff.training.autoencoder import AutoencoderTraining
from latentdiff.training.clip import CLIPTraining
from latentdiff.training.devices import distributed, join_hosts, rows_here
from latentdiff.training.diffusion import DiffusionTraining
from latentdiff.training.discriminator import PatchDiscriminator
from latentdiff.training.muon import KernelMuon
from latentdiff.training.run import Run
from latentdiff.training.schedules import PerUpdate, WarmupStableDecay

__all__ = [
    "AutoencoderTraining",
    "CLIPTraining",
    "DiffusionTraining",
    "KernelMuon",
    "PatchDiscriminator",
    "PerUpdate",
    "Run",
    "WarmupStableDecay",
    "distributed",
    "join_hosts",
    "rows_here",
]
