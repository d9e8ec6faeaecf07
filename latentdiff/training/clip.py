"""Training of the CLIP pair: a picture's vector is to lie nearest to that of its own caption, of all in the batch.

    loss = (CE(exp(s) I T^t, i) + CE(exp(s) T I^t, i)) / 2,    I, T (B, E) of unit length, s the learnt temperature

Reference: Radford et al. 2021, sec. 2.3 and fig. 3, arXiv:2103.00020.
"""

import math
import os
from typing import Any

import keras
from keras import ops

from latentdiff import presets_clip
from latentdiff.backend import gather_replicas, to_numpy
from latentdiff.models.image_encoder import CLIPImageEncoder
from latentdiff.models.layers import dense
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.training.step import TrainingModel

TEMPERATURE = 0.07
LARGEST_SCALE = 100.0


@keras.saving.register_keras_serializable(package="latentdiff")
class AtMost(keras.constraints.Constraint):
    """Cuts a variable, after each update, at a largest value."""

    def __init__(self, largest: float):
        self.largest = largest

    def __call__(self, w):
        return ops.minimum(w, self.largest)

    def get_config(self) -> dict:
        return {"largest": self.largest}


class CLIPTraining(TrainingModel):
    """Trains a text encoder and an image encoder to give captions and their pictures vectors of the same direction.

    A caption's vector is the context at its first end token, projected by a dense layer without bias. The logits are
    the cosines of all pictures and captions in the batch times exp(`logit_scale`), in float32 whatever the networks
    compute in; the loss is the mean of both directions' cross entropy. The batch's other captions are what a picture is
    told from, so equal captions in one batch contradict each other.

    The negatives are those of the batch that is differentiated at once. With `gradient_accumulation_steps=k` that is
    each of the k small batches by itself: accumulation saves no negatives. With `keras.distribution` on JAX, and under
    TensorFlow's `MirroredStrategy`, where the replicas hand each other their vectors, it is the whole global batch.

    Args:
        text_encoder: gives contexts of its `width`.
        image_encoder: gives embeddings of its `projection_dim`, E.
        end_id: the token that ends a prompt, `CLIPTokenizer.end_id`.
        projection_dim: E, as a check; None takes the image encoder's.
        temperature: at the beginning: `logit_scale` starts at log(1 / temperature).
        ema_decay: of the weights' average; None keeps none.
        seed: as every training's; nothing is drawn here.
        name: Keras' own.

    Attributes:
        text_projection: the dense layer (B, D) -> (B, E).
        logit_scale: log(1 / temperature), a float32 variable cut at log 100 after each update. Weight decay is not
            meant for it: `optimizer.exclude_from_weight_decay([training.logit_scale])`.
        image_to_text, text_to_image: metrics: the share of pictures whose own caption is the nearest in the batch, and
            of captions whose own picture is.

    Batches:
        {"image": float (B, H, W, 3) in [-1, 1], "tokens": int (B, S)}. CLIP's mean and deviation are applied by the
        image encoder, not here and not by the data.

    Raises:
        ValueError: `projection_dim` is not the image encoder's, `end_id` is no token of the text encoder, or
            `temperature` is not in [0.01, inf).
    """

    def __init__(
        self,
        text_encoder: CLIPTextEncoder,
        image_encoder: CLIPImageEncoder,
        end_id: int,
        projection_dim: int | None = None,
        temperature: float = TEMPERATURE,
        *,
        ema_decay: float | None = None,
        seed: int = 0,
        name="clip_training",
    ):
        super().__init__(text_encoder, ema_decay, seed, name)
        policy = text_encoder.get_layer("token_embedding").dtype_policy
        vocabulary_size, embedding_dim = text_encoder.config["vocabulary_size"], image_encoder.config["projection_dim"]
        if projection_dim not in (None, embedding_dim):
            received = f"projection_dim={projection_dim}, {embedding_dim}"
            raise ValueError(f"`projection_dim` must be the image encoder's. Received: {received}.")
        if not 0 <= end_id < vocabulary_size:
            raise ValueError(f"`end_id` must be in 0..{vocabulary_size - 1}. Received: end_id={end_id}.")
        if not 1 / LARGEST_SCALE <= temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0.01. Received: temperature={temperature}.")
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.end_id = end_id
        self.text_projection = dense(embedding_dim, "text_projection", policy, use_bias=False)
        self.text_projection.build((None, text_encoder.config["width"]))
        self.logit_scale = self.add_weight(
            (),
            keras.initializers.Constant(math.log(1 / temperature)),
            "float32",
            constraint=AtMost(math.log(LARGEST_SCALE)),
            autocast=False,
            name="logit_scale",
        )
        self.image_to_text = keras.metrics.Mean(name="image_to_text")
        self.text_to_image = keras.metrics.Mean(name="text_to_image")

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike,
        dtype: str | None = "float32",
        *,
        variant: str | None = None,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> "CLIPTraining":
        """Goes on from the pair of a CLIPModel's directory; see `presets_clip.load_clip`."""
        parts = presets_clip.load_clip(preset, dtype, variant=variant)
        training = cls(parts.text_encoder, parts.image_encoder, parts.end_id, ema_decay=ema_decay, seed=seed)
        training.text_projection.kernel.assign(parts.text_projection)
        training.logit_scale.assign(parts.logit_scale)
        return training

    def save_to_preset(
        self,
        directory: str | os.PathLike,
        tokenizer: CLIPTokenizer | None = None,
        dtype: str | None = "float32",
        overwrite: bool = False,
        *,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes a CLIPModel's directory, whole or not at all; see `presets_clip.save_clip`."""
        parts = presets_clip.CLIPParts(
            self.text_encoder,
            self.image_encoder,
            to_numpy(self.text_projection.kernel, "float32"),
            float(self.logit_scale),
            self.end_id,
            tokenizer,
        )
        presets_clip.save_clip(parts, directory, dtype, overwrite, max_shard_size=max_shard_size)

    def call(self, batch, training=False):
        """batch as in the class -> embeddings of images and of captions, each float32 (B, E) of unit length."""
        return self.embed_image(batch["image"], training), self.embed_text(batch["tokens"], training)

    def embed_image(self, image, training=False):
        """image: (B, H, W, 3) in [-1, 1] -> float32 (B, E) of unit length."""
        return unit(self.image_encoder(image, training=training))

    def embed_text(self, tokens, training=False):
        """tokens: int (B, S), each with an end token -> float32 (B, E) of unit length."""
        context = self.text_encoder(tokens, training=training)  # (B, S, D)
        end = ops.argmax(ops.cast(ops.equal(tokens, self.end_id), "int32"), axis=1)  # (B,) the first one
        pooled = ops.take_along_axis(context, end[:, None, None], axis=1)[:, 0]  # (B, D)
        return unit(self.text_projection(pooled))

    def logits(self, image_embedding, text_embedding):
        """(B, E), (B', E) of unit length -> float32 (B, B'): cosines over the temperature, a row for each image."""
        return ops.exp(self.logit_scale) * ops.matmul(image_embedding, ops.transpose(text_embedding))

    def compute_loss(self, x: Any = None, y=None, y_pred: Any = None, sample_weight=None, training=True):
        """The mean loss of what `call` gives, and the metrics; of a replica, its share of the global batch's loss."""
        image, text = (ops.cast(embedding, "float32") for embedding in y_pred)  # (B, E)
        all_image, all_text, first = gather_replicas(image, text)  # (B', E), B' of all replicas
        to_text = self.logits(image, all_text)  # (B, B')
        to_image = ops.transpose(self.logits(all_image, text))  # (B, B')
        own = first + ops.arange(ops.shape(image)[0])
        for metric, logits in ((self.image_to_text, to_text), (self.text_to_image, to_image)):
            metric.update_state(ops.equal(ops.cast(ops.argmax(logits, axis=1), own.dtype), own))
        losses = [
            ops.mean(ops.sparse_categorical_crossentropy(own, logits, from_logits=True))
            for logits in (to_text, to_image)
        ]
        return self.finish_loss((losses[0] + losses[1]) / 2)


def unit(x):
    """x: (B, E) -> float32 (B, E), each row divided by its length."""
    x = ops.cast(x, "float32")
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), 1e-12))
