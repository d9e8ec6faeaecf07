"""Learning rates by the number of updates."""

import keras
from keras import ops


class PerUpdate(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule, told the updates of the weights where Keras counts batches: with accumulated gradients.

    Args:
        schedule: told 0 until the first update.
        gradient_accumulation_steps: the optimizer's.
    """

    def __init__(self, schedule, gradient_accumulation_steps: int):
        self.schedule, self.gradient_accumulation_steps = schedule, gradient_accumulation_steps

    def __call__(self, step):
        return self.schedule(ops.cast(step, "int32") // self.gradient_accumulation_steps)

    def get_config(self):
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "gradient_accumulation_steps": self.gradient_accumulation_steps}

    @classmethod
    def from_config(cls, config):
        schedule = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(schedule, config["gradient_accumulation_steps"])


class WarmupStableDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A warm-up, a plateau, and a straight way down over the last part: a run may be made longer until that begins.

    Args:
        learning_rate: the plateau's.
        steps: of the whole run.
        warmup: steps of the way up.
        decay: share of the steps that the way down takes.

    Reference: Hägele et al. 2024, arXiv:2405.18392.
    """

    def __init__(self, learning_rate: float, steps: int, warmup: int = 20, decay: float = 0.4):
        self.learning_rate, self.steps, self.warmup, self.decay = learning_rate, steps, warmup, decay

    def __call__(self, step):
        step = ops.cast(step, "float32")
        up = ops.minimum(1.0, (step + 1) / self.warmup)
        down = ops.clip((self.steps - step) / (self.decay * self.steps), 0.0, 1.0)
        return self.learning_rate * up * down

    def get_config(self):
        return {"learning_rate": self.learning_rate, "steps": self.steps, "warmup": self.warmup, "decay": self.decay}
