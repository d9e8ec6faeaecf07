"""A toy run that is killed where it is told to be.

usage: python tests/interrupted_run.py DIRECTORY STEPS [batch:K | writing:K | checkpoint:K]
"batch:K" dies when batch K is asked for, "writing:K" when the K-th file is about to be renamed, "checkpoint:K" when the
K-th checkpoint is.
"""

import os
import pathlib
import signal
import sys

import keras
from toy_training import ToyBatches, toy_training

from latentdiff.training import Run


def main(directory, steps, death=""):
    place, _, number = death.partition(":")

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def disturb(k):
        if place == "batch" and k == int(number):
            die()

    replace, written = os.replace, []

    def dying_replace(source, target):
        written.append(pathlib.Path(target).parent.name)
        if place == "writing" and len(written) == int(number):
            die()
        if place == "checkpoint" and written.count("checkpoints") == int(number):
            die()
        replace(source, target)

    os.replace = dying_replace
    optimizer = keras.optimizers.AdamW(1e-2)
    model = toy_training(run_eagerly=False, optimizer=optimizer, ema_decay=0.99)
    run = Run(directory, {"seed": 0}, int(steps), checkpoint_every=4, log_every=2)
    first = run.resume(model)
    model.fit(ToyBatches(first, int(steps), disturb), callbacks=[run], shuffle=False, verbose=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
