"""What a model is worth: how well pictures come back, the loss by t, and whether a prompt gives its own picture."""

from latentdiff.evaluation.report import evaluate

__all__ = ["evaluate"]
