"""The whole arrow as one TensorFlow SavedModel, its tokenizer in the graph."""

from latentdiff.export.saved_model import export_saved_model

__all__ = ["export_saved_model"]
