"""The UNet: (latent, timestep, context) -> prediction.

References: Ho et al. 2020, appendix B, arXiv:2006.11239; Rombach et al. 2022, sec. 3.3 and appendix E,
arXiv:2112.10752.
"""

from collections.abc import Sequence

import keras

from latentdiff.models.attention import SpatialTransformer
from latentdiff.models.layers import Downsample, ResnetBlock, TimestepEmbedding, Upsample, conv, dense, register
from latentdiff.models.norms import group_norm


@register
class UNet(keras.Model):
    """The denoising network of Stable Diffusion, a functional model with named inputs.

    The defaults are those of Stable Diffusion 1.x. Levels are counted from the full size down.

    Args:
        in_channels: channels of the latent.
        out_channels: channels of the prediction.
        channels: channels of each level; each divisible by `groups`.
        blocks_per_level: residual blocks of a level on the way down; the way up has one more.
        attention: whether a level attends to the context.
        heads: heads of each level's attention; one int for all. Not their width.
        transformer_depth: transformer blocks behind each residual block; one int for all levels.
        context_dim: D of the context.
        dense_projection: transformers project with dense layers (SD 2.x) and not 1 x 1 convolutions (SD 1.x).
        groups: groups of the norms.
        norm_epsilon: epsilon of the residual blocks' norms.
        entry_epsilon: epsilon of the norms at the transformers' entries; 1e-5 in KerasCV.
        gelu: of the transformers' gated MLPs, "exact", or "tanh" as in KerasCV.
        flip_sin_to_cos, freq_shift: see `timestep_embedding`.
        mid_attention: whether the middle attends to the context.
        name, dtype: Keras' own; dtype is a policy, "float32", "bfloat16" (weights held so too), "mixed_bfloat16" ...

    Inputs:
        latent (B, h, w, in_channels), timestep float (B,) in 0 .. T - 1 as SD's networks are told it,
        context (B, S, context_dim) -> (B, h, w, out_channels).

    Raises:
        ValueError: tuples of different lengths; groups or heads that do not divide the channels; unknown `gelu`.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        *,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        blocks_per_level: int = 2,
        attention: Sequence[bool] = (True, True, True, False),
        heads: int | Sequence[int] = 8,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int = 768,
        dense_projection: bool = False,
        groups: int = 32,
        norm_epsilon: float = 1e-5,
        entry_epsilon: float = 1e-6,
        gelu: str = "exact",
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        mid_attention: bool = True,
        name: str = "unet",
        dtype=None,
    ):
        levels = len(channels)
        heads = per_level("heads", heads, levels)
        depths = per_level("transformer_depth", transformer_depth, levels)
        attention = per_level("attention", attention, levels)

        def resnet(x, width, name):
            return ResnetBlock(width, groups, norm_epsilon, time=True, zero=True, name=name, dtype=dtype)(x, time)

        def attend(x, level, name):
            return SpatialTransformer(
                channels[level],
                heads[level],
                depths[level],
                groups,
                dense_projection,
                entry_epsilon=entry_epsilon,
                gelu=gelu,
                name=name,
                dtype=dtype,
            )(x, context)

        latent = keras.Input((None, None, in_channels), name="latent", dtype="float32")
        timestep = keras.Input((), name="timestep", dtype="float32")
        context = keras.Input((None, context_dim), name="context", dtype="float32")

        time = TimestepEmbedding(channels[0], flip_sin_to_cos, freq_shift, name="timestep_embedding")(timestep)
        time = dense(4 * channels[0], "time_mlp_1", dtype)(time)
        time = dense(4 * channels[0], "time_mlp_2", dtype)(keras.ops.silu(time))  # (B, 4 C)

        x = conv(channels[0], 3, "conv_in", dtype)(latent)
        skips = [x]
        for i, width in enumerate(channels):
            for j in range(blocks_per_level):
                x = resnet(x, width, f"down_{i}_resnet_{j}")
                if attention[i]:
                    x = attend(x, i, f"down_{i}_attention_{j}")
                skips.append(x)
            if i < levels - 1:
                x = Downsample(width, name=f"down_{i}_downsample", dtype=dtype)(x)
                skips.append(x)

        x = resnet(x, channels[-1], "mid_resnet_0")
        if mid_attention:
            x = attend(x, levels - 1, "mid_attention")
        x = resnet(x, channels[-1], "mid_resnet_1")

        for i, level in enumerate(reversed(range(levels))):
            for j in range(blocks_per_level + 1):
                features = x
                x = keras.layers.Concatenate(name=f"up_{i}_skip_{j}", dtype=dtype)([x, skips.pop()])
                x = resnet(x, channels[level], f"up_{i}_resnet_{j}")
                if attention[level]:
                    x = attend(x, level, f"up_{i}_attention_{j}")
            if level > 0:
                x = Upsample(channels[level], name=f"up_{i}_upsample", dtype=dtype)(x, skips[-1])

        x = group_norm(groups, norm_epsilon, "norm_out", dtype, swish=True)(x)
        x = conv(out_channels, 3, "conv_out", dtype, zero=True)(x)
        super().__init__({"latent": latent, "timestep": timestep, "context": context}, x, name=name)
        self._features = features
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "blocks_per_level": blocks_per_level,
            "attention": attention,
            "heads": heads,
            "transformer_depth": depths,
            "context_dim": context_dim,
            "dense_projection": dense_projection,
            "groups": groups,
            "norm_epsilon": norm_epsilon,
            "entry_epsilon": entry_epsilon,
            "gelu": gelu,
            "flip_sin_to_cos": flip_sin_to_cos,
            "freq_shift": freq_shift,
            "mid_attention": mid_attention,
        }

    def split(self) -> tuple[keras.Model, keras.Model]:
        """This network as two over the same layers, of which the second may take what the first gave at another step.

        Shallow are the first convolution, the last residual block of the way up with its attention, and the output.

        Returns:
            deep: [latent, timestep, context] -> features (B, h, w, C).
            shallow: [latent, timestep, context, features] -> prediction (B, h, w, out_channels).

        Reference:
            Ma et al. 2023, sec. 3.3, arXiv:2312.00858, at the outermost skip connection.
        """
        inputs = [self.input[name] for name in ("latent", "timestep", "context")]
        deep = keras.Model(inputs, self._features, name=f"{self.name}_deep")
        return deep, keras.Model([*inputs, self._features], self.output, name=f"{self.name}_shallow")

    def get_config(self) -> dict:
        return {**self.config, "name": self.name, "dtype": policy_config(self)}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None):
        return cls(**config)

    @classmethod
    def from_preset(
        cls, preset: str, dtype: str | None = None, *, variant: str | None = None, ema: bool = False
    ) -> "UNet":
        """The UNet of a pipeline, or of a directory or a file of its own; see `latentdiff.presets.load_unet`."""
        from latentdiff import presets

        return presets.load_unet(preset, dtype=dtype, variant=variant, ema=ema)


def per_level(name: str, value, levels: int) -> list:
    """One value a level, as a list; raises ValueError where there is another number of them."""
    values = [value] * levels if isinstance(value, (int, bool)) else list(value)
    if len(values) != levels:
        raise ValueError(f"`{name}` must have one value for each of `channels`. Received: {name}={value}.")
    return values


def policy_config(model: keras.Model):
    """The dtype policy of a model's layers, as its configuration holds it."""
    return model.get_layer("conv_in").dtype_policy.name
