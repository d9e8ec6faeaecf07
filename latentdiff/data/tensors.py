"""A data set's batches as a `tf.data.Dataset`, as which trainings on TensorFlow read them; imports TensorFlow.

Keras looks at two batches of a `PyDataset` to learn their shapes and takes what they share for what all share. Here
height and width are said to be open where there are several. And TensorFlow does not tune the data set while it runs:
there is nothing to tune, and its thread sleeps through the end of an epoch, for as long as that has lasted, up to a
minute.
"""

from typing import Any

import keras

from latentdiff.data.steps import Steps


def to_tf_dataset(batches: Steps, ahead: int = 2):
    """The batches in their order, each with the same content as from the data set itself.

    Args:
        batches: of pictures or latents, with tokens or contexts.
        ahead: batches that TensorFlow keeps ready.

    Returns:
        `tf.data.Dataset` of dictionaries, as many as the data set has batches.
    """
    import tensorflow as tf

    (first,), (second,) = batches[0], batches[min(1, len(batches) - 1)]
    several = len(batches.order.buckets) > 1
    signature = {}
    for name, array in first.items():
        sizes = [n if n == other else None for n, other in zip(array.shape, second[name].shape, strict=True)]
        if several and name in ("image", "latent"):
            sizes[1:3] = None, None
        signature[name] = tf.TensorSpec(sizes, tf.string if array.dtype == object else array.dtype)

    def run():
        try:
            for index in range(len(batches)):
                yield batches[index][0]
        finally:
            batches.on_epoch_end()

    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = tf.data.Dataset.from_generator(run, output_signature=signature)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(batches))).prefetch(ahead)
    return dataset.with_options(options)


def as_read(batches: Any) -> Any:
    """What `fit` and `evaluate` are handed: on TensorFlow one of this package's data sets is a `tf.data.Dataset`."""
    return to_tf_dataset(batches) if isinstance(batches, Steps) and keras.backend.backend() == "tensorflow" else batches
