"""Key maps: counts of the published models, layouts there and back, numbers that do not fit."""

import ml_dtypes
import numpy as np
import pytest

from latentdiff.checkpoints.diffusers import key_map
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.key_map import Entry, as_dtype, cast, count_parameters

SD1_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": (320, 640, 1280, 1280),
    "blocks_per_level": 2,
    "attention": (True, True, True, False),
    "heads": (8, 8, 8, 8),
    "transformer_depth": (1, 1, 1, 1),
    "context_dim": 768,
    "dense_projection": False,
    "groups": 32,
    "norm_epsilon": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_attention": True,
}
SD2_UNET = {**SD1_UNET, "heads": (5, 10, 20, 20), "context_dim": 1024, "dense_projection": True}
AUTOENCODER = {
    "channels": (128, 256, 512, 512),
    "blocks_per_level": 2,
    "latent_channels": 4,
    "image_channels": 3,
    "groups": 32,
    "norm_epsilon": 1e-6,
    "scaling_factor": 0.18215,
    "shift_factor": 0.0,
    "mid_attention": True,
}
CLIP_L = {
    "vocabulary_size": 49408,
    "context_length": 77,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "mlp_width": 3072,
    "activation": "quick_gelu",
    "norm_epsilon": 1e-5,
}
CLIP_H = {**CLIP_L, "width": 1024, "depth": 23, "heads": 16, "mlp_width": 4096, "activation": "gelu"}
PUBLISHED = [
    ("unet", SD1_UNET, 859_520_964, 686),
    ("unet", SD2_UNET, 865_910_724, 686),
    ("autoencoder", AUTOENCODER, 83_653_863, 248),
    ("text_encoder", CLIP_L, 123_060_480, 196),
    ("text_encoder", CLIP_H, 340_387_840, 372),
]


@pytest.mark.parametrize(("kind", "config", "parameters", "tensors"), PUBLISHED)
def test_published_models_have_their_published_sizes(kind, config, parameters, tensors):
    entries = key_map(kind, config)
    assert (count_parameters(entries), len(entries)) == (parameters, tensors)


def test_halves_of_the_autoencoder_have_their_published_sizes():
    entries = key_map("autoencoder", AUTOENCODER)
    assert count_parameters([e for e in entries if e.path.startswith("encoder/")]) == 34_163_664
    assert count_parameters([e for e in entries if e.path.startswith("decoder/")]) == 49_490_199


@pytest.mark.parametrize(("kind", "config", "parameters", "tensors"), PUBLISHED)
def test_paths_and_keys_are_unique(kind, config, parameters, tensors):
    entries = key_map(kind, config)
    keys = [key for entry in entries for key in entry.keys]
    assert len({entry.path for entry in entries}) == len(entries)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("kind", "config", "key", "path", "foreign_shape", "shape"),
    [
        ("unet", SD1_UNET, "conv_in.weight", "conv_in/kernel", (320, 4, 3, 3), (3, 3, 4, 320)),
        ("unet", SD1_UNET, "time_embedding.linear_1.weight", "time_mlp_1/kernel", (1280, 320), (320, 1280)),
        (
            "unet",
            SD1_UNET,
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
            "down_2_attention_1/block_0/cross_attention/key/kernel",
            (1280, 768),
            (768, 1280),
        ),
        (
            "unet",
            SD1_UNET,
            "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
            "up_1_attention_0/block_0/geglu/kernel",
            (10240, 1280),
            (1280, 10240),
        ),
        (
            "unet",
            SD1_UNET,
            "up_blocks.3.resnets.0.conv1.weight",
            "up_3_resnet_0/conv_1/kernel",
            (320, 960, 3, 3),
            (3, 3, 960, 320),
        ),
        (
            "unet",
            SD1_UNET,
            "mid_block.attentions.0.proj_in.weight",
            "mid_attention/proj_in/kernel",
            (1280, 1280, 1, 1),
            (),
        ),
        ("unet", SD2_UNET, "mid_block.attentions.0.proj_in.weight", "mid_attention/proj_in/kernel", (1280, 1280), ()),
        (
            "autoencoder",
            AUTOENCODER,
            "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
            "decoder/up_2_resnet_0/skip/kernel",
            (256, 512, 1, 1),
            (1, 1, 512, 256),
        ),
        ("autoencoder", AUTOENCODER, "quant_conv.weight", "encoder/quant_conv/kernel", (8, 8, 1, 1), (1, 1, 8, 8)),
        (
            "text_encoder",
            CLIP_L,
            "text_model.encoder.layers.11.mlp.fc2.weight",
            "layer_11/mlp_2/kernel",
            (768, 3072),
            (3072, 768),
        ),
    ],
)
def test_keys_lead_to_their_variables(kind, config, key, path, foreign_shape, shape):
    (entry,) = [entry for entry in key_map(kind, config) if entry.keys[0] == key]
    assert (entry.path, entry.foreign_shape) == (path, foreign_shape)
    assert entry.shape == (shape or foreign_shape[2:] + foreign_shape[1::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("layout", "foreign_shape", "axes"),
    [
        ("conv", (5, 4, 3, 2), (2, 3, 1, 0)),
        ("conv", (5, 4, 1, 1), (2, 3, 1, 0)),
        ("conv", (150, 3, 2, 1), (2, 3, 1, 0)),
        ("dense", (5, 4), (1, 0)),
        ("dense", (150, 4), (1, 0)),
        ("same", (150,), (0,)),
    ],
)
def test_layouts_are_transpositions_and_come_back(layout, foreign_shape, axes, dtype):
    foreign = np.arange(np.prod(foreign_shape)).reshape(foreign_shape).astype(dtype)
    ours = foreign.transpose(axes)
    entry = Entry("x", ("x",), layout, ours.shape)
    result = entry.from_foreign(foreign)
    assert result.flags.c_contiguous
    assert result.dtype == dtype
    assert np.array_equal(result, ours)
    assert not np.shares_memory(result, foreign)  # a file's bytes can be read, and not written
    half = entry.from_foreign(foreign, np.dtype("float16"))
    assert half.dtype == np.float16
    assert np.array_equal(half, ours.astype("float16"))
    assert entry.foreign_shape == foreign_shape
    assert np.array_equal(entry.to_foreign(result), foreign)


def test_dense_kernel_and_pointwise_convolution_stand_for_each_other():
    foreign = np.arange(20.0).reshape(5, 4)
    dense, conv = Entry("x", ("x",), "dense", (4, 5)), Entry("x", ("x",), "conv", (1, 1, 4, 5))
    for entry in (dense, conv):
        for stored in (foreign, foreign[:, :, None, None]):
            assert entry.fits(stored.shape)
            assert np.array_equal(entry.from_foreign(stored), foreign.T.reshape(entry.shape))
        assert not entry.fits((4, 5))
        assert not entry.fits((5, 4, 1))
        assert not entry.fits((5, 4, 3, 3))
    assert not Entry("x", ("x",), "conv", (3, 3, 4, 5)).fits((5, 4))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32", "float64"])
def test_casting_rounds_as_numpy_does(stored, target):
    values = np.array([0.0, -0.0, 1 / 3, -2.5, 1000.0, 6e-5]).astype(stored)
    result = cast(values, as_dtype(target), "x")
    assert result.dtype == as_dtype(target)
    assert np.array_equal(result, values.astype(as_dtype(target)))


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_every_half_becomes_what_numpy_makes_of_it(target):
    halves = np.arange(2**16, dtype="uint16").view(np.float16)
    finite = halves[np.isfinite(halves)]
    result = cast(finite, as_dtype(target), "x")
    assert len(result) == 63488
    bits = f"u{result.itemsize}"
    assert np.array_equal(result.view(bits), finite.astype(as_dtype(target)).view(bits))
    for one in halves[~np.isfinite(halves)]:
        with pytest.raises(CheckpointError, match="NaN or infinity in x"):
            cast(np.array([[1, one]]), as_dtype(target), "x")


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("same", (5,)), ("dense", (2400, 130)), ("dense", (7, 5)), ("conv", (3, 3, 300, 130)), ("conv", (1, 1, 7, 5))],
)
def test_arrays_begin_where_frameworks_take_them_over(layout, shape):
    entry = Entry("x", ("x",), layout, shape)
    foreign = np.arange(np.prod(shape)).reshape(entry.foreign_shape).astype("float32")
    array = entry.from_foreign(foreign)
    assert array.ctypes.data % 64 == 0 and array.flags.writeable
    axes = {"same": (0,), "dense": (1, 0), "conv": (2, 3, 1, 0)}[layout]
    assert np.array_equal(array, foreign.transpose(axes))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
def test_numbers_that_are_not_finite_are_refused_by_name(stored, bad, target):
    values = np.zeros((3, 4), stored)
    values[1, 2] = bad
    with pytest.raises(CheckpointError, match="NaN or infinity in the tensor"):
        cast(values, as_dtype(target), "the tensor")


@pytest.mark.parametrize("shape", [(2**18 + 1,), (150, 4)])
def test_one_number_among_many_is_refused_by_name(shape):
    values = np.zeros(shape, "float32")
    values.reshape(-1)[-1] = np.nan
    entry = Entry("x", ("x",), "same" if len(shape) == 1 else "dense", shape[::-1])
    with pytest.raises(CheckpointError, match="NaN or infinity in the tensor"):
        entry.from_foreign(values, np.dtype("float16"), "the tensor")


def test_number_too_large_for_the_dtype_is_refused_by_name():
    with pytest.raises(CheckpointError, match="must fit float16. Received: 70000 in the tensor"):
        cast(np.array([1.0, -70000.0], np.float32), as_dtype("float16"), "the tensor")


@pytest.mark.parametrize("dtype", ["int8", "float8", np.int32])
def test_unknown_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype"):
        as_dtype(dtype)
