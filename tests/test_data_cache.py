"""The cache of latents and contexts: what networks say, kept; never read when stale; made on from where it stopped."""

import shutil

import keras
import numpy as np
import pytest
import tiny_models
from data_sets import write_folder, write_metadata
from tiny_models import make, to_numpy

from latentdiff.data import Cache, CachedLatents, StaleCacheError, index_source, make_cache, read_picture
from latentdiff.data.decode import decode_crop
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer

BUCKETS = [(8, 8), (8, 12)]
AUTOENCODER = {"channels": (4, 4), "blocks_per_level": 1, "groups": 2, "mid_attention": False, "latent_channels": 2}


class ToyAutoencoder:
    """One convolution for an encoder: what a cache asks of an autoencoder, and traced in no time."""

    def __init__(self, seed=0, **config):
        image = keras.Input((None, None, 3))
        self.encoder = keras.Model(image, keras.layers.Conv2D(4, 2, 2)(image))
        self.kernel, self.bias = tiny_models.numbers(2, 2, 3, 4, seed=seed), tiny_models.numbers(4, seed=seed)
        self.encoder.set_weights([self.kernel, self.bias])
        self.config = config

    def moments(self, image):
        return keras.ops.split(self.encoder(image), 2, axis=-1)

    def get_config(self):
        return {**self.config, "name": "toy", "dtype": "float32"}

    def reference(self, image):
        """By NumPy: (H, W, 3) -> (h, w, 4)."""
        height, width, _ = image.shape
        blocks = image.reshape(height // 2, 2, width // 2, 2, 3).astype("float64")
        return np.einsum("hiwjc,ijcd->hwd", blocks, self.kernel) + self.bias


def toy_text_encoder(seed=0):
    """A table of contexts: int (B, S) -> (B, S, 8)."""
    tokens = keras.Input((16,), dtype="int32")
    network = keras.Model(tokens, keras.layers.Embedding(624, 8, name="tokens")(tokens))
    network.set_weights([tiny_models.numbers(624, 8, seed=seed)])
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("pictures"), 7, ((12, 12), (12, 18)))
    rows = [{"file_name": f"{i:03}.png", "text": [f"picture {i}", "heart"][: 1 + i % 2]} for i in range(7)]
    write_metadata(folder, rows)
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return index_source(folder)


@pytest.fixture(scope="module")
def autoencoder():
    return ToyAutoencoder(scaling_factor=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_directory(tiny_models.TOKENIZER, context_length=16)


@pytest.fixture(scope="module")
def text_encoder():
    return toy_text_encoder()


@pytest.fixture(scope="module", autouse=True)
def short_shards():
    """Three rows a shard, so that seven pictures fill several."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("latentdiff.data.cache", "latentdiff.data.making"):
            patch.setattr(f"{module}.SHARD_LENGTH", 3)
        yield


@pytest.fixture
def cached(index, autoencoder, tokenizer, tmp_path):
    """Makes, or opens, the cache of the test."""
    arguments = {"buckets": BUCKETS, "tokenizer": tokenizer, "batch_size": 2}

    def cached(index=index, autoencoder=autoencoder, **changes):
        return make_cache(tmp_path / "cache", index, autoencoder, **{**arguments, **changes})

    return cached


@pytest.fixture(scope="module")
def moments(index, autoencoder):
    """What the encoder says of each picture: mean and log variance, side by side."""
    crops = [decode_crop(read_picture(e), BUCKETS[i % 2]).astype("float32") / 127.5 - 1 for i, e in enumerate(index)]
    return [autoencoder.reference(crop) for crop in crops]


def files(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.directory.iterdir()}


def test_latents_are_the_encoders_means(cached, moments, index, tokenizer):
    cache = cached()
    assert len(cache) == 7 and cache.buckets.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for row in range(7):
        np.testing.assert_allclose(cache.latents(np.array([row]))[0], moments[row][..., :2], atol=1e-5)
    captions = [caption for example in index for caption in example.captions]
    np.testing.assert_array_equal(cache.texts(np.arange(len(captions))), tokenizer(captions))
    np.testing.assert_array_equal(cache.empty_text(), tokenizer("")[0])
    latents = np.concatenate([each[..., :2].ravel() for each in moments])
    np.testing.assert_allclose(cache.statistics(), [latents.mean(), latents.std()], rtol=1e-4)


def test_networks_of_this_package_fit(cached, index):
    autoencoder = make(Autoencoder, AUTOENCODER)
    text_encoder = make(CLIPTextEncoder, tiny_models.TEXT_ENCODER, context_length=16)
    cache = cached(index.select([0, 2]), autoencoder, text_encoder=text_encoder)
    image = decode_crop(read_picture(index[2]), BUCKETS[0]).astype("float32")[None] / 127.5 - 1
    mean = to_numpy(tiny_models.run(lambda image: autoencoder.encode(image), image, model=autoencoder))
    batch = CachedLatents(cache, 1, scaling_factor=autoencoder.scaling_factor, rows=[1]).batch_at(0)
    np.testing.assert_allclose(batch["latent"], mean, atol=1e-5)
    assert batch["context"].shape == (1, 16, 8)
    again = make(CLIPTextEncoder, tiny_models.TEXT_ENCODER, context_length=16)
    assert files(cached(index.select([0, 2]), make(Autoencoder, AUTOENCODER), text_encoder=again)) == files(cache)


def test_batches_are_scaled_latents_with_one_of_their_captions(cached, moments, index, tokenizer):
    batches = CachedLatents(cached(), 2, scaling_factor=0.5, shift_factor=0.25, seed=1, steps=40)
    seen = set()
    for step in range(40):
        batch = batches.batch_at(step)
        assert batch["latent"].dtype == np.float32 and batch["tokens"].dtype == np.int32
        for latent, tokens in zip(batch["latent"], batch["tokens"], strict=True):
            (row,) = [
                i
                for i, each in enumerate(moments)
                if each.shape[:2] == latent.shape[:2] and np.allclose((each[..., :2] - 0.25) * 0.5, latent, atol=1e-5)
            ]
            (caption,) = [c for c in index[row].captions if (tokenizer(c)[0] == tokens).all()]
            seen.add((row, caption))
    assert seen == {(row, caption) for row, example in enumerate(index) for caption in example.captions}


def test_draws_from_the_posterior_have_its_mean_and_variance(cached, moments):
    batches = CachedLatents(cached(moments=True), 1, scaling_factor=2.0, rows=[3], steps=400)
    draws = np.stack([batches.batch_at(step)["latent"][0] for step in range(400)])
    mean, log_variance = np.split(moments[3].astype("float64"), 2, axis=-1)
    deviation = 2 * np.exp(0.5 * log_variance)
    assert np.abs((draws.mean(axis=0) - 2 * mean) / deviation * np.sqrt(400)).max() < 5
    assert np.abs(draws.var(axis=0) / deviation**2 - 1).max() < 5 * np.sqrt(2 / 400)
    np.testing.assert_array_equal(draws[17], batches.batch_at(17)["latent"][0])


def test_every_other_picture_is_mirrored_whose_caption_names_no_side(cached, index, autoencoder, tokenizer):
    cache = cached(flip=True, moments=True, side_words={"heart"})
    assert cache.flip and len(list(cache.directory.glob("mirrored-*.npy"))) == 3
    for row, example in enumerate(index):
        turned = decode_crop(read_picture(example), BUCKETS[row % 2])[:, ::-1].astype("float32") / 127.5 - 1
        kept = cache.latents(np.array([row]), np.array([True]))[0]
        np.testing.assert_allclose(kept, autoencoder.reference(turned), atol=1e-5)
    cache = cached(flip=True, side_words={"heart"}, overwrite=True)
    batches = CachedLatents(cache, 3, scaling_factor=1.0, seed=1, steps=60)
    heart = tokenizer("heart")[0]
    mirrored, sided = [], 0
    for step in range(60):
        rows = batches.order.at(step)[1]
        batch = batches.batch_at(step)
        plain, other = (cache.latents(rows, np.full(3, flip)) for flip in (False, True))
        for i in range(3):
            if (batch["tokens"][i] == heart).all():
                np.testing.assert_array_equal(batch["latent"][i], plain[i])
                sided += 1
            else:
                mirrored.append((batch["latent"][i] == other[i]).all())
                assert mirrored[-1] or (batch["latent"][i] == plain[i]).all()
    assert sided > 20 and 0.35 < np.mean(mirrored) < 0.65
    halves = [CachedLatents(cache, 6, scaling_factor=1.0, steps=4, shard_index=i, num_shards=2) for i in (0, 1)]
    whole = CachedLatents(cache, 6, scaling_factor=1.0, steps=4)
    both = np.concatenate([half.batch_at(3)["latent"] for half in halves])
    np.testing.assert_array_equal(both, whole.batch_at(3)["latent"])


def test_contexts_are_the_text_encoders(cached, index, tokenizer, text_encoder):
    cache = cached(text_encoder=text_encoder, dtype="float16")
    captions = [caption for example in index for caption in example.captions]
    context = tiny_models.numbers(624, 8)[tokenizer([*captions, ""])]
    np.testing.assert_allclose(cache.texts(np.arange(len(captions))), context[:-1], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(cache.empty_text(), context[-1], rtol=2e-3, atol=2e-3)
    batch = CachedLatents(cache, 2, scaling_factor=1.0).batch_at(0)
    assert batch["context"].shape == (2, 16, 8) and batch["context"].dtype == np.float32 and "tokens" not in batch


def test_shards_of_processes_and_resumed_runs_are_the_same_batches(cached):
    cache = cached()
    arguments = {"scaling_factor": 1.0, "seed": 3, "steps": 9}
    whole = CachedLatents(cache, 2, **arguments)
    halves = [CachedLatents(cache, 2, shard_index=i, num_shards=2, **arguments) for i in range(2)]
    resumed = CachedLatents(Cache(cache.directory), 2, first_step=5, **arguments)
    for step in range(9):
        for name, array in whole.batch_at(step).items():
            np.testing.assert_array_equal(np.concatenate([half.batch_at(step)[name] for half in halves]), array)
            if step >= 5:
                np.testing.assert_array_equal(resumed[step - 5][0][name], array)


def test_cache_is_made_once(cached):
    before = files(cached())
    assert files(cached()) == before
    assert sorted(before) == [
        "buckets.npy",
        "first_captions.npy",
        *(f"latents-{name}.npy" for name in ("0-00000", "0-00001", "1-00000")),
        "manifest.json",
        *(f"tokens-0000{i}.npy" for i in range(4)),
    ]


def other_weights():
    """As the fixture, but for the last digits of one number."""
    other = ToyAutoencoder(scaling_factor=0.5)
    kernel = other.kernel.copy()
    kernel[0, 0, 0, 0] = np.nextafter(kernel[0, 0, 0, 0], np.float32(9))
    other.encoder.set_weights([kernel, other.bias])
    return other


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("data", lambda index: {"index": index.select([0, 1, 2, 3, 4, 6, 5])}),
        ("autoencoder", lambda index: {"autoencoder": other_weights()}),
        (
            "tokenizer",
            lambda index: {"tokenizer": CLIPTokenizer.from_directory(tiny_models.TOKENIZER)},
        ),
        ("autoencoder", lambda index: {"autoencoder": ToyAutoencoder(norm_epsilon=1e-5)}),
        ("preprocessing", lambda index: {"buckets": [(8, 8), (8, 16)]}),
        ("preprocessing", lambda index: {"moments": True}),
        ("preprocessing", lambda index: {"flip": True}),
        ("preprocessing", lambda index: {"dtype": "float16"}),
        ("preprocessing", lambda index: {"fill": 4}),
    ],
)
def test_stale_cache_is_refused_and_named(part, change, cached, index):
    before = files(cached())
    changes = change(index)
    with pytest.raises(StaleCacheError, match=rf"overwrite=True\. Received: .*, where other is: {part}\."):
        cached(**changes)
    assert files(Cache(cached().directory)) == before
    assert files(cached(**changes, overwrite=True)) != before
    with pytest.raises(StaleCacheError, match=part):
        cached()


def test_text_encoder_and_version_are_parts_too(cached, text_encoder, monkeypatch):
    cached(text_encoder=text_encoder)
    with pytest.raises(StaleCacheError, match="text_encoder"):
        cached(text_encoder=toy_text_encoder(seed=9))
    monkeypatch.setattr("latentdiff.data.cache_key.__version__", "99")
    with pytest.raises(StaleCacheError, match="version"):
        cached(text_encoder=text_encoder)


def test_scaling_is_no_part(cached):
    before = files(cached())
    assert files(cached(autoencoder=ToyAutoencoder(scaling_factor=0.9, shift_factor=0.1))) == before


@pytest.mark.parametrize("kept", [0, 3, 6])
def test_interrupted_making_goes_on_behind_the_last_whole_shard(kept, cached, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(done, total):
        if done > kept:
            raise Killed

    with pytest.raises(Killed):
        cached(progress=kill)
    assert not (tmp_path / "cache").exists()
    making = tmp_path / ".cache.making"
    (making / "latents-0-00001.part").write_bytes(b"half")
    before = {path.name: path.stat().st_mtime_ns for path in making.glob("*.npy")}
    assert len(before) == kept + 1
    cache = cached()
    assert before.items() <= files(cache).items()
    assert not making.exists()
    whole = {name: np.load(cache.directory / f"{name}.npy") for name in cache.manifest["shards"]}
    shutil.rmtree(tmp_path / "cache")
    for name, array in whole.items():
        np.testing.assert_array_equal(np.load(cached().directory / f"{name}.npy"), array)


def test_interrupted_making_of_something_else_begins_anew(cached, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(progress=stop, moments=True)
    (tmp_path / ".cache.making" / "latents-0-00000.npy").write_bytes(b"stale")
    assert cached().latents(np.array([0])).shape == (1, 4, 4, 2)


def test_stale_cache_stays_until_the_new_one_is_whole(cached, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    before = files(cached())
    with pytest.raises(KeyboardInterrupt):
        cached(moments=True, overwrite=True, progress=stop)
    assert files(cached()) == before
    assert cached(moments=True, overwrite=True).moments
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache"]


def test_damaged_shards_are_named(cached):
    cache = cached()
    path = cache.directory / "latents-0-00000.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"as its manifest says\. Received: .*latents-0-00000\.npy"):
        cached()
    path.unlink()
    with pytest.raises(ValueError, match=r"as its manifest says\. Received: .*latents-0-00000\.npy"):
        Cache(cache.directory)


def test_other_directories_are_left_alone(cached, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="A cache has a directory of its own"):
        cached(overwrite=True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"tokenizer": None, "text_encoder": 1}, "`text_encoder` must come"),
    ],
)
def test_arguments_are_checked(changes, rule, cached, tmp_path):
    with pytest.raises(ValueError, match=rule):
        cached(**changes)
    assert list(tmp_path.iterdir()) == []
