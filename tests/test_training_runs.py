"""A run in its directory: killed and gone on is never stopped, and nothing is lost to NaN, signals or a full disk."""

import csv
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from tiny_models import to_numpy
from toy_training import ToyBatches, toy_training

from latentdiff.training import Run
from latentdiff.training.state import read_state, state_variables, write_state

HERE = Path(__file__).parent


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fit(directory, steps, disturb=lambda k: None, config=None, model=None, **arguments):
    model = model or toy_training()
    arguments = {"checkpoint_every": 4, "log_every": 2, **arguments}
    run = Run(directory, config or {"seed": 0}, steps, **arguments)
    first = run.resume(model)
    model.fit(ToyBatches(first, steps, disturb), callbacks=[run], shuffle=False, verbose=0)
    return model, first


def start(directory, *arguments):
    command = [sys.executable, str(HERE / "interrupted_run.py"), str(directory), *arguments]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True).returncode


def test_killed_and_gone_on_is_a_run_that_was_never_stopped(tmp_path):
    assert start(tmp_path / "whole", "12") == 0
    for death in ("batch:6", "writing:2", "checkpoint:1"):
        assert start(tmp_path / "killed", "12", death) == -signal.SIGKILL
    assert list((tmp_path / "killed" / "checkpoints").glob("*.tmp"))
    assert start(tmp_path / "killed", "12") == 0
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp"))
    losses, again = ((tmp_path / name / "losses.csv").read_bytes() for name in ("whole", "killed"))
    assert losses == again and len(losses.splitlines()) == 13
    whole, killed = (np.load(tmp_path / name / "checkpoints" / "step_00000012.npz") for name in ("whole", "killed"))
    assert whole.files == killed.files
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], killed[name])


def test_state_is_every_variable(tmp_path):
    model, again = toy_training(seed=0, ema_decay=0.9), toy_training(seed=7, ema_decay=0.9)
    model.fit(ToyBatches(0, 3), verbose=0, shuffle=False)
    write_state(tmp_path / "state.npz", model)
    read_state(tmp_path / "state.npz", again)
    for mine, theirs in zip(state_variables(again), state_variables(model), strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs))
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_state_keeps_bfloat16(tmp_path):
    models = []
    for _ in range(2):
        models.append(keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, dtype="bfloat16")]))
        models[-1].compile(keras.optimizers.SGD(0.1))
        models[-1].optimizer.build(models[-1].trainable_variables)
    model, again = models
    write_state(tmp_path / "state.npz", model)
    read_state(tmp_path / "state.npz", again)
    assert to_numpy(again.layers[0].kernel).dtype.name == "bfloat16"
    np.testing.assert_array_equal(to_numpy(again.layers[0].kernel), to_numpy(model.layers[0].kernel))


def test_another_models_state_is_refused_and_nothing_changes(tmp_path):
    model, other = toy_training(), toy_training(ema_decay=0.9)
    model.fit(ToyBatches(0, 1), verbose=0, shuffle=False)
    write_state(tmp_path / "state.npz", model)
    other.fit(ToyBatches(0, 1), verbose=0, shuffle=False)
    before = [to_numpy(variable).copy() for variable in state_variables(other)]
    with pytest.raises(ValueError, match="must hold this model's variables: .*average_of.*Received"):
        read_state(tmp_path / "state.npz", other)
    for variable, value in zip(state_variables(other), before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


def test_run_without_a_checkpoint_begins_at_zero(tmp_path):
    assert Run(tmp_path / "new", {}, 4).resume(toy_training()) == 0


def test_tables_hold_every_batch_once(tmp_path):
    model, first = fit(tmp_path / "run", 10)
    losses = rows_of(tmp_path / "run" / "losses.csv")
    assert first == 0 and [int(row["step"]) for row in losses] == list(range(1, 11))
    metrics = rows_of(tmp_path / "run" / "metrics.csv")
    assert [int(row["step"]) for row in metrics] == [2, 4, 6, 8, 10]
    for row, pair in zip(metrics, zip(losses[::2], losses[1::2], strict=True), strict=True):
        np.testing.assert_allclose(float(row["loss"]), np.mean([float(each["loss"]) for each in pair]), rtol=1e-6)
        assert float(row["learning_rate"]) == pytest.approx(1e-2)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["step_00000008.npz", "step_00000010.npz"]
    assert model.last_losses(10)[-1] == np.float32(losses[-1]["loss"])


def test_rows_after_the_last_checkpoint_are_struck(tmp_path):
    fit(tmp_path / "run", 8)
    for name in ("step_00000008.npz",):
        (tmp_path / "run" / "checkpoints" / name).write_bytes(b"half of a file")
    _, first = fit(tmp_path / "run", 8)
    assert first == 4
    assert [int(row["step"]) for row in rows_of(tmp_path / "run" / "losses.csv")] == list(range(1, 9))
    assert [int(row["step"]) for row in rows_of(tmp_path / "run" / "metrics.csv")] == [2, 4, 6, 8]


def test_run_that_is_done_stays_as_it_is(tmp_path):
    fit(tmp_path / "run", 4)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.csv")}
    run = Run(tmp_path / "run", {"seed": 0}, 4)
    assert run.resume(toy_training()) == 4
    assert {path: path.read_bytes() for path in before} == before


def test_nan_stops_the_run_and_names_its_step(tmp_path):
    def disturb(k):
        return np.full((8, 2, 2, 4), np.nan, "float32") if k == 6 else None

    with pytest.raises(ValueError, match=r"must be finite. Received: loss=nan at step 7. .*step_00000004.npz"):
        fit(tmp_path / "run", 12, disturb)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004.npz"]
    _, first = fit(tmp_path / "run", 8)
    assert first == 4


class InfiniteAtTheEighth(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return keras.ops.where(step >= 7, np.inf, 1e-2)


def test_weights_that_are_no_numbers_are_never_a_good_state(tmp_path):
    """The loss that a step gives is of the weights before it: eight are finite, and the ninth would not be."""
    saved = []

    def save(path):
        saved.append(path)

    with pytest.raises(ValueError, match=r"Weights must be finite. .* after step 8. .*step_00000004.npz"):
        fit(tmp_path / "run", 12, model=toy_training(optimizer=keras.optimizers.SGD(InfiniteAtTheEighth())), save=save)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004.npz"]
    assert len(saved) == 1
    _, first = fit(tmp_path / "run", 7, model=toy_training(optimizer=keras.optimizers.SGD(InfiniteAtTheEighth())))
    assert first == 4


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_steps_are_counted_once_however_they_are_executed(tmp_path, steps_per_execution):
    model = toy_training(run_eagerly=False)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2), jit_compile=model.jit_compile, steps_per_execution=steps_per_execution
    )
    fit(tmp_path / "run", 10, model=model, checkpoint_every=5)
    rows = rows_of(tmp_path / "run" / "losses.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 11)) and len({row["loss"] for row in rows}) == 10
    assert int(to_numpy(model.steps)) == 10
    assert (tmp_path / "run" / "checkpoints" / "step_00000010.npz").is_file()


def test_steps_go_on_over_epochs(tmp_path):
    model = toy_training()
    run = Run(tmp_path / "run", {"seed": 0}, 8, checkpoint_every=4, log_every=2)
    run.resume(model)
    model.fit(ToyBatches(0, 4), epochs=2, callbacks=[run], shuffle=False, verbose=0)
    assert [int(row["step"]) for row in rows_of(tmp_path / "run" / "losses.csv")] == list(range(1, 9))
    assert run.step == int(to_numpy(model.steps)) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_writes_a_checkpoint_and_ends(tmp_path, number):
    handler = signal.getsignal(number)

    def disturb(k):
        if k == 2:
            os.kill(os.getpid(), number)

    # `fit` may ask for a few batches before it trains on them.
    fit(tmp_path / "run", 50, disturb, checkpoint_every=1000)
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    done = int(path.stem.removeprefix("step_"))
    assert 1 <= done < 50
    assert len(rows_of(tmp_path / "run" / "losses.csv")) == done
    assert signal.getsignal(number) == handler


def test_full_disk_keeps_the_last_good_state(tmp_path):
    fit(tmp_path / "run", 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(OSError):
            fit(tmp_path / "run", 12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004.npz"]
    _, first = fit(tmp_path / "run", 8)
    assert first == 4


def test_another_configuration_is_refused(tmp_path):
    fit(tmp_path / "run", 2, config={"seed": 0, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"learning_rate=0.01 \(was 0.001\)"):
        fit(tmp_path / "run", 2, config={"seed": 0, "learning_rate": 1e-2})


def test_directory_that_is_no_runs_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="must be new, empty, or a run's"):
        fit(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_samples_model_and_validation_see_the_average(tmp_path):
    model = toy_training(ema_decay=0.5)
    seen = []

    def look():
        seen.append([to_numpy(variable).copy() for variable in model.trainable_variables])
        return {"val_loss": 1.5}

    def sample():
        return np.full((3, 4, 4, 3), 7, "uint8")

    def save(path):
        path.mkdir(exist_ok=True)

    fit(tmp_path / "run", 4, model=model, validate=look, sample=sample, save=save)
    for value, average in zip(seen[-1], model.averages, strict=True):
        np.testing.assert_allclose(value, to_numpy(average), rtol=1e-6)
    assert max(np.abs(to_numpy(v) - a).max() for v, a in zip(model.trainable_variables, seen[-1], strict=True)) > 1e-4
    assert (tmp_path / "run" / "samples" / "step_00000004.png").exists() and (tmp_path / "run" / "model").is_dir()
    assert rows_of(tmp_path / "run" / "metrics.csv")[-1]["val_loss"] == "1.5"


@pytest.mark.parametrize("arguments", [{"log_every": 0}, {"log_every": 1000}, {"keep": 0}, {"checkpoint_every": -1}])
def test_bad_numbers_are_told(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)).removesuffix("_every")):
        Run(tmp_path, {}, 10, **arguments)
