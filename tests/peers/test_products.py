"""The products that the profile times in both libraries are the same products."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import profile  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_computes_the_same_products(dtype):
    import tensorflow as tf

    def function(x):
        y = tf.nn.conv2d(x, tf.ones((3, 3, 4, 6), dtype), 1, "SAME")
        y = tf.nn.conv2d(tf.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0))), tf.ones((3, 3, 6, 8), dtype), 2, "VALID")
        y = tf.nn.conv2d(y, tf.ones((1, 1, 8, 8), dtype), 1, "SAME")
        rows = tf.matmul(tf.reshape(y, (-1, 8)), tf.ones((5, 8), dtype), transpose_b=True)
        scores = tf.reshape(rows, (2, -1, 5))
        return tf.matmul(scores, scores, transpose_b=True) @ scores

    graph = tf.function(function).get_concrete_function(tf.TensorSpec((2, 6, 8, 4), dtype)).graph
    products = profile.products(graph)
    assert len(products) == 6
    rng = np.random.default_rng(0)
    for product in products:
        arrays = [rng.standard_normal(tensor.shape.as_list(), "float32") for tensor in product.inputs]
        ours = tf.cast(profile.in_tensorflow(product, arrays)(), "float32").numpy()
        theirs = profile.in_torch(product, arrays)().float()
        theirs = (theirs.permute(0, 2, 3, 1) if product.type == "Conv2D" else theirs).numpy()
        np.testing.assert_allclose(theirs, ours, rtol=1e-5 if dtype == "float32" else 2**-7, atol=1e-5)
