"""Muon by its definition, in float64: the five steps of Newton and Schulz on the whole matrix.

Reference: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_models import numbers, to_numpy

from latentdiff.training.muon import KernelMuon

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalised(matrix):
    x = matrix.astype("float64")
    x = x.T if len(x) > len(x.T) else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (3, 3, 20, 32), (1, 1, 48, 16)])
@pytest.mark.parametrize("rank", [None, 5])
def test_update_is_that_of_the_definition(shape, rank):
    x = numbers(*shape, seed=1).reshape(-1, shape[-1])
    if rank:
        x = numbers(len(x), rank, seed=2) @ numbers(rank, shape[-1], seed=3)
    found = to_numpy(KernelMuon().zeropower_via_newtonschulz5(ops.convert_to_tensor(x.reshape(shape)), 5))
    assert found.shape == shape
    np.testing.assert_allclose(found.reshape(x.shape), orthogonalised(x), atol=2e-4)


def test_update_of_bfloat16_stays_small():
    """Of few singular values, whose Gram matrix would be rounded to an indefinite one."""
    x = numbers(576, 5, seed=2) @ numbers(5, 64, seed=3)
    found = KernelMuon().zeropower_via_newtonschulz5(ops.cast(x, "bfloat16"), 5)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert 0.5 < np.linalg.norm(to_numpy(ops.cast(found, "float32")), 2) < 1.5


def test_no_gradient_is_no_update():
    assert not to_numpy(KernelMuon().zeropower_via_newtonschulz5(ops.zeros((24, 40)), 5)).any()


def variable(name, *shape):
    return keras.Variable(numbers(*shape, seed=4), name=name)


def test_kernels_are_muons_and_the_rest_adamws():
    optimizer = KernelMuon()
    matrices = [variable("kernel", 3, 3, 16, 16), variable("matrix", 24, 40)]
    rest = [variable("bias", 16), variable("conv_in", 3, 3, 4, 32), variable("token_embeddings", 24, 40)]
    optimizer.build(matrices + rest)
    assert [velocity is not None for velocity in optimizer.adam_velocities] == [False, False, True, True, True]


def test_kernels_first_update_is_the_definitions_as_large_as_adamws():
    kernel = variable("kernel", 3, 3, 16, 32)
    before, gradient = to_numpy(kernel).copy(), numbers(3, 3, 16, 32, seed=5)
    KernelMuon(0.01, weight_decay=0.0).apply([ops.convert_to_tensor(gradient)], [kernel])
    expected = 0.01 * 0.2 * np.sqrt(9 * 16) * orthogonalised(gradient.reshape(-1, 32)).reshape(gradient.shape)
    np.testing.assert_allclose(before - to_numpy(kernel), expected, atol=2e-5)
