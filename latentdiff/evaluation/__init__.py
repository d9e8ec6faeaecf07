"""What a model is worth, by its kind: an autoencoder, a CLIP pair, or a pipeline of latent diffusion."""

from latentdiff.evaluation.pictures import Pictures, pictures_of_run, pictures_of_sources
from latentdiff.evaluation.report import Drawing, evaluate

__all__ = ["Drawing", "Pictures", "evaluate", "pictures_of_run", "pictures_of_sources"]
