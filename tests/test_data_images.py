"""Batches of pictures: functions of (seed, step) alone, whoever reads them and from where a run goes on."""

import hashlib
import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny_models
from data_sets import encoded, pixels, write_folder, write_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import to_numpy

from latentdiff.data import BrokenPicture, CaptionedImages, OrderWarning, images, index_source, to_tf_dataset
from latentdiff.data.decode import decode_crop
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.training import AutoencoderTraining

SIZES = ((12, 16), (16, 12), (20, 20))
BUCKETS = [(8, 8), (8, 12), (12, 8)]


def count_characters(captions):
    """A tokenizer: int32 (B, 2)."""
    return np.array([[len(caption), sum(map(ord, caption))] for caption in captions], "int32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("pictures"), 30, SIZES)
    rows = [{"file_name": f"{i:03}.png", "text": [f"picture {i}", f"{i} to the left"]} for i in range(30)]
    write_metadata(folder, rows)
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return index_source(folder)


def make(index, **changes):
    arguments = {"batch_size": 4, "buckets": BUCKETS, "seed": 5, "flip": True, "steps": 20}
    return CaptionedImages(index, **{**arguments, **changes})


def same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])


def digest(batches):
    contents = hashlib.sha256()
    for batch in batches:
        contents.update(batch["image"].tobytes() + batch["tokens"].tobytes())
    return contents.hexdigest()


def test_batches_have_their_shapes_and_ranges(index):
    batches = make(index, tokenizer=count_characters)
    shapes = set()
    for step in range(20):
        batch = batches.batch_at(step)
        assert batch["image"].dtype == np.float32 and batch["tokens"].dtype == np.int32
        assert batch["image"].min() >= -1 and batch["image"].max() <= 1
        assert batch["tokens"].shape == (4, 2)
        shapes.add(batch["image"].shape)
    assert shapes == {(4, *bucket, 3) for bucket in BUCKETS}


def test_values_are_the_pixels_from_minus_one_to_one(index):
    batches = CaptionedImages(index.select([2]), 1, buckets=[(20, 20)], crop="centre")
    np.testing.assert_allclose(batches.batch_at(0)["image"][0], pixels(2, 20, 20) / 127.5 - 1, atol=1e-6)
    assert batches.batch_at(0)["text"][0] in index[2].captions


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from test_data_images import count_characters, digest, make
from latentdiff.data import index_source
batches = make(index_source({folder!r}), tokenizer=count_characters)
print(digest(batches.batch_at(step) for step in (17, 3)))
"""


@pytest.mark.slow
def test_another_process_makes_the_same_batches(index, folder):
    batches = make(index, tokenizer=count_characters)
    program = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(folder))
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.split()[-1] == digest(batches.batch_at(step) for step in (17, 3))


@pytest.mark.parametrize(("threads", "ahead"), [(0, 0), (1, 1), (5, 3)])
def test_reading_ahead_changes_nothing(index, threads, ahead):
    batches, plain = make(index, threads=threads, ahead=ahead), make(index)
    for place in (0, 1, 0, 1, 2, 3):  # as Keras looks at two before it begins
        same(batches[place][0], plain.batch_at(place))
    batches.close()
    same(batches[0][0], plain.batch_at(0))
    batches.close()


def test_reading_ahead_ends_where_it_is_told(index, monkeypatch):

    read = []
    monkeypatch.setattr(images, "read_picture", lambda example: read.append(example.name) or encoded(pixels(0)))
    batches = make(index, threads=2, ahead=2, steps=9)
    for place in range(9):
        batches[place]
    assert len(read) == 9 * 4
    read.clear()
    begun = make(index, threads=2, ahead=2, steps=9)
    begun[0]
    begun.close()
    assert 4 <= len(read) <= 4 * 3


@pytest.mark.parametrize("first_step", [1, 7, 19])
def test_a_run_goes_on_as_if_it_had_not_stopped(index, first_step):
    resumed, whole = make(index, first_step=first_step), make(index)
    assert len(resumed) == 20 - first_step
    for place in range(min(3, len(resumed))):
        same(resumed[place][0], whole.batch_at(first_step + place))
    resumed.close()


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_slices_of_the_processes_make_the_global_batch(index, num_shards):
    whole = make(index)
    parts = [make(index, shard_index=i, num_shards=num_shards) for i in range(num_shards)]
    for step in range(5):
        batches = [part.batch_at(step) for part in parts]
        same({n: np.concatenate([b[n] for b in batches]) for n in batches[0]}, whole.batch_at(step))


def test_seed_chooses_rows_crops_flips_and_captions(index):
    batches = make(index)
    mine, other = batches.plan_at(3), make(index, seed=6).plan_at(3)
    assert mine.captions != other.captions
    assert not np.array_equal(mine.places, other.places)
    plans = [batches.plan_at(step) for step in range(20)]
    assert len({tuple(plan.places.ravel()) for plan in plans}) == 20


def test_pictures_are_mirrored_where_the_chosen_caption_names_no_side(index):
    batches, everywhere = make(index), make(index, side_words=[])
    plans = [batches.plan_at(step) for step in range(400)]
    captions = np.array([caption for plan in plans for caption in plan.captions])
    flips = np.concatenate([plan.flips for plan in plans])
    sided = np.array(["left" in caption for caption in captions])
    assert not flips[sided].any()
    assert abs(flips[~sided].mean() - 0.5) < 0.1  # 800 draws: five deviations are 0.09
    assert abs(sided.mean() - 0.5) < 0.07
    never = make(index, flip=False)
    assert not any(never.plan_at(step).flips.any() for step in range(9))
    flips = np.concatenate([everywhere.plan_at(step).flips for step in range(100)])
    assert abs(flips.mean() - 0.5) < 0.13


def test_mirrored_crop_is_the_crop_mirrored():
    content = encoded(pixels(0))
    crop = decode_crop(content, (6, 8), (0.2, 0.9), False)
    np.testing.assert_array_equal(decode_crop(content, (6, 8), (0.2, 0.9), True), crop[:, ::-1])


@given(place=st.tuples(st.floats(0, 1), st.floats(0, 1)), zoom=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_crop_without_resizing_is_a_part_of_the_picture(place, zoom):
    image = pixels(1, 24, 20)
    height, width = (24 // zoom, 16 // zoom) if zoom == 2 else (24, 16)
    crop = decode_crop(encoded(image), (height, width), place, zoom=zoom)
    y, x = round(place[0] * (24 - height)), round(place[1] * (20 - width))
    np.testing.assert_array_equal(crop, image[y : y + height, x : x + width])


def test_resized_crop_is_the_crop_of_the_resized():
    image = pixels(3, 30, 60)
    resized = np.asarray(Image.fromarray(image).resize((40, 20), Image.Resampling.LANCZOS)).astype(int)
    crop = decode_crop(encoded(image), (20, 20), (0.5, 0.25)).astype(int)
    assert np.abs(crop - resized[:, 5:25]).max() <= 1


def test_sideways_pictures_are_turned_upright(tmp_path):
    image = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], 3, 2).repeat(16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    (tmp_path / "a.txt").write_text("x")
    (example,) = index_source(tmp_path)
    assert (example.height, example.width) == (16, 24)
    crop = decode_crop((tmp_path / "a.jpg").read_bytes(), (16, 24)).astype(int)
    assert (np.diff(crop[8, :, 0]) < 0).mean() > 0.8  # the top, which is dark, is now at the right


def test_transparency_becomes_white():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 4), [200, 0, 0, 0], np.uint8)).save(file, "PNG")
    assert (decode_crop(file.getvalue(), (4, 4)) == 255).all()


def test_large_jpeg_is_decoded_small_to_the_same_picture():
    ramp = np.linspace(0, 255, 800, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=-1)
    ours = decode_crop(encoded(image, "JPEG", quality=95), (50, 50)).astype(int)
    theirs = np.asarray(Image.fromarray(image).resize((50, 50), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(ours - theirs).max() <= 4


def test_file_that_changed_since_is_named(index, tmp_path):
    write_folder(tmp_path, 1)
    batches = CaptionedImages(index_source(tmp_path), 1, buckets=[(8, 8)])
    (tmp_path / "000.png").write_bytes(b"changed")
    for _ in range(2):
        with pytest.raises(BrokenPicture, match="000.png was a picture when it was indexed, and is none now: no PNG"):
            batches[0]
    write_folder(tmp_path, 1)
    same(batches[0][0], batches.batch_at(0))
    batches.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": "middle"},
        {"zoom": 0.5},
        {"num_shards": 3},
        {"shard_index": 1},
        {"first_step": 20},
        {"first_step": -1},
        {"batch_size": 31},
    ],
)
def test_arguments_are_checked(index, changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=rf"must be .*Received: (.*, )?{name}="):
        make(index, **changes)


class Toy(keras.Model):
    """Learns the mean of the pictures; adds up what it is shown."""

    def __init__(self):
        super().__init__()
        self.mean = self.add_weight(shape=(3,), name="mean", initializer="zeros")
        self.built = True

    def call(self, batch):
        return keras.ops.mean(batch["image"], axis=(1, 2)) - self.mean

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y_pred))


def fitted(batches):
    toy = Toy()
    toy.compile(optimizer=keras.optimizers.SGD(0.5), run_eagerly=True)
    toy.fit(batches, shuffle=False, verbose=0)
    return to_numpy(toy.mean)


def test_fit_takes_them_in_their_order(index):
    mean = np.zeros(3)
    arguments = {"captions": False, "buckets": [(8, 8)], "steps": 5}
    batches = make(index, **arguments)
    for step in range(5):
        image = batches.batch_at(step)["image"].mean(axis=(1, 2))
        mean += 0.5 * 2 * (image - mean).mean(axis=0) / 3
    np.testing.assert_allclose(fitted(batches), mean, rtol=1e-4)
    batches.close()


def test_shuffled_steps_are_warned_of(index):
    batches = make(index, threads=0)
    batches[0], batches[1], batches[0], batches[1], batches[2]
    with pytest.warns(OrderWarning, match="Call `fit` with shuffle=False"):
        batches[7]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's own")
def test_tf_datasets_have_several_sizes(index):
    batches = make(index, tokenizer=count_characters, steps=12)
    dataset = to_tf_dataset(batches)
    assert dataset.cardinality() == 12
    assert dataset.options().autotune.enabled is False  # its thread sleeps through the end of an epoch
    shapes = set()
    for step, batch in enumerate(dataset.as_numpy_iterator()):
        same(batch, batches.batch_at(step))
        shapes.add(batch["image"].shape)
    assert len(shapes) == 3
    np.testing.assert_allclose(fitted(to_tf_dataset(batches)), fitted(to_tf_dataset(batches)))
    with pytest.raises(ValueError, match="reach `fit` through `latentdiff.data.to_tf_dataset`"):
        fitted(batches)
    batches.close()


def own_threads():
    """Python's; TensorFlow's that have called Python are dummies to it."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("Dummy")}


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere Keras reads them itself")
def test_trainings_read_several_sizes(index):
    batches, checked = make(index, captions=False, steps=6), make(index, captions=False, steps=3)
    config = {"channels": (4,), "blocks_per_level": 1, "groups": 2, "mid_attention": False}
    training = AutoencoderTraining(tiny_models.make(Autoencoder, config, latent_channels=2))
    training.compile(optimizer=keras.optimizers.SGD(1e-3), run_eagerly=True)
    threads = own_threads()
    history = training.fit(batches, validation_data=checked, shuffle=False, verbose=0).history
    assert int(training.steps) == 6 and len({batches.batch_at(k)["image"].shape for k in range(6)}) > 1
    said = training.evaluate(checked, verbose=0, return_dict=True)
    np.testing.assert_allclose(history["val_loss"], said["loss"], rtol=1e-4)
    until = time.monotonic() + 30
    while not own_threads() <= threads and time.monotonic() < until:
        time.sleep(0.05)
    assert own_threads() <= threads  # the readers have gone, at their own pace


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's own")
def test_tf_datasets_leave_open_what_two_batches_do_not_share(index):
    lengths = iter((5, 6, 5, 6, 7, 4))
    batches = make(index, buckets=[(8, 8)], steps=4, tokenizer=lambda prompts: np.zeros((4, next(lengths)), "int32"))
    dataset = to_tf_dataset(batches)
    assert dataset.element_spec["tokens"].shape.as_list() == [4, None]
    assert dataset.element_spec["image"].shape == (4, 8, 8, 3)
    assert len(list(dataset)) == 4


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's own")
def test_tf_datasets_have_text(index):
    batch = next(iter(to_tf_dataset(make(index)).as_numpy_iterator()))
    assert [text.decode() for text in batch["text"]] == make(index).plan_at(0).captions
