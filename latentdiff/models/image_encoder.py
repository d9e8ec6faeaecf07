"""CLIP's image encoder: image -> one vector, which lies near those of the captions that fit.

Reference: Radford et al. 2021, sec. 2.4, arXiv:2103.00020; Dosovitskiy et al. 2021, eq. 1-4, arXiv:2010.11929.
"""

from collections.abc import Sequence

import keras

from latentdiff.models.attention import CLIPLayer
from latentdiff.models.layers import ClassToken, PositionEmbedding, dense, kernel_initializer, register
from latentdiff.models.norms import layer_norm

# Of the pictures that CLIP was trained on, by channel, where black is 0 and white is 1.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@register
class CLIPImageEncoder(keras.Model):
    """The vision transformer of CLIP with its projection, a functional model.

    The patches' vectors and a class token pass a norm, the layers and, the class token alone, a norm and a dense layer
    without bias. An image comes in as everywhere here, in [-1, 1]; CLIP's shift to mean 0 and deviation 1 is the
    network's first layer, so nobody else is to apply it.

    The defaults are those of CLIP ViT-L/14; OpenCLIP ViT-H/14 has width 1280, 32 layers, 16 heads, MLPs of 5120, "gelu"
    and a projection of 1024.

    Args:
        image_size: H = W, in pixels; `patch_size` divides it.
        patch_size: side of a patch, in pixels.
        width: D.
        depth: layers.
        heads: divides `width`.
        mlp_width: width between a layer's two dense layers.
        projection_dim: E, which the text encoder's projection shares.
        activation: "quick_gelu", "gelu" or "gelu_tanh".
        norm_epsilon: epsilon of the norms.
        image_mean, image_std: of each channel, where black is 0 and white is 1.
        name, dtype: Keras' own.

    Inputs:
        image float (B, H, W, 3) in [-1, 1] -> embedding (B, E), not of unit length.

    Raises:
        ValueError: `patch_size` does not divide `image_size`, `heads` does not divide `width`, `image_mean` or
            `image_std` are not three numbers, a deviation is not positive, or `activation` is unknown.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        *,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        mlp_width: int = 4096,
        projection_dim: int = 768,
        activation: str = "quick_gelu",
        norm_epsilon: float = 1e-5,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        name: str = "image_encoder",
        dtype=None,
    ):
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            received = f"image_size={image_size}, patch_size={patch_size}"
            raise ValueError(f"`image_size` must be divisible by `patch_size`. Received: {received}.")
        for argument, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != 3 or (argument == "image_std" and min(values) <= 0):
                kind = "three positive numbers" if argument == "image_std" else "three numbers"
                raise ValueError(f"`{argument}` must be {kind}. Received: {argument}={values!r}.")
        positions = (image_size // patch_size) ** 2  # N

        image = keras.Input((image_size, image_size, 3), name="image", dtype="float32")
        # ((image + 1) / 2 - mean) / std, in float32: the networks' own dtype begins behind it.
        scale = [0.5 / std for std in image_std]
        offset = [(0.5 - mean) / std for mean, std in zip(image_mean, image_std, strict=True)]
        x = keras.layers.Rescaling(scale, offset, name="normalization", dtype="float32")(image)
        x = keras.layers.Conv2D(
            width,
            patch_size,
            patch_size,
            use_bias=False,
            kernel_initializer=kernel_initializer(),
            name="patch_embedding",
            dtype=dtype,
        )(x)  # (B, h, w, D)
        x = keras.layers.Reshape((positions, width), name="patches", dtype=dtype)(x)  # (B, N, D)
        x = ClassToken(width, name="class_token", dtype=dtype)(x)  # (B, 1 + N, D)
        x = PositionEmbedding(1 + positions, width, name="position_embedding", dtype=dtype)(x)
        x = layer_norm(norm_epsilon, "pre_norm", dtype)(x)
        for i in range(depth):
            x = CLIPLayer(
                width, heads, mlp_width, activation, norm_epsilon, causal=False, name=f"layer_{i}", dtype=dtype
            )(x)
        x = layer_norm(norm_epsilon, "post_norm", dtype)(x[:, 0])  # (B, D)
        x = dense(projection_dim, "projection", dtype, use_bias=False)(x)  # (B, E)
        super().__init__(image, x, name=name)
        self.config = {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_width": mlp_width,
            "projection_dim": projection_dim,
            "activation": activation,
            "norm_epsilon": norm_epsilon,
            "image_mean": list(image_mean),
            "image_std": list(image_std),
        }

    def get_config(self) -> dict:
        policy = self.get_layer("patch_embedding").dtype_policy.name
        return {**self.config, "name": self.name, "dtype": policy}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None):
        return cls(**config)

    @classmethod
    def from_preset(cls, preset: str, dtype: str | None = None, *, variant: str | None = None) -> "CLIPImageEncoder":
        """The image encoder of a CLIPModel's directory; see `presets_clip.load_image_encoder`."""
        from latentdiff import presets_clip

        return presets_clip.load_image_encoder(preset, dtype=dtype, variant=variant)
