"""The arrow inside a graph: contexts, seeds, steps, scales and samplers of a batch -> latents -> images.

One loop serves every row of the batch, each with its own table of `SamplerBook`; a row that has had its last step waits
for the others. What a row becomes does not depend on those beside it, up to the rounding of the networks' kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from latentdiff.diffusion.denoiser import to_x0_eps
from latentdiff.diffusion.guidance import guide
from latentdiff.diffusion.noise import normal
from latentdiff.diffusion.samplers import initial_state, step
from latentdiff.export.sampler_book import SamplerBook
from latentdiff.pipeline import TextToImage


class Arrow:
    """A pipeline's networks and a book of samplers, as functions to be traced by TensorFlow.

    Args:
        pipeline: whose networks these are.
        book: the samplers that may be chosen.
        jit_compile: whether a network's evaluation is compiled by XLA.

    Attributes:
        rows: the book's longest columns, as variables, and the distinct matrices that `place` counts.
    """

    def __init__(self, pipeline: TextToImage, book: SamplerBook, jit_compile: bool = False):
        self.pipeline, self.book = pipeline, book
        self.clips = bool((book.clip < float("inf")).any())
        # As variables they lie in the SavedModel once; as constants they would in every function that reads them.
        # Of the matrices each is held once, and of its entries those that are not the same in all.
        matrices, places = np.unique(book.matrix.reshape(len(book.matrix), -1), axis=0, return_inverse=True)  # (M, 28)
        self._first, self._varies = matrices[0], (matrices != matrices[0]).any(axis=0)
        self._varies[0] = True  # in a book of one row too
        columns = {"timestep": book.timestep, "signal": book.signal, "noise": book.noise}
        columns |= {"place": places.reshape(-1).astype("int32"), "matrix": matrices[:, self._varies]}
        self.rows = {
            name: tf.Variable(tf.constant(column), trainable=False, name=name) for name, column in columns.items()
        }
        self._evaluate = tf.function(self._network, jit_compile=jit_compile, autograph=False)

    def encode(self, tokens: Any) -> Any:
        """int32 (B, S) -> context (B, S, D), in the networks' dtype."""
        return self.pipeline.text_encoder(tokens, training=False)

    def denoise(self, latent: Any, timestep: Any, context: Any) -> Any:
        """One evaluation: float32 (B, h, w, c), float32 (B,), (B, S, D) -> the prediction, float32 (B, h, w, c)."""
        return self._evaluate(latent, timestep, context)

    def decode(self, latent: Any) -> Any:
        """Scaled latents (B, h, w, c) -> images uint8 (B, H, W, 3)."""
        return self.pipeline.image(latent)

    def sample(
        self, context: Any, negative_context: Any, seeds: Any, sampler: Any, num_steps: Any, scale: Any, shape: Any
    ) -> Any:
        """The latents that a batch's own samplers come to.

        Args:
            context: (B, S, D).
            negative_context: (B, S, D).
            seeds: int64 (B,), in 0 .. 2**63 - 1.
            sampler: int32 (B,), places in the book.
            num_steps: int32 (B,), for which the book has a table.
            scale: float32 (B,), guidance's; a row at 1 is the conditional model.
            shape: (h, w, c) of a latent, whole numbers.

        Returns:
            float32 (B, h, w, c), scaled latents.
        """
        book = self.book
        places = tf.stack([sampler, num_steps], axis=1)  # (B, 2)
        first, num_rows = tf.gather_nd(book.first, places), tf.gather_nd(book.num_rows, places)
        noisy = tf.gather(book.needs_noise, sampler)
        clip = tf.gather(book.clip, sampler)
        guided = tf.not_equal(scale, 1.0)
        both = tf.concat([negative_context, context], axis=0)  # (2 B, S, D)
        still = tf.eye(4, 7)  # the row that changes nothing

        def body(i, state):
            going = i < num_rows  # (B,)
            row = first + tf.minimum(i, num_rows - 1)  # (B,)
            columns = (self.rows[name] for name in ("timestep", "signal", "noise", "place"))
            timestep, signal, noise, place = (tf.gather(column, row) for column in columns)  # (B,)
            matrix = tf.where(going[:, None, None], self._matrix(place), still)  # (B, 4, 7)
            output = tf.cond(
                tf.reduce_any(guided & going),
                lambda: self._guided(state[0], timestep, both, scale, guided),
                lambda: self._evaluate(state[0], timestep, context),
            )
            x0_hat, eps_hat = self._estimates(output, state[0], signal, noise, clip)
            fresh = tf.cond(
                tf.reduce_any(noisy & going),
                lambda: normal(seeds, i + 1, shape),
                lambda: tf.zeros_like(state[0]),
            )
            return i + 1, step(tf.transpose(matrix, [1, 2, 0]), state, x0_hat, eps_hat, fresh)

        initial_scale = tf.gather_nd(book.initial_scale, places)  # (B,)
        state = initial_state(normal(seeds, tf.constant(0), shape) * initial_scale[:, None, None, None])
        last = tf.reduce_max(num_rows)
        _, state = tf.while_loop(lambda i, _: i < last, body, (tf.constant(0), state), parallel_iterations=1)
        return state[0]

    def _matrix(self, place: Any) -> Any:
        """The matrices (B, 4, 7) at places (B,) among the distinct ones."""
        varying = tf.gather(self.rows["matrix"], place)  # (B, V)
        spread = np.maximum(np.cumsum(self._varies) - 1, 0)  # (28,)
        return tf.reshape(tf.where(self._varies, tf.gather(varying, spread, axis=1), self._first), (-1, 4, 7))

    def _network(self, latent: Any, timestep: Any, context: Any) -> Any:
        inputs = {"latent": latent, "timestep": timestep, "context": context}
        return tf.cast(self.pipeline.unet(inputs, training=False), tf.float32)

    def _guided(self, x_t: Any, timestep: Any, both: Any, scale: Any, guided: Any) -> Any:
        output = self._evaluate(tf.concat([x_t, x_t], 0), tf.concat([timestep, timestep], 0), both)
        unconditional, conditional = tf.split(output, 2)
        return tf.where(guided[:, None, None, None], guide(conditional, unconditional, scale), conditional)

    def _estimates(self, output: Any, x_t: Any, signal: Any, noise: Any, clip: Any) -> tuple[Any, Any]:
        x0_hat, eps_hat = to_x0_eps(output, x_t, signal, noise, self.pipeline.settings.prediction)
        if not self.clips:
            return x0_hat, eps_hat
        limit = clip[:, None, None, None]
        clipped = to_x0_eps(ops.clip(x0_hat, -limit, limit), x_t, signal, noise, "x0")
        return tuple(tf.where(tf.math.is_finite(limit), c, u) for c, u in zip(clipped, (x0_hat, eps_hat), strict=True))  # pyright: ignore[reportReturnType]
