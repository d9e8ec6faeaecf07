"""Deep features of the UNet that serve several rows of the sampler: `cache_interval`."""

import functools
import math

import numpy as np
import pytest
import tiny_models
from keras import ops
from tiny_models import LATENT, numbers, relative_error, run, to_numpy

from latentdiff.diffusion.noise import normal, split_seeds
from latentdiff.diffusion.samplers import make_table
from latentdiff.diffusion.schedule import scaled_linear_schedule
from latentdiff.models.unet import UNet
from latentdiff.sampling_run import whole_rows

PROMPTS = ["a red heart", "the cat"]
# Stable Diffusion 1.x's plan, four levels of which the first attends, beside the tiny one.
FOUR_LEVELS = {**tiny_models.UNET, "channels": (4, 4, 8, 8), "attention": (True, True, True, False), "heads": 2}
UNETS = {
    "two_levels": (tiny_models.UNET, "float32"),
    "four_levels": (FOUR_LEVELS, "float32"),
    "plain_outermost": ({**tiny_models.UNET, "attention": (False, True)}, "float32"),
    "bfloat16": (tiny_models.UNET, "bfloat16"),
}


@pytest.fixture(scope="module", params=UNETS)
def unet(request):
    config, dtype = UNETS[request.param]
    return tiny_models.make(UNet, config, dtype=dtype)


@pytest.fixture(scope="module")
def parts(unet):
    return unet.split()


def inputs():
    """Of two latents whose sides are no multiples of the levels' factor."""
    arrays = {"latent": numbers(2, 9, 14, 4), "timestep": np.full(2, 700.0, "float32"), "context": numbers(2, 3, 8)}
    return {name: ops.convert_to_tensor(array) for name, array in arrays.items()}


@functools.cache
def of_arrays(model):
    """A model of a list of inputs, as a function of each."""
    return lambda *arrays: model(list(arrays))


def test_shallow_network_with_the_deep_features_of_the_same_evaluation_is_the_whole(unet, parts):
    bound = 1e-6 if unet.get_layer("conv_in").compute_dtype == "float32" else 0.02
    deep, shallow = map(of_arrays, parts)
    given = inputs()
    expected = ops.cast(run(unet, given), "float32")
    features = run(deep, *given.values(), model=unet)

    def error(features):
        return relative_error(ops.cast(run(shallow, *given.values(), features, model=unet), "float32"), expected)

    assert error(features) < bound
    # Nor is it the whole whatever the features say.
    assert error(2 * features) > 0.05


def test_both_parts_hold_the_networks_own_weights(unet, parts):
    own, deep, shallow = ({id(variable) for variable in model.variables} for model in (unet, *parts))
    assert deep | shallow == own
    assert deep < own and shallow < own


def test_shallow_network_leaves_out_the_way_down_and_the_middle(parts):
    names = {layer.name for layer in parts[1].layers}
    assert {name for name in names if name.startswith(("down", "mid"))} == set()
    assert len([name for name in names if "resnet" in name]) == 1
    assert {"conv_in", "conv_out"} <= names


@pytest.mark.parametrize(
    ("guided", "interval", "expected"),
    [
        ("ggggg", 1, "wwwww"),
        ("ggggg", 2, "w.w.w"),
        ("ggggg", 3, "w..w."),
        ("ggggg", 9, "w...."),
        ("g", 3, "w"),
        # Guidance doubles the batch: a change of it computes the whole, from where the rows are counted again.
        ("cgggg", 3, "ww..w"),
        ("ccggggcc", 3, "w.w..ww."),
        ("cgcg", 2, "wwww"),
    ],
)
def test_whole_rows_are_so_far_apart_and_where_guidance_changes(guided, interval, expected):
    found = whole_rows(np.array([row == "g" for row in guided]), interval)
    assert "".join("w" if row else "." for row in found) == expected


@pytest.fixture
def latent(tiny_pipe):
    """The latents of two prompts in four steps, seeds 5 and 6, unless told otherwise."""

    def call(prompt=PROMPTS, **arguments):
        return tiny_pipe.generate(
            prompt, **{"num_steps": 4, "seed": 5, "progress": False, "output": "latent", **arguments}
        )

    return call


@pytest.fixture
def rows(tiny_pipe, monkeypatch):
    """What was computed since: d the deep features, s a step that takes them, f a full one."""
    computed, step_function, features = [], tiny_pipe.step_function, tiny_pipe._features

    def recorded_step(guided, clip, shallow=False):
        computed.append("s" if shallow else "f")
        return step_function(guided, clip, shallow)

    def recorded_features(*arrays):
        computed.append("d")
        return features(*arrays)

    monkeypatch.setattr(tiny_pipe, "step_function", recorded_step)
    monkeypatch.setattr(tiny_pipe, "_features", recorded_features)
    monkeypatch.setattr(recorded_features, "traces", 0, raising=False)
    return computed


def test_interval_one_is_the_full_model(latent, rows):
    full = latent()
    np.testing.assert_array_equal(latent(cache_interval=1), full)
    assert rows == ["f"] * 8
    assert relative_error(latent(cache_interval=2), full) > 1e-4


@pytest.mark.parametrize(("sampler", "count"), [("ddim", 4), ("heun", 7), ("pndm", 5)])
@pytest.mark.parametrize("interval", [2, 3])
def test_one_row_of_so_many_computes_the_whole(latent, rows, sampler, count, interval):
    latent(sampler=sampler, cache_interval=interval)
    assert rows.count("s") == count
    assert rows.count("d") == math.ceil(count / interval)
    assert "".join(rows).startswith("d" + "s" * interval + "d")


def test_a_run_of_whole_rows_is_the_full_model(latent, rows):
    """Of the levels of 3 steps the middle one alone lies within the interval, so that every row changes the batch."""
    found = latent(num_steps=3, guidance_interval=(0.1, 2), cache_interval=3)
    assert rows == ["d", "s"] * 3
    assert relative_error(found, latent(num_steps=3, guidance_interval=(0.1, 2))) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_two_rows_are_those_of_a_computation_by_hand(tiny_pipe, latent, scale):
    table = make_table("ddim", scaled_linear_schedule(), 2)
    deep, shallow = map(of_arrays, tiny_pipe.unet.split())
    context = run(tiny_pipe.text_encoder, tiny_pipe.tokenizer(PROMPTS))
    nothing = run(tiny_pipe.text_encoder, tiny_pipe.tokenizer(["", ""]))
    both = context if scale == 1 else ops.concatenate([nothing, context])
    x = to_numpy(normal(split_seeds([5, 6]), 0, LATENT))
    state, features = np.stack([x] + 3 * [np.zeros_like(x)]), None
    for i in range(2):
        twice = np.concatenate([state[0]] * (1 if scale == 1 else 2))
        times = np.full(len(twice), table.timestep[i], "float32")
        given = [ops.convert_to_tensor(array) for array in (twice, times, both)]
        if features is None:
            features = run(deep, *given, model=tiny_pipe.unet)
        eps = to_numpy(run(shallow, *given, features, model=tiny_pipe.unet))
        if scale != 1:
            eps = eps[:2] + scale * (eps[2:] - eps[:2])
        x0 = (state[0] - table.noise[i] * eps) / table.signal[i]
        state = np.einsum("sc,c...->s...", table.matrix[i], np.stack([*state, x0, eps, np.zeros_like(x)]))
        state = state.astype("float32")
    assert relative_error(latent(num_steps=2, guidance_scale=scale, cache_interval=2), state[0]) < 1e-4


def test_features_do_not_depend_on_the_batch(latent):
    together = latent(cache_interval=3)
    assert relative_error(latent(cache_interval=3, batch_size=1), together) < 1e-4
    assert relative_error(latent(PROMPTS[1], seed=6, cache_interval=3), together[1:]) < 1e-4


def test_features_are_not_kept_from_run_to_run(latent):
    first = latent(cache_interval=3)
    latent("two dogs", seed=9, cache_interval=3)
    np.testing.assert_array_equal(latent(cache_interval=3), first)


def test_callback_sees_each_row_and_may_stop(latent):
    seen = []
    stopped = latent(cache_interval=3, callback=lambda row, x: seen.append(x) or row < 3)
    assert len(seen) == 3
    np.testing.assert_array_equal(stopped, seen[-1])


def test_reuse_costs_a_trace_for_each_part_and_none_later(tiny_pipe, latent):
    latent()
    latent(guidance_scale=1)
    latent(cache_interval=2)
    latent(cache_interval=2, guidance_scale=1)
    before = tiny_pipe.traces
    latent(cache_interval=4, num_steps=6, guidance_scale=2.0, sampler="dpmpp_2m")
    latent(cache_interval=3, guidance_interval=(0, 2))
    latent(cache_interval=2, sampler="euler_ancestral")
    latent()
    assert tiny_pipe.traces == before
