"""The generator: known answers, independence, normality, and the same numbers on both backends."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from latentdiff.diffusion.noise import normal, random_bits, split_seeds, threefry_2x32

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63 - 1]

# Random123's `kat_vectors`, threefry 2 32 20: counter, key, answer.
KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


def words(values):
    return tuple(ops.convert_to_tensor(np.array([value], dtype=np.uint32)) for value in values)


def array(tensor):
    return ops.convert_to_numpy(tensor)


def compiled(function):
    """The function as the backend of this process compiles it."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_threefry_gives_the_known_answers_of_random123(counter, key, answer):
    a, b = threefry_2x32(words(key), words(counter))
    assert (int(array(a)[0]), int(array(b)[0])) == answer


def test_bits_are_threefry_of_the_seed_and_of_position_and_step():
    bits = array(random_bits([0x0370734413198A2E % 2**63], 0x85A308D3, 2))
    assert bits.dtype == np.uint32 and bits.shape == (1, 2, 2)
    expected = threefry_2x32(words((0x13198A2E, 0x03707344)), words((1, 0x85A308D3)))
    np.testing.assert_array_equal(bits[0, 1], [array(word)[0] for word in expected])


def test_split_seeds_gives_the_low_word_and_the_high_word():
    np.testing.assert_array_equal(
        split_seeds(SEEDS),
        np.array([[0, 0], [1, 0], [0xFFFFFFFF, 0], [0, 1], [0xFFFFFFFF, 0x7FFFFFFF]], dtype=np.uint32),
    )


def test_normals_are_box_muller_of_the_bits():
    bits = array(random_bits([7], 3, 500)).astype(np.uint64)[0]
    uniform = (bits[:, 0] // 256 + 1) / 2.0**24
    angle = 2 * np.pi * (bits[:, 1] // 256) / 2.0**24 - np.pi
    radius = np.sqrt(-2 * np.log(uniform))
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)
    np.testing.assert_allclose(array(normal([7], 3, (1000,)))[0], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 4), (16000,), (64, 128), (3, 5), (1,)])
def test_noise_of_an_image_does_not_depend_on_its_batch(shape):
    together = array(normal(SEEDS, 4, shape))
    assert together.shape == (len(SEEDS), *shape) and together.dtype == np.float32
    for i, seed in enumerate(SEEDS):
        np.testing.assert_array_equal(array(normal([seed], 4, shape))[0], together[i])


def test_noise_depends_on_the_position_and_not_on_the_shape():
    long = array(normal([5], 1, (101,)))[0]
    np.testing.assert_array_equal(array(normal([5], 1, (7, 9)))[0].reshape(-1), long[:63])


def test_seeds_may_be_integers_words_or_tensors():
    seeds = [3, 2**31 - 1]
    expected = array(normal(seeds, 2, (4, 3)))
    for form in (
        split_seeds(seeds),
        ops.convert_to_tensor(split_seeds(seeds)),
        np.array(seeds),
        ops.convert_to_tensor(np.array(seeds, dtype=np.int32)),
    ):
        np.testing.assert_array_equal(array(normal(form, 2, (4, 3))), expected)


def test_a_tensor_of_64_bit_seeds_keeps_its_high_words():
    expected = array(normal(SEEDS, 1, (9,)))
    if keras.backend.backend() == "jax":
        import jax

        with jax.enable_x64(True):
            noise = array(normal(jax.numpy.array(SEEDS, dtype="int64"), 1, (9,)))
    else:
        import tensorflow as tf

        noise = array(normal(tf.constant(SEEDS, tf.int64), 1, (9,)))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise, expected, rtol=0, atol=1e-6)


def test_step_and_seeds_may_be_traced():
    function = compiled(lambda seeds, step: normal(seeds, step, (8, 8, 4)))
    for seeds, step in (([0, 5], 0), ([2**40, 9], 12)):
        traced = array(function(ops.convert_to_tensor(split_seeds(seeds)), ops.convert_to_tensor(step, "int32")))
        np.testing.assert_allclose(traced, array(normal(seeds, step, (8, 8, 4))), atol=1e-6)


def test_smallest_uniform_gives_a_finite_normal(monkeypatch):
    from latentdiff.diffusion import noise

    def extreme_bits(seeds, step, pairs):
        return ops.convert_to_tensor(np.array([[[0, 2**31], [2**32 - 1, 0]]], dtype=np.uint32))

    monkeypatch.setattr(noise, "random_bits", extreme_bits)
    # sqrt(2 * 24 * log 2), the largest there is, and sqrt(0).
    np.testing.assert_allclose(array(normal([0], 0, (4,)))[0], [5.768108, 0.0, 0.0, 0.0], atol=1e-5)


def test_noise_is_normal():
    x = array(normal(range(64), 0, (16384,))).astype(np.float64)  # 2**20 values: a standard error of 2**-10
    error = 2.0**-10
    assert abs(x.mean()) < 4 * error
    assert abs(x.var() - 1) < 4 * np.sqrt(2) * error
    assert abs((x**3).mean()) < 4 * np.sqrt(15) * error
    assert abs((x**4).mean() - 3) < 4 * np.sqrt(96) * error
    for bound, probability in ((-2.0, 0.0227501), (-1.0, 0.1586553), (0.5, 0.6914625), (3.0, 0.9986501)):
        spread = np.sqrt(probability * (1 - probability)) * error
        assert abs((x < bound).mean() - probability) < 4 * spread


def test_seeds_steps_and_neighbours_are_uncorrelated():
    count = 2**14
    streams = np.concatenate([array(normal([0, 1, 2**32, 2**62], step, (count,))) for step in (0, 1, 2)])
    streams = streams.astype(np.float64)
    off_diagonal = np.corrcoef(streams)[~np.eye(len(streams), dtype=bool)]
    assert np.abs(off_diagonal).max() < 4.5 / np.sqrt(count)
    squares = np.corrcoef(streams**2)[~np.eye(len(streams), dtype=bool)]
    assert np.abs(squares).max() < 4.5 / np.sqrt(count)
    for lag in (1, 2, 64):
        correlation = (streams[:, lag:] * streams[:, :-lag]).mean()
        assert abs(correlation) < 4.5 / np.sqrt(streams[:, lag:].size)


OTHER_BACKEND = """
import sys
import numpy as np
from keras import ops
from latentdiff.diffusion.noise import normal, random_bits
seeds = [0, 1, 2**32 - 1, 2**32, 2**63 - 1]
np.savez(
    sys.argv[1],
    bits=ops.convert_to_numpy(random_bits(seeds, 3, 4096)),
    normals=ops.convert_to_numpy(normal(seeds, 3, (64, 64, 16))),
)
"""


def test_the_other_backend_gives_the_same_bits_and_normals_within_a_millionth(tmp_path):
    other = "tensorflow" if keras.backend.backend() == "jax" else "jax"
    path = tmp_path / "other.npz"
    environment = {**os.environ, "KERAS_BACKEND": other, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", OTHER_BACKEND, str(path)], env=environment, check=True, capture_output=True)
    theirs = np.load(path)
    np.testing.assert_array_equal(array(random_bits(SEEDS, 3, 4096)), theirs["bits"])
    np.testing.assert_allclose(array(normal(SEEDS, 3, (64, 64, 16))), theirs["normals"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"0 \.\. 2\*\*63 - 1"):
        split_seeds([seed])
    with pytest.raises(ValueError, match=r"0 \.\. 2\*\*63 - 1"):
        normal([1, seed], 0, (2,))


@pytest.mark.parametrize("seed", [0.5, "1", True, None])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(TypeError, match="must be an integer"):
        split_seeds([seed])


def test_seeds_of_a_wrong_shape_or_dtype_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 2\) or \(B,\)"):
        normal(np.zeros((2, 3), np.uint32), 0, (2,))
    with pytest.raises(TypeError, match="must be uint32"):
        normal([[1, 2]], 0, (2,))
    with pytest.raises(TypeError, match="must be integers"):
        normal(ops.zeros((2,), "float32"), 0, (2,))


def test_a_step_that_is_negative_or_no_integer_is_refused():
    with pytest.raises(ValueError, match="`step` must lie in"):
        normal([1], -1, (2,))
    with pytest.raises(TypeError):
        normal([1], 0.5, (2,))
    with pytest.raises(TypeError, match="`step` must be an integer"):
        normal([1], ops.ones((), "float32"), (2,))


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="must hold"):
        normal([1], 0, (0, 4))
