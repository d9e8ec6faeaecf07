"""What every training shares: averages by their definition, rates by updates, draws, fixed validation."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_models import numbers, to_numpy
from toy_training import EMPTY, ToyBatches, toy_networks, toy_training

import latentdiff as ld
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.diffusion.schedule import scaled_linear_schedule
from latentdiff.training import DiffusionTraining, PerUpdate, WarmupStableDecay
from latentdiff.training.recipe import REMATERIALIZED
from latentdiff.training.state import read_state, write_state


def batch(k):
    return ToyBatches(0, k + 1)[k][0]


def weights(model):
    return [to_numpy(variable).copy() for variable in model.trainable_variables]


@pytest.mark.parametrize("accumulation", [None, 3])
def test_averages_are_those_of_the_definition(accumulation):
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=accumulation)
    model = toy_training(optimizer=optimizer, ema_decay=0.4)
    model.build()
    every, n, before = accumulation or 1, 0, None
    average = weights(model)
    for k in range(9):
        model.train_on_batch(batch(k))
        if (k + 1) % every == 0:
            n += 1
            decay = min(0.4, (1 + n) / (10 + n))
            average = [decay * a + (1 - decay) * w for a, w in zip(average, weights(model), strict=True)]
        elif before is not None:
            assert all((a == b).all() for a, b in zip(before, weights(model), strict=True))
        before = weights(model)
        for mine, expected in zip(model.averages, average, strict=True):
            np.testing.assert_allclose(to_numpy(mine), expected, rtol=1e-5, atol=1e-7)
    assert int(model.updates) == n == 9 // every and int(model.steps) == 9


def test_averages_begin_as_the_weights_where_fit_builds_the_model():
    model = toy_training(run_eagerly=False, optimizer=keras.optimizers.SGD(0.5), ema_decay=0.9)
    before = weights(model)
    model.fit(ToyBatches(0, 1), verbose=0, shuffle=False)
    moved = [now - old for now, old in zip(weights(model), before, strict=True)]
    assert max(abs(each).max() for each in moved) > 1e-3
    for mine, old, step in zip(model.averages, before, moved, strict=True):
        np.testing.assert_allclose(to_numpy(mine), old + (1 - 2 / 11) * step, rtol=1e-5, atol=1e-6)


def test_averages_take_the_weights_place_and_give_it_back():
    model = toy_training(ema_decay=0.5)
    for k in range(3):
        model.train_on_batch(batch(k))
    before = weights(model)
    with model.averaged():
        for value, average in zip(weights(model), model.averages, strict=True):
            np.testing.assert_array_equal(value, to_numpy(average))
    for value, kept in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(value, kept)
    with pytest.raises(RuntimeError), model.averaged():
        raise RuntimeError
    for value, kept in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(value, kept)


def test_a_step_is_traced_once(monkeypatch):
    """A tracing of a large network takes half a minute; its variables are all there before."""
    traced = []
    step = DiffusionTraining.train_step
    monkeypatch.setattr(DiffusionTraining, "train_step", lambda *a: (traced.append(1), step(*a))[1])
    model = toy_training(run_eagerly=False, ema_decay=0.5)
    model.fit(ToyBatches(0, 3), verbose=0, shuffle=False)
    model.fit(ToyBatches(0, 2), verbose=0, shuffle=False)
    assert len(traced) == 1


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decay_is_told(decay):
    with pytest.raises(ValueError, match="Received: ema_decay="):
        toy_training(ema_decay=decay)


def test_rates_count_updates_where_gradients_are_accumulated():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [1.0, 0.5, 0.25])
    rates = PerUpdate(schedule, 3)  # Keras tells a schedule the batches
    assert [float(rates(k)) for k in range(9)] == [1.0] * 3 + [0.5] * 3 + [0.25] * 3
    again = PerUpdate.from_config(rates.get_config())
    assert [float(again(k)) for k in range(9)] == [float(rates(k)) for k in range(9)]


def test_rate_warms_up_stays_and_goes_down():
    rate = WarmupStableDecay(2.0, steps=100, warmup=10, decay=0.5)
    values = [float(rate(k)) for k in range(101)]
    np.testing.assert_allclose(values[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(values[10:51], 2.0)
    np.testing.assert_allclose(values[50:], 2.0 * np.arange(50, -1, -1) / 50, rtol=1e-5)


def test_losses_of_every_batch_are_remembered():
    model = toy_training()
    losses = [float(model.train_on_batch(batch(k), return_dict=True)["loss"]) for k in range(1)]
    model.reset_metrics()
    losses += [float(model.train_on_batch(batch(1), return_dict=True)["loss"])]
    np.testing.assert_allclose(model.last_losses(2), losses, rtol=1e-6)
    np.testing.assert_allclose(model.last_losses(99), losses, rtol=1e-6)


def validation_loss(model, batch_size=8):
    data = {"latent": numbers(16, 2, 2, 4), "tokens": np.zeros((16, 3), "int32"), "index": np.arange(16)}
    return model.evaluate(data, batch_size=batch_size, verbose=0, return_dict=True)


def test_validation_draws_the_same_noise_whenever_and_in_whatever_batches():
    model = toy_training()
    model.train_on_batch(batch(0))
    first, second = validation_loss(model), validation_loss(model)
    assert first == second
    assert validation_loss(model, batch_size=4)["loss"] == pytest.approx(first["loss"], rel=1e-5)
    other = toy_training(seed=3)
    other.train_on_batch(batch(0))
    for mine, theirs in zip(other.trainable_variables, model.trainable_variables, strict=True):
        mine.assign(theirs)
    assert validation_loss(other)["loss"] == pytest.approx(first["loss"], rel=1e-6)


def test_validations_timesteps_cover_all_of_time_evenly():
    model = toy_training()
    said = model.call({"latent": numbers(100, 2, 2, 4), "tokens": np.zeros((100, 3), "int32")})
    counts, _ = np.histogram(to_numpy(said["t"]), bins=10, range=(1, 1001))
    assert counts.min() >= 9 and counts.max() <= 11
    assert to_numpy(said["t"]).min() >= 1


def test_losses_by_t_add_up_to_the_loss():
    model = toy_training(bins=5)
    latent = {"latent": numbers(64, 2, 2, 4), "tokens": np.zeros((64, 3), "int32")}
    said = model.call(latent, training=True)
    losses, t = to_numpy(said["loss"]), to_numpy(said["t"])
    loss = model.compute_loss(latent, None, said)
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-6)
    for i, metric in enumerate(model.by_t):
        within = losses[(t - 1) // 200 == i]
        assert float(metric.result()) == pytest.approx(within.mean(), rel=1e-5)


def test_weight_multiplies_an_items_loss():
    model = toy_training()
    latent = {"latent": numbers(4, 2, 2, 4), "tokens": np.zeros((4, 3), "int32")}
    said = model.call(latent, training=True)
    weight = np.array([1.0, 0.0, 2.0, 0.5], "float32")
    loss = model.compute_loss({**latent, "weight": ops.convert_to_tensor(weight)}, None, said)
    assert float(loss) == pytest.approx((weight * to_numpy(said["loss"])).mean(), rel=1e-6)


class Recorded:
    """Stands in for a UNet: keeps what it is told and predicts zeros."""

    def __call__(self, inputs, training=False):
        self.inputs = {name: to_numpy(array) for name, array in inputs.items()}
        return ops.zeros_like(inputs["latent"])


def test_offset_noise_is_constant_over_a_channel_and_as_strong_as_asked():
    def x_t(offset_noise):
        unet, diffusion = Recorded(), GaussianDiffusion(scaled_linear_schedule())
        model = DiffusionTraining(unet, None, diffusion, np.zeros((3, 5)), 0.0, offset_noise=offset_noise)
        model.call({"latent": np.zeros((512, 2, 2, 4), "float32"), "context": numbers(512, 3, 5)}, training=True)
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alpha_bar = np.cumprod(1 - betas)[unet.inputs["timestep"].astype(int)]
        return unet.inputs["latent"] / np.sqrt(1 - alpha_bar)[:, None, None, None]

    added = x_t(0.5) - x_t(0.0)  # the other draws are the same
    np.testing.assert_allclose(added, added[:, :1, :1] * np.ones((2, 2, 1)), atol=1e-3)
    assert added[:, 0, 0].std() == pytest.approx(0.5, rel=0.1) and abs(added[:, 0, 0].mean()) < 0.05


def test_context_of_a_batch_is_used_and_left_out_like_a_caption():
    unet, empty = Recorded(), numbers(3, 5, seed=9)
    diffusion = GaussianDiffusion(scaled_linear_schedule())
    model = DiffusionTraining(unet, None, diffusion, empty, 0.5, seed=1)
    context = numbers(64, 3, 5)
    model.call({"latent": numbers(64, 2, 2, 4), "context": context}, training=True)
    left_out = (unet.inputs["context"] == empty).all(axis=(1, 2))
    assert 16 < left_out.sum() < 48
    np.testing.assert_array_equal(unet.inputs["context"][~left_out], context[~left_out])


@pytest.mark.parametrize("arguments", [{"offset_noise": -0.1}, {"bins": 0}, {"loss_weight": "snr"}])
def test_bad_arguments_are_told(arguments):
    unet, text_encoder = toy_networks()
    with pytest.raises(ValueError, match="Received: "):
        DiffusionTraining(unet, text_encoder, GaussianDiffusion(scaled_linear_schedule()), EMPTY, **arguments)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_loss_is_scaled_where_the_networks_compute_in_float16(policy):
    latent = keras.Input((2, 2, 4), name="latent")
    inputs = {
        "latent": latent,
        "timestep": keras.Input((), name="timestep"),
        "context": keras.Input((3, 5), name="context"),
    }
    unet = keras.Model(inputs, keras.layers.Dense(4, dtype=policy)(latent))
    model = DiffusionTraining(unet, None, GaussianDiffusion(scaled_linear_schedule()), np.zeros((3, 5)), ema_decay=0.5)
    model.compile(optimizer=keras.optimizers.SGD(0.1), run_eagerly=True)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    for _ in range(2):
        model.train_on_batch({"latent": numbers(4, 2, 2, 4), "context": numbers(4, 3, 5)})
    assert {v.dtype for v in (*model.trainable_variables, *model.averages)} == {"float32"}
    assert int(model.updates) == 2 and np.isfinite(model.last_losses(2)).all()


def test_scale_of_the_loss_is_part_of_a_state_and_there_once(tmp_path):
    def compiled():
        model = toy_training(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-3)))
        model.fit(ToyBatches(0, 1), verbose=0, shuffle=False)
        return model

    model = compiled()
    count = len(model.optimizer.variables)
    assert count == len({variable.path for variable in model.optimizer.variables})
    model.optimizer.dynamic_scale.assign(7.0)
    model.fit(ToyBatches(1, 2), verbose=0, shuffle=False)
    write_state(tmp_path / "state.npz", model)
    other = compiled()
    read_state(tmp_path / "state.npz", other)
    other.fit(ToyBatches(2, 3), verbose=0, shuffle=False)
    assert float(other.optimizer.dynamic_scale) == 7.0
    counts = [len(each.optimizer.variables) for each in (model, other)]
    assert counts == [count, count]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's")
def test_blocks_are_computed_again_where_they_were_made_so():
    import jax

    with keras.RematScope(mode="list_of_layers", layer_names=REMATERIALIZED):
        unet = ld.UNet(channels=(4, 4), attention=(True, False), heads=1, groups=2, context_dim=4)
    shapes = {"latent": (1, 8, 8, 4), "timestep": (1,), "context": (1, 3, 4)}
    inputs = {name: np.zeros(shape, "float32") for name, shape in shapes.items()}
    equations = jax.make_jaxpr(lambda inputs: unet(inputs))(inputs).jaxpr.eqns
    again = [equation for equation in equations if equation.primitive.name in ("checkpoint", "remat", "remat2")]
    assert len(again) == sum(layer.name in REMATERIALIZED for layer in unet.layers) > 10
