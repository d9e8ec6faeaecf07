"""CLIP's text encoder: tokens -> context.

Reference: Radford et al. 2021, sec. 2.4, arXiv:2103.00020.
"""

import keras

from latentdiff.models.attention import CLIPLayer
from latentdiff.models.layers import PositionEmbedding, embedding_initializer, register
from latentdiff.models.norms import layer_norm


@register
class CLIPTextEncoder(keras.Model):
    """The text transformer of CLIP up to its final norm, a functional model.

    The defaults are those of CLIP ViT-L/14, Stable Diffusion 1.x; SD 2.x has width 1024, 23 layers, 16 heads, "gelu".

    Args:
        vocabulary_size: how many tokens there are.
        context_length: S, the longest sequence of tokens.
        width: D.
        depth: layers.
        heads: divides `width`.
        mlp_width: width between a layer's two dense layers.
        activation: "quick_gelu", "gelu" or "gelu_tanh".
        norm_epsilon: epsilon of the norms.
        name, dtype: Keras' own.

    Inputs:
        tokens int (B, S) -> context (B, S, D).

    Raises:
        ValueError: unknown `activation`, or `heads` does not divide `width`.
    """

    def __init__(
        self,
        vocabulary_size: int = 49408,
        context_length: int = 77,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_width: int = 3072,
        activation: str = "quick_gelu",
        norm_epsilon: float = 1e-5,
        name: str = "text_encoder",
        dtype=None,
    ):
        tokens = keras.Input((None,), name="tokens", dtype="int32")
        x = keras.layers.Embedding(
            vocabulary_size,
            width,
            embeddings_initializer=embedding_initializer(),
            name="token_embedding",
            dtype=dtype,
        )(tokens)
        x = PositionEmbedding(context_length, width, name="position_embedding", dtype=dtype)(x)
        for i in range(depth):
            x = CLIPLayer(width, heads, mlp_width, activation, norm_epsilon, name=f"layer_{i}", dtype=dtype)(x)
        x = layer_norm(norm_epsilon, "final_norm", dtype)(x)
        super().__init__(tokens, x, name=name)
        self.config = {
            "vocabulary_size": vocabulary_size,
            "context_length": context_length,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_width": mlp_width,
            "activation": activation,
            "norm_epsilon": norm_epsilon,
        }

    def get_config(self) -> dict:
        policy = self.get_layer("token_embedding").dtype_policy.name
        return {**self.config, "name": self.name, "dtype": policy}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None):
        return cls(**config)

    @classmethod
    def from_preset(cls, preset: str, dtype: str | None = None, *, variant: str | None = None) -> "CLIPTextEncoder":
        """The text encoder of a pipeline, or of a directory of its own; see `presets.load_text_encoder`."""
        from latentdiff import presets

        return presets.load_text_encoder(preset, dtype=dtype, variant=variant)
