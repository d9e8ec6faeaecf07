"""Latent diffusion in Keras 3: a prompt goes in, a picture comes out.

`import latentdiff` imports neither Keras nor a backend; the first use of a name below does.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.image_encoder import CLIPImageEncoder
    from latentdiff.models.text_encoder import CLIPTextEncoder
    from latentdiff.models.tokenizer import CLIPTokenizer
    from latentdiff.models.unet import UNet
    from latentdiff.pipeline import TextToImage
    from latentdiff.tiled_decoder import TiledDecoder

# TensorFlow leaves oneDNN off on processors without VNNI; there too a training step takes half the time with it. Read
# when TensorFlow is first imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

__version__ = "0.1.0"

__all__ = [
    "Autoencoder",
    "CLIPImageEncoder",
    "CLIPTextEncoder",
    "CLIPTokenizer",
    "TextToImage",
    "TiledDecoder",
    "UNet",
    "__version__",
]

_MODULES = {
    "Autoencoder": "latentdiff.models.autoencoder",
    "CLIPImageEncoder": "latentdiff.models.image_encoder",
    "CLIPTextEncoder": "latentdiff.models.text_encoder",
    "CLIPTokenizer": "latentdiff.models.tokenizer",
    "TextToImage": "latentdiff.pipeline",
    "TiledDecoder": "latentdiff.tiled_decoder",
    "UNet": "latentdiff.models.unet",
}


def __getattr__(name: str) -> object:
    """The public name `name`, imported when it is first asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
