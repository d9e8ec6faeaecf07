"""The PatchGAN discriminator and its hinge loss: is each patch of an image a real one's?

References: Isola et al. 2017, sec. 3.2.2, arXiv:1611.07004; Lim and Ye 2017, eq. 3, arXiv:1705.02894.
"""

import keras
from keras import ops


class PatchDiscriminator(keras.Model):
    """Image (B, H, W, C) in [-1, 1] -> logits (B, h, w, 1), positive where a patch looks real; h = H / 8 by default.

    GroupNorm stands where Isola et al. have batch norms: an image's logits do not depend on the batch, and there is no
    running state to keep.

    Args:
        width: channels after the first convolution; doubled by each further one, up to eight times that.
        depth: convolutions of stride two.
        image_channels: channels of the image.
        groups: of the norms; divides `width`.
        name, dtype: Keras' own.

    Raises:
        ValueError: `groups` does not divide `width`, or `depth` is below 1.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 3,
        *,
        image_channels: int = 3,
        groups: int = 32,
        name="patch_discriminator",
        dtype=None,
    ):
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1. Received: depth={depth}.")
        if width % groups:
            raise ValueError(f"`groups` must divide `width`. Received: groups={groups}, width={width}.")
        image = keras.Input((None, None, image_channels), name="image", dtype="float32")
        x = image
        for i in range(depth + 1):
            strides = 2 if i < depth else 1
            channels = width * min(2**i, 8)
            x = keras.layers.Conv2D(channels, 4, strides, "same", use_bias=i == 0, name=f"conv_{i}", dtype=dtype)(x)
            if i:
                x = keras.layers.GroupNormalization(groups, name=f"norm_{i}", dtype=dtype)(x)
            x = ops.leaky_relu(x, 0.2)
        logits = keras.layers.Conv2D(1, 4, padding="same", name="conv_out", dtype=dtype)(x)
        super().__init__(image, logits, name=name)


def hinge_loss(real, fake):
    """The discriminator's: logits of real and reconstructed images, (B, h, w, 1) each -> (B,)."""
    real = ops.relu(1.0 - ops.cast(real, "float32"))
    fake = ops.relu(1.0 + ops.cast(fake, "float32"))
    return 0.5 * (ops.mean(real, axis=(1, 2, 3)) + ops.mean(fake, axis=(1, 2, 3)))
