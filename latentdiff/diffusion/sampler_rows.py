"""What one row of a sampler's table is: a level to ask the network about, and the matrix that makes the next state.

The matrix multiplies the column [x, a, b, c, x0_hat, eps_hat, noise]. x is the sample; a, b, c are three slots in which
a sampler keeps what it needs again (an earlier x, earlier outputs).
"""

from typing import NamedTuple

import numpy as np

from latentdiff.diffusion.sampler_times import Level

NUM_SLOTS = 4
NUM_COLUMNS = NUM_SLOTS + 3
X, A, B, C, X0, EPS, NOISE = range(NUM_COLUMNS)


class Row(NamedTuple):
    """The level at which the network is asked, and the (4, 7) matrix."""

    level: Level
    matrix: np.ndarray


def combination(*coefficients: tuple[int, float]) -> np.ndarray:
    """(7,) a linear combination of the columns, given as pairs of column and coefficient, added up."""
    vector = np.zeros(NUM_COLUMNS)
    for column, coefficient in coefficients:
        vector[column] += coefficient
    return vector


def row(level: Level, x: np.ndarray, **slots: np.ndarray) -> Row:
    """The row that makes x, and the slots named a, b, c, of combinations of the columns; a slot not named is kept."""
    matrix = np.eye(NUM_SLOTS, NUM_COLUMNS)
    matrix[X] = x
    for name, vector in slots.items():
        matrix["xabc".index(name)] = vector
    return Row(level, matrix)
