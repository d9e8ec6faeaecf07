"""A pipeline as other programs take it: one TensorFlow SavedModel of the whole arrow, or its networks alone."""

from latentdiff.export.networks import check_format, export_networks
from latentdiff.export.saved_model import export_saved_model

__all__ = ["check_format", "export_networks", "export_saved_model"]
