"""What every training shares: draws that resume and differ on each replica, an average of the weights, every loss.

    average_n = d_n average_(n-1) + (1 - d_n) weights_n,    d_n = min(ema_decay, (1 + n) / (10 + n)),    n = 1, 2, ...

n counts updates of the weights: several batches, where the optimizer accumulates their gradients.
Reference: Ho et al. 2020, appendix B; the growing d_n is that of `LitEma` in the code of Rombach et al. 2022.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops

from latentdiff.backend import FinishedStep, fit_compilation, held, lay_out_like, replica, running_here, to_numpy
from latentdiff.data.tensors import as_read
from latentdiff.training.state import build_all
from latentdiff.training_config import HISTORY


class TrainingModel(keras.Model):
    """A Keras model over the networks that it trains; `compile` and `fit` are the ordinary ones.

    A subclass gives `call` and `compute_loss`, which takes the loss of a batch through `finish_loss`.

    Args:
        network: that is trained; its dtype policy is the model's.
        ema_decay: of the weights' average, 0.9999 and the like; None keeps none.
        seed: of everything that is drawn while training.

    Attributes:
        steps: batches trained on so far.
        updates: of the weights so far.
        averages: of each trainable weight, float32.
    """

    def __init__(self, network: Any, ema_decay: float | None = None, seed: int = 0, name: str | None = None):
        # Keras scales the loss where the model's own policy is mixed_float16; each network casts its inputs itself.
        super().__init__(name=name, dtype=policy_of(network), autocast=False)
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), or None. Received: ema_decay={ema_decay}.")
        self.ema_decay = ema_decay
        self.seeds = keras.random.SeedGenerator(seed)
        self.steps: Any = None
        self.updates: Any = None
        self.batch_loss: Any = None
        self.averages: list[Any] = []

    def build(self, batch_shape=None):
        """Makes the counters and the averages; the networks are built."""
        first = {"trainable": False, "aggregation": "only_first_replica"}
        whole = {**first, "dtype": "int32", "initializer": "zeros"}
        self.steps = self.add_weight(shape=(), name="steps", **whole)
        self.updates = self.add_weight(shape=(), name="updates", **whole)
        shared = {"trainable": False, "dtype": "float32"}
        zeros = {**shared, "initializer": "zeros"}
        self.batch_loss = self.add_weight(shape=(), name="batch_loss", aggregation="sum", **zeros)
        self.loss_history = self.add_weight(
            shape=(HISTORY,), name="loss_history", aggregation="only_first_replica", **zeros
        )
        if self.ema_decay is not None:
            for variable in self.averaged_variables():
                name = "average_of_" + variable.path.replace("/", ".")
                # No array may be two variables' where a step gives its memory away. The initializer is what holds where
                # Keras builds a model to see its shapes, and drops assignments; the assignment is for the layout.
                average = self.add_weight(
                    shape=variable.shape,
                    name=name,
                    aggregation="only_first_replica",
                    initializer=functools.partial(_copy_of, variable),
                    **shared,
                )
                lay_out_like(average, variable)
                average.assign(_copy_of(variable))
                self.averages.append(average)
        self.built = True

    def compile(self, *arguments, jit_compile: bool | str = "auto", **keywords):
        """Keras' own; "auto" is plain graphs on a CPU by TensorFlow, where they are faster than XLA's."""
        chosen = fit_compilation() if jit_compile == "auto" else jit_compile
        super().compile(*arguments, jit_compile=chosen, **keywords)

    def make_train_function(self, force=False):
        """Keras' own, after all variables are made: TensorFlow traces a step twice if it makes some itself."""
        build_all(self)
        return super().make_train_function(force)

    def fit(self, x=None, *arguments, **keywords):
        """Keras' own; on TensorFlow this package's data sets are read by `data.to_tf_dataset`."""
        if "validation_data" in keywords:
            keywords["validation_data"] = as_read(keywords["validation_data"])
        return super().fit(as_read(x), *arguments, **keywords)

    def evaluate(self, x=None, *arguments, **keywords):
        """Keras' own; reads as `fit` does."""
        return super().evaluate(as_read(x), *arguments, **keywords)

    def averaged_variables(self) -> list[Any]:
        """What has an average: all that is trained, unless a subclass says otherwise."""
        return self.trainable_variables

    def normal(self, shape) -> Any:
        """Standard normal float32 of a batch's shape, other numbers for each replica of the global batch."""
        return self._draw(keras.random.normal, shape)

    def uniform(self, shape) -> Any:
        """Float32 in [0, 1), likewise."""
        return self._draw(keras.random.uniform, shape)

    def integers(self, shape, low: int, high: int) -> Any:
        """int32 in low .. high - 1, likewise."""
        return self._draw(lambda shape, seed: keras.random.randint(shape, low, high, seed=seed), shape)

    def positions(self, count) -> Any:
        """int32 (count,): the rows of the global batch that are here, 0, 1, ... where there is one replica."""
        return ops.arange(count) + replica()[0] * count

    def _draw(self, draw, shape):
        index, replicas = replica()
        if replicas == 1:
            return draw(shape, seed=self.seeds)
        everywhere = draw((shape[0] * replicas, *shape[1:]), seed=self.seeds)
        return ops.take(everywhere, self.positions(shape[0]), axis=0)

    def finish_loss(self, losses: Any) -> Any:
        """The mean of losses (B,) as `compute_loss` must give it: the global batch's is the sum over replicas."""
        loss = ops.mean(ops.cast(losses, "float32")) / replica()[1]
        if self.batch_loss is not None:
            self.batch_loss.assign(loss)
        return loss

    def train_step(self, *arguments):
        """Keras' own, then the counters and the averages; JAX hands a state along, TensorFlow does not.

        Raises:
            ValueError: gradients are accumulated on several replicas, which Keras cannot do.
        """
        steps = getattr(self._inner_optimizer(), "gradient_accumulation_steps", None)
        if steps and replica()[1] > 1:
            raise ValueError(
                "`gradient_accumulation_steps` must be None on several replicas: Keras accumulates on one alone. "
                f"Received: gradient_accumulation_steps={steps}, replicas={replica()[1]}."
            )
        with _running_on_one(learning=True):
            given = super().train_step(*arguments)
        with FinishedStep(self, given) as step:
            self._count(self._inner_optimizer())
        return step.result

    def test_step(self, *arguments):
        """Keras' own."""
        with _running_on_one():
            return super().test_step(*arguments)

    def _inner_optimizer(self):
        return getattr(self.optimizer, "inner_optimizer", self.optimizer)  # of one that scales the loss

    def _count(self, optimizer) -> None:
        steps, updates_before = ops.convert_to_tensor(self.steps), ops.convert_to_tensor(self.updates)
        loss, history = ops.convert_to_tensor(self.batch_loss), ops.convert_to_tensor(self.loss_history)
        self.loss_history.assign(ops.where(ops.arange(HISTORY) == steps % HISTORY, loss, history))
        self.steps.assign(steps + 1)
        updates = ops.cast(optimizer.iterations, "int32")  # Keras counts those, where it accumulates
        n = ops.cast(updates, "float32")
        decay = ops.minimum(self.ema_decay or 0.0, (1 + n) / (10 + n))
        share = ops.where(updates > updates_before, 1 - decay, 0.0)
        averaged = self.averaged_variables() if self.averages else []
        for average, variable in zip(self.averages, averaged, strict=True):
            average.assign(average + share * (ops.cast(variable, "float32") - average))
        self.updates.assign(updates)

    def last_losses(self, count: int) -> np.ndarray:
        """The losses of the last `count` batches, at most HISTORY, oldest first: float32 (count,)."""
        steps = int(to_numpy(self.steps))
        count = min(count, steps, HISTORY)
        return to_numpy(self.loss_history)[np.arange(steps - count, steps) % HISTORY]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averages in the weights' place within a `with` block, and the weights back after it, exactly."""
        if not self.averages:
            yield
            return
        variables = self.averaged_variables()
        kept = [held(variable) for variable in variables]
        for variable, average in zip(variables, self.averages, strict=True):
            variable.assign(ops.copy(ops.cast(average, variable.dtype)))
        try:
            yield
        finally:
            for variable, value in zip(variables, kept, strict=True):
                variable.assign(value)


def _running_on_one(learning: bool = False) -> AbstractContextManager:
    return running_here(learning) if replica()[1] == 1 else nullcontext()


def _copy_of(variable: Any, shape=None, dtype=None) -> Any:
    """What a variable holds, as an initializer of another one: float32."""
    return ops.copy(ops.cast(ops.convert_to_tensor(variable), "float32"))


def policy_of(network: Any) -> Any:
    """The dtype policy that a network's layers have, float32 but for some or none."""
    policies = [layer.dtype_policy for layer in getattr(network, "layers", ())]
    return next((policy for policy in policies if policy.name != "float32"), "float32")
