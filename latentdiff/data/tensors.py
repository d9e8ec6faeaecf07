"""A data set's batches as a `tf.data.Dataset`; imports TensorFlow, and is for `fit` on TensorFlow with several sizes.

Keras looks at two batches of a `PyDataset` to learn their shapes and takes what they share for what all share. Here
height and width are said to be open.
"""

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

    (first,) = batches[0]
    signature = {}
    for name, array in first.items():
        text = array.dtype == object
        shape = [None if name in ("image", "latent") and axis in (1, 2) else n for axis, n in enumerate(array.shape)]
        signature[name] = tf.TensorSpec(shape, tf.string if text else array.dtype)

    def run():
        for index in range(len(batches)):
            yield batches[index][0]

    dataset = tf.data.Dataset.from_generator(run, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches))).prefetch(ahead)
