"""Order of examples: shuffles are permutations, epochs visit everything, buckets are the nearest, draws are uniform."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.data import full_buckets, make_buckets, names_side, nearest_buckets
from latentdiff.data.draws import draw, integers, normal, shuffled, uniform
from latentdiff.data.order import Order

SEEDS = st.integers(-(2**63), 2**64)


@given(count=st.integers(1, 400), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_shuffle_is_a_permutation(count, seed, epoch):
    assert sorted(shuffled(np.arange(count), count, seed, epoch)) == list(range(count))


@given(count=st.integers(1, 10**12), seed=SEEDS, data=st.data())
@settings(max_examples=30)
def test_shuffle_of_some_places_is_that_of_all(count, seed, data):
    places = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5)))
    together = shuffled(places, count, seed, 1)
    assert [int(shuffled(place, count, seed, 1)) for place in places] == together.tolist()
    assert (0 <= together).all() and (together < count).all()


def test_every_place_is_as_likely():
    # 8 x 8 counts of 2,000 shuffles: each is binomial with mean 250 and deviation 14.8.
    orders = np.stack([shuffled(np.arange(8), 8, seed, 0) for seed in range(2000)])
    counts = np.stack([np.bincount(column, minlength=8) for column in orders.T])
    assert np.abs(counts - 250).max() < 5 * 14.8
    assert ((counts - 250) ** 2 / 250).sum() < 100  # chi-squared of 49 degrees: less in 99.998 % of cases


def test_neighbouring_keys_share_nothing():
    first = shuffled(np.arange(1000), 1000, 0, 0)
    for other in (shuffled(np.arange(1000), 1000, 0, 1), shuffled(np.arange(1000), 1000, 1, 0)):
        assert np.count_nonzero(first == other) < 10  # one is expected
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.15


def test_bits_are_those_of_splitmix64():
    # Java's SplittableRandom and Vigna's splitmix64.c give this first output for the seed 0.
    assert int(draw(0)) == 0xE220A8397B1DCDAF


def test_numbers_are_uniform_and_normal():
    u = uniform(3, 1, np.arange(100_000))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    x = normal((300, 301), 4, 2).astype("float64")
    assert [round(float((x**k).mean()), 1) for k in (1, 2, 3, 4)] == [0.0, 1.0, 0.0, 3.0]
    assert set(integers(3, 0, np.arange(100)).tolist()) == {0, 1, 2}


@st.composite
def bucketed(draw):
    sizes = draw(st.lists(st.integers(1, 23), min_size=1, max_size=4))
    buckets = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(buckets), draw(st.integers(1, len(buckets)))


@given(bucketed=bucketed(), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_each_example_once(bucketed, seed):
    buckets, batch_size = bucketed
    order = Order(buckets, batch_size, seed)
    epochs = 4
    seen = np.zeros(len(buckets), int)
    for step in range(order.first_step(epochs)):
        bucket, rows = order.at(step)
        assert len(rows) == batch_size and (buckets[rows] == bucket).all()
        np.add.at(seen, rows, 1)
    # At an epoch's end a bucket has less than a batch outstanding, which comes first in the next.
    assert (seen <= epochs).all()
    for bucket in np.unique(buckets):
        assert (epochs - seen[buckets == bucket]).sum() < batch_size


@given(count=st.integers(1, 60), batch_size=st.integers(1, 60), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_stream_is_a_permutation_after_the_other(count, batch_size, seed):
    batch_size = min(batch_size, count)
    order = Order(np.zeros(count, int), batch_size, seed)
    stream = np.concatenate([order.at(step)[1] for step in range(-(-3 * count // batch_size))])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(bucketed=bucketed(), epoch=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_epochs_follow_one_another_without_a_gap(bucketed, epoch):
    order = Order(bucketed[0], bucketed[1], 0)
    for step in range(order.first_step(epoch), order.first_step(epoch + 1)):
        assert order.epoch_of(step) == epoch
    # A bucket's own batches come in the order of its stream, so no step shows another's.
    assert order.first_step(epoch + 1) - order.first_step(epoch) >= 1 or bucketed[1] > 1


def test_batches_of_different_buckets_are_mixed():
    order = Order(np.repeat([0, 1], 400), 8, 0)
    turns = [order.at(step)[0] for step in range(100)]
    assert turns.count(0) == turns.count(1) == 50
    assert 30 < np.count_nonzero(np.diff(turns)) < 70


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        np.concatenate([Order(np.zeros(64, int), 8, seed).at(e * 8 + i)[1] for i in range(8)]).tolist()
        for seed in (0, 1)
        for e in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_batch_is_at_most_the_set():
    with pytest.raises(
        ValueError, match=r"`batch_size` must be from 1 to the number of examples\. Received: batch_size=3"
    ):
        Order(np.zeros(2, int), 3, 0)


@given(size=st.integers(1, 24), multiple=st.sampled_from([1, 8, 64]), max_ratio=st.floats(1, 4))
def test_buckets_are_within_the_area_and_the_ratio(size, multiple, max_ratio):
    buckets = make_buckets(size * multiple, multiple, max_ratio)
    assert (size * multiple,) * 2 in buckets
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert height * width <= (size * multiple) ** 2
        assert max(height, width) <= max_ratio * min(height, width)
        assert (width, height) in buckets
        # No larger bucket: one more multiple on the longer side would pass the area.
        assert min(height, width) * (max(height, width) + multiple) > (size * multiple) ** 2
    assert len(set(buckets)) == len(buckets)


@pytest.mark.parametrize(("arguments", "rule"), [((500, 64), "`size`"), ((512, 64, 0.5), "`max_ratio`")])
def test_buckets_want_whole_multiples(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        make_buckets(*arguments)


@given(sides=st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=20))
def test_bucket_of_a_picture_minimises_the_log_ratios_distance(sides):
    buckets = make_buckets(512, 64)
    heights, widths = zip(*sides, strict=True)
    for (h, w), chosen in zip(sides, nearest_buckets(heights, widths, buckets), strict=True):
        distances = [abs(np.log(w / h) - np.log(width / height)) for height, width in buckets]
        assert distances[chosen] <= min(distances) + 1e-12


def test_buckets_that_fill_no_batch_are_given_up():
    buckets = [(64, 32), (32, 32), (32, 64)]
    heights, widths = np.array([64] * 1 + [32] * 6 + [32] * 3), np.array([32] * 1 + [32] * 6 + [64] * 3)
    assert full_buckets(heights, widths, buckets, 1).tolist() == [0] + [1] * 6 + [2] * 3
    assert full_buckets(heights, widths, buckets, 3).tolist() == [1] * 7 + [2] * 3
    assert full_buckets(heights, widths, buckets, 4).tolist() == [1] * 10
    assert full_buckets(heights, widths, buckets, 99).tolist() == [1] * 10


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat", False),
        ("a Left-facing fist", True),
        ("arrow_RIGHT", True),
        ("RIGHTS of man, a bright copyright", False),
        ("leftovers", False),
        ("", False),
    ],
)
def test_words_of_sides_are_seen_as_words(caption, expected):
    assert names_side(caption) is expected
    assert names_side(caption + " map", ["map"])
