"""The autoencoder: image <-> latent, a factor of two for each level but one.

References: Rombach et al. 2022, sec. 3.1 and appendix G, arXiv:2112.10752; `documents`' Encoder and Decoder.
"""

from collections.abc import Sequence

import keras
from keras import ops

from latentdiff.models.attention import AttentionBlock
from latentdiff.models.layers import Downsample, ResnetBlock, Upsample, conv, register
from latentdiff.models.norms import group_norm


def build_encoder(
    channels, blocks_per_level, latent_channels, image_channels, groups, norm_epsilon, mid_attention, dtype
):
    """The model image (B, H, W, C) in [-1, 1] -> moments (B, h, w, 2 latent_channels): mean, then log variance."""
    image = keras.Input((None, None, image_channels), name="image", dtype="float32")
    x = conv(channels[0], 3, "conv_in", dtype)(image)
    for i, width in enumerate(channels):
        for j in range(blocks_per_level):
            x = ResnetBlock(width, groups, norm_epsilon, name=f"down_{i}_resnet_{j}", dtype=dtype)(x)
        if i < len(channels) - 1:
            x = Downsample(width, "after", name=f"down_{i}_downsample", dtype=dtype)(x)
    x = middle(x, channels[-1], groups, norm_epsilon, mid_attention, dtype)
    x = group_norm(groups, norm_epsilon, "norm_out", dtype, swish=True)(x)
    x = conv(2 * latent_channels, 3, "conv_out", dtype)(x)
    x = conv(2 * latent_channels, 1, "quant_conv", dtype)(x)
    return keras.Model(image, x, name="encoder")


def build_decoder(
    channels, blocks_per_level, latent_channels, image_channels, groups, norm_epsilon, mid_attention, dtype
):
    """The model unscaled latent (B, h, w, latent_channels) -> image (B, H, W, C) in [-1, 1]."""
    latent = keras.Input((None, None, latent_channels), name="latent", dtype="float32")
    x = conv(latent_channels, 1, "post_quant_conv", dtype)(latent)
    x = conv(channels[-1], 3, "conv_in", dtype)(x)
    x = middle(x, channels[-1], groups, norm_epsilon, mid_attention, dtype)
    for i, width in enumerate(reversed(channels)):
        for j in range(blocks_per_level + 1):
            x = ResnetBlock(width, groups, norm_epsilon, name=f"up_{i}_resnet_{j}", dtype=dtype)(x)
        if i < len(channels) - 1:
            x = Upsample(width, name=f"up_{i}_upsample", dtype=dtype)(x)
    x = group_norm(groups, norm_epsilon, "norm_out", dtype, swish=True)(x)
    x = conv(image_channels, 3, "conv_out", dtype)(x)
    return keras.Model(latent, x, name="decoder")


def middle(x, width: int, groups: int, norm_epsilon: float, mid_attention: bool, dtype):
    """Residual block, attention, residual block: what stands between the levels of both halves."""
    x = ResnetBlock(width, groups, norm_epsilon, name="mid_resnet_0", dtype=dtype)(x)
    if mid_attention:
        x = AttentionBlock(width, groups, norm_epsilon, name="mid_attention", dtype=dtype)(x)
    return ResnetBlock(width, groups, norm_epsilon, name="mid_resnet_1", dtype=dtype)(x)


@register
class Autoencoder(keras.Model):
    """Stable Diffusion's autoencoder; as a model, the reconstruction of an image from its posterior's mean.

    The defaults are those of Stable Diffusion; with `norm_epsilon=1e-5` it equals the documents' code.

    Args:
        channels: channels of each level, from the full size down; each divisible by `groups`.
        blocks_per_level: residual blocks of a level in the encoder; the decoder has one more.
        latent_channels: channels of the latent.
        image_channels: channels of the image.
        groups: groups of the norms.
        norm_epsilon: epsilon of the norms.
        scaling_factor: what the latent is multiplied by, so that its variance is about one.
        shift_factor: what is taken off the latent before that.
        mid_attention: whether the middle of both halves attends.
        name, dtype: Keras' own.

    Attributes:
        encoder: model image (B, H, W, 3) in [-1, 1] -> moments (B, h, w, 2 latent_channels).
        decoder: model unscaled latent (B, h, w, latent_channels) -> image (B, H, W, 3) in [-1, 1].
        factor: H / h, a power of two.

    Raises:
        ValueError: `groups` does not divide the channels.
    """

    def __init__(
        self,
        channels: Sequence[int] = (128, 256, 512, 512),
        blocks_per_level: int = 2,
        *,
        latent_channels: int = 4,
        image_channels: int = 3,
        groups: int = 32,
        norm_epsilon: float = 1e-6,
        scaling_factor: float = 0.18215,
        shift_factor: float = 0.0,
        mid_attention: bool = True,
        name: str = "autoencoder",
        dtype=None,
    ):
        sizes = (
            channels,
            blocks_per_level,
            latent_channels,
            image_channels,
            groups,
            norm_epsilon,
            mid_attention,
            dtype,
        )
        encoder, decoder = build_encoder(*sizes), build_decoder(*sizes)
        mean = encoder.output[..., :latent_channels]
        super().__init__(encoder.input, decoder(mean), name=name)
        self.encoder, self.decoder = encoder, decoder
        self.factor = 2 ** (len(channels) - 1)
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self.latent_channels = latent_channels
        self.config = {
            "channels": list(channels),
            "blocks_per_level": blocks_per_level,
            "latent_channels": latent_channels,
            "image_channels": image_channels,
            "groups": groups,
            "norm_epsilon": norm_epsilon,
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
            "mid_attention": mid_attention,
        }

    def moments(self, image):
        """The posterior of an image: (B, H, W, 3) in [-1, 1] -> mean and log variance, each (B, h, w, c), unscaled."""
        return ops.split(self.encoder(image), 2, axis=-1)

    def encode(self, image):
        """The posterior's mean, scaled: (B, H, W, 3) in [-1, 1] -> (B, h, w, c)."""
        mean, _ = self.moments(image)
        return self.scale(mean)

    def decode(self, latent):
        """The image of a scaled latent: (B, h, w, c) -> (B, H, W, 3) in [-1, 1], not clipped."""
        return self.decoder(self.unscale(latent))

    def sample(self, image, eps):
        """A draw from the posterior, scaled: (B, H, W, 3) in [-1, 1], eps normal (B, h, w, c) -> (B, h, w, c)."""
        mean, log_variance = self.moments(image)
        return self.scale(mean + ops.exp(0.5 * ops.clip(log_variance, -30.0, 20.0)) * eps)

    def scale(self, latent):
        """What the encoder says -> what the UNet sees."""
        return (latent - self.shift_factor) * self.scaling_factor

    def unscale(self, latent):
        """What the UNet sees -> what the decoder is told."""
        return latent / self.scaling_factor + self.shift_factor

    def get_config(self) -> dict:
        policy = self.encoder.get_layer("conv_in").dtype_policy.name
        return {**self.config, "name": self.name, "dtype": policy}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None):
        return cls(**config)

    @classmethod
    def from_preset(
        cls,
        preset: str,
        norm_epsilon: float | None = None,
        dtype: str | None = None,
        *,
        variant: str | None = None,
        ema: bool = False,
    ) -> "Autoencoder":
        """The autoencoder of a pipeline, or of a directory or a file of its own; see `presets.load_autoencoder`."""
        from latentdiff import presets

        return presets.load_autoencoder(preset, norm_epsilon=norm_epsilon, dtype=dtype, variant=variant, ema=ema)
