"""The networks' blocks in NumPy, in float64."""

import math

import numpy as np
from tiny_models import randomize, to_numpy

erf = np.vectorize(math.erf)


def random_weights(layer, *shapes):
    """A built layer with random weights, and they by path, in float64."""
    layer.build(*shapes)
    randomize(layer)
    return layer, {v.path.partition("/")[2]: to_numpy(v).astype("float64") for v in layer.variables}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def group_normalized(x, groups, epsilon, gamma=1.0, beta=0.0):
    grouped = x.astype("float64").reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta


def layer_normalized(x, weights, name, epsilon=1e-5):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return normal * weights[f"{name}/gamma"] + weights[f"{name}/beta"]


def convolved(x, kernel, bias, padding=(1, 1), stride=1):
    x = np.pad(x, ((0, 0), padding, padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel) + bias


def attended(q, k, v, heads, causal=False):
    size = q.shape[-1] // heads
    out = np.zeros_like(q)
    for b in range(len(q)):
        for h in range(heads):
            s = slice(h * size, (h + 1) * size)
            scores = q[b, :, s] @ k[b, :, s].T / math.sqrt(size)
            if causal:
                scores[np.triu_indices_from(scores, 1)] = -np.inf
            out[b, :, s] = softmax(scores) @ v[b, :, s]
    return out


def multi_head(x, context, weights, name, heads, causal=False):
    q, k, v = (
        y @ weights[f"{name}/{part}/kernel"] + weights.get(f"{name}/{part}/bias", 0)
        for part, y in (("query", x), ("key", context), ("value", context))
    )
    return attended(q, k, v, heads, causal) @ weights[f"{name}/out/kernel"] + weights[f"{name}/out/bias"]
