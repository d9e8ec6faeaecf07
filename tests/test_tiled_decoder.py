"""Decoding in strips: the whole's numbers, for any height and width and however the strips fall."""

import keras
import numpy as np
import pytest
from tiny_models import AUTOENCODER, PICTURE, make, numbers, relative_error, run

import latentdiff as ld
from latentdiff import pipeline
from latentdiff.backend import Compiled, to_numpy
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.tiled_decoder import TiledDecoder

LATENT = (2, 7, 5, 4)  # of seven rows, which three do not divide
AUTOENCODERS = {
    "three_levels": {**AUTOENCODER, "channels": (4, 8, 8)},
    "one_level": {**AUTOENCODER, "channels": (8,)},
    "shifted": {**AUTOENCODER, "scaling_factor": 0.5, "shift_factor": 0.25, "mid_attention": False},
}


def latents():
    """Whose lower half is far from the upper, so that no strip has the statistics of the whole."""
    return numbers(*LATENT) * np.linspace(0.1, 5, LATENT[1], dtype="float32")[:, None, None] + np.float32(1)


def grey_levels(image):
    return np.clip(np.round((np.asarray(image, "float32") + 1) * 127.5), 0, 255)


def whole(autoencoder):
    return to_numpy(run(autoencoder.decode, latents(), model=autoencoder), "float32")


@pytest.fixture(scope="module")
def autoencoder():
    return make(Autoencoder, AUTOENCODERS["three_levels"])


@pytest.fixture(scope="module")
def by_rows(autoencoder):
    """Seven strips, and three of which the last one has two rows too many."""
    return {rows: TiledDecoder(autoencoder, rows) for rows in (1, 3)}


@pytest.mark.parametrize("rows", [1, 3])
def test_strips_make_the_whole_picture(rows, by_rows, autoencoder):
    image = by_rows[rows](latents())
    assert image.dtype == np.float32
    assert relative_error(image, whole(autoencoder)) < 1e-5
    assert np.ptp(grey_levels(image)) > 100


@pytest.mark.parametrize("config", ["one_level", "shifted"])
def test_strips_of_other_autoencoders_make_the_whole_picture(config):
    autoencoder = make(Autoencoder, AUTOENCODERS[config])
    assert relative_error(TiledDecoder(autoencoder, 3)(latents()), whole(autoencoder)) < 1e-5


def test_strips_in_bfloat16_are_as_near_to_float32_as_the_whole(autoencoder):
    rounded = make(Autoencoder, AUTOENCODERS["three_levels"], dtype="bfloat16")
    exact, single = whole(autoencoder), whole(rounded)
    tiled = TiledDecoder(rounded, 3)(latents())
    assert np.abs(tiled - exact).mean() < 1.1 * np.abs(single - exact).mean()
    difference = np.abs(grey_levels(tiled) - grey_levels(single))
    assert difference.mean() < 0.5
    assert (difference > 2).mean() < 1e-2 and difference.max() <= 4


@pytest.mark.parametrize(("size", "rows", "width"), [((7, 5), 3, 8), ((91, 75), 46, 64)])
def test_strips_in_bfloat16_are_the_whole_picture_within_two_grey_levels(size, rows, width):
    """The larger one by fused passes, on TensorFlow, over rows that are longer than what XLA sums at a time."""
    rounded = make(Autoencoder, {**AUTOENCODER, "channels": (width, width)}, dtype="bfloat16")
    latent = numbers(1, *size, 4) * np.linspace(0.1, 5, size[0], dtype="float32")[:, None, None]
    single = grey_levels(to_numpy(Compiled(rounded.decode, [rounded])(latent), "float32"))
    difference = np.abs(grey_levels(TiledDecoder(rounded, rows)(latent)) - single)
    if keras.backend.backend() == "tensorflow":
        assert (difference > 0).mean() < 1e-4 and difference.max() <= 2
    else:  # XLA keeps float32 between operations that it fuses, which are others in strips
        assert difference.max() <= 4 and (difference > 2).mean() < 1e-3
    assert np.ptp(single) > 100


def test_tiles_with_their_own_statistics_would_not_do(autoencoder):
    """What the tests above can see: the upper rows decoded alone are another picture, far from the cut too."""
    upper = to_numpy(run(autoencoder.decode, latents()[:, :4], model=autoencoder))
    difference = np.abs(grey_levels(upper) - grey_levels(whole(autoencoder)[:, :16]))
    assert difference[:, 0].mean() > 5


def test_every_layer_is_traced_once_however_many_strips_there_are(by_rows):
    for tiled in by_rows.values():
        tiled(latents())
    few, many = by_rows[3], by_rows[1]
    assert few.traces == many.traces > 0
    before = many.traces
    many(-latents())
    assert many.traces == before
    many(latents()[:, :6])  # strips of the same size: the part at the latent's own alone
    assert many.traces == before + 1


def test_weights_are_those_of_the_call():
    autoencoder = make(Autoencoder, AUTOENCODERS["one_level"])
    tiled = TiledDecoder(autoencoder, 3)
    tiled(latents())
    bias = autoencoder.decoder.get_layer("conv_out").bias
    bias.assign(bias + 1)
    assert relative_error(tiled(latents()), whole(autoencoder)) < 1e-5


def test_pictures_in_strips_are_the_whole_ones(tiny_pipe):
    arguments = {"prompt": ["a red heart", "the cat"], "num_steps": 1, "seed": 5, "progress": False}
    tiled = tiny_pipe.generate(**arguments, tiled=True)
    assert tiled.shape == (2, *PICTURE) and tiled.dtype == np.uint8
    assert np.abs(tiled.astype(int) - tiny_pipe.generate(**arguments, tiled=False)).max() <= 1


@pytest.mark.parametrize(("pixels", "expected"), [(8 * 12, "whole"), (8 * 12 - 1, "strips")])
def test_strips_begin_beyond_so_many_pixels(pixels, expected, tiny_pipe, monkeypatch):
    used = []
    monkeypatch.setattr(pipeline, "WHOLE", pixels)
    image = np.zeros((2, *PICTURE))
    monkeypatch.setattr(tiny_pipe, "_decode", lambda latent: used.append("whole") or image)
    monkeypatch.setattr(tiny_pipe, "_decode_tiled", lambda latent: used.append("strips") or image)
    tiny_pipe.generate("a cat", num_images=2, num_steps=1, progress=False)
    assert used == [expected]


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "2"])
def test_rows_are_a_positive_number(rows, autoencoder):
    with pytest.raises(ValueError, match=f"`rows` must be a whole number, at least 1. Received: rows={rows!r}."):
        ld.TiledDecoder(autoencoder, rows)
