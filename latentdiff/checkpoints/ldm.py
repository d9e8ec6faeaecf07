"""A single file in LDM's layout as a source: Stable Diffusion 1.x or 2.x, or the UNet or the autoencoder alone.

What it holds is read from its names and shapes; see `ldm_config` for what they do not say, and `ldm_settings` for the
schedule and the prediction. Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.checkpoints import diffusers_text_encoder, ldm_config, ldm_keys
from latentdiff.checkpoints.clip_vocabulary import clip_tokenizer
from latentdiff.checkpoints.diffusers import KINDS, Component
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.key_map import Entry, Weights, as_dtype, match
from latentdiff.checkpoints.ldm_others import refuse_others
from latentdiff.checkpoints.ldm_settings import SETTINGS_KEYS, read_scaling, read_settings
from latentdiff.checkpoints.safetensors_files import StoredTensor, open_file_with_metadata

NESTING = "state_dict."  # of files that were flattened with their training's other state
EMA = "model_ema."
TRANSFORMERS, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

# What training leaves behind: losses, buffers that follow from the schedule, counters, masks.
_IGNORED = re.compile(
    r"(loss\..*|logvar|lvlb_weights|global_step|epoch|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_\w+|model_ema\.(decay|num_updates)"
    r"|cond_stage_model\.(logit_scale|transformer\.(text_model\.)?embeddings\.position_ids)"
    r"|cond_stage_model\.model\.(logit_scale|text_projection|attn_mask)"
    rf"|cond_stage_model\.model\.transformer\.resblocks\.{ldm_config.OPEN_CLIP_LAYERS}\..*)"
)
_UNET_WORDS = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
_AUTOENCODER_WORDS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


class LDMFile:
    """See `sources.Source`.

    Args:
        path: A `.safetensors` file.
        ema: Whether the averaged weights are read, `model_ema.*`; the others are ignored then, and else they are.
        prediction: "eps", "v" or "x0"; None is what the file says, see `ldm_settings`.
        contents: The file's tensors and metadata, where somebody else has opened it.

    Raises:
        CheckpointError: It is something else, which is named where it is known.
    """

    form = "single file in LDM's layout"

    def __init__(
        self,
        path: Path,
        *,
        ema: bool = False,
        prediction: str | None = None,
        contents: tuple[Mapping[str, StoredTensor], Mapping[str, str]] | None = None,
    ):
        tensors, self._metadata = contents or open_file_with_metadata(path)
        self.path = path
        self._prediction = prediction
        self._tensors = _without_nesting(tensors)
        self._ema = ema
        refuse_others({name: tensor.shape for name, tensor in self._tensors.items()}, self._metadata, str(path))
        self._parts = _find_parts(self._tensors)
        if not self._parts:
            raise CheckpointError(
                f"`{path}` must be Stable Diffusion in LDM's layout. Received: {len(self._tensors)} tensors,"
                f" none of a name that is known here: {', '.join(sorted(self._tensors)[:3])!r:.200}."
            )
        if ema and not self.has_ema:
            raise CheckpointError(f"`ema` needs averaged weights, `{EMA}*`. Received: `{path}`, which has none.")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in KINDS if kind in self._parts)

    @property
    def has_ema(self) -> bool:
        """Whether there are averaged weights beside the others."""
        return any(name.startswith(EMA) for name in self._without_training())

    def left_over(self) -> tuple[str, ...]:
        """The keys of no part, which nobody here knows."""
        known = (EMA, *(word for _, words in self._parts.values() for word in words))
        names = (name for name in self._without_training() if not name.startswith(known))
        return tuple(sorted(name for name in names if name not in SETTINGS_KEYS))

    def component(self, kind: str, *, dtype: str | np.dtype | None = None, variant: str | None = None) -> Component:
        if variant is not None:
            raise CheckpointError(f"A single file has no variants. Received: variant={variant!r} for `{self.path}`.")
        if kind not in self._parts:
            raise FileNotFoundError(f"`{self.path}` holds no {kind}; it holds {', '.join(self.kinds)}.")
        if self.left_over():
            unknown = "\n  ".join(self.left_over())
            raise CheckpointError(f"`{self.path}` must hold Stable Diffusion and nothing else. Left over:\n  {unknown}")
        config, entries = self._describe(kind)
        tensors, ignored = self._part(kind)
        sources = match(entries, tensors, ignored, str(self.path))
        weights = Weights(sources, as_dtype(dtype))
        return Component(kind, self.path, config, {}, weights, tuple(sorted(ignored)))

    def settings(self) -> SamplerSettings:
        missing = [kind for kind in KINDS if kind not in self._parts]
        if missing:
            raise FileNotFoundError(f"`{self.path}` is no whole pipeline. It lacks: {', '.join(missing)}")
        return self._settings

    def tokenizer(self) -> dict[str, Any]:
        if "text_encoder" not in self._parts:
            raise FileNotFoundError(f"`{self.path}` holds no text encoder, and so stands for no tokenizer.")
        return clip_tokenizer("!") if self._is_v2() else clip_tokenizer()

    def sample_size(self) -> tuple[int, int] | None:
        # Stable Diffusion 2.x that predicts v was trained on 768 pixels, everything else on 512.
        size = 96 if self._is_v2() and self._settings.prediction == "v" else 64
        return (size, size)

    @cached_property
    def _settings(self) -> SamplerSettings:
        return read_settings(self._tensors, self._metadata, self._is_v2(), self._prediction, str(self.path))

    def _is_v2(self) -> bool:
        return self._parts.get("text_encoder", ("", ()))[0] == OPEN_CLIP

    def _without_training(self) -> list[str]:
        return [name for name in self._tensors if not _IGNORED.fullmatch(name)]

    def _part(self, kind: str) -> tuple[dict[str, StoredTensor], set[str]]:
        """The tensors of a part, the averaged ones among them, and which of them are not read."""
        _, words = self._parts[kind]
        tensors = {name: tensor for name, tensor in self._tensors.items() if name.startswith(words)}
        ignored = {name for name in tensors if _IGNORED.fullmatch(name)}
        if kind == self._averaged():
            twins = {name: tensor for name, tensor in self._tensors.items() if name.startswith(EMA)}
            unread = tensors if self._ema else twins
            ignored |= unread.keys() | {name for name in twins if _IGNORED.fullmatch(name)}
            tensors |= twins
        return _split_fused(tensors, ignored), ignored

    def _averaged(self) -> str:
        """The part whose average `model_ema.*` is: the UNet; in an autoencoder's own file the autoencoder."""
        return "unet" if "unet" in self._parts else "autoencoder"

    def _describe(self, kind: str) -> tuple[dict[str, Any], list[Entry]]:
        """A part's configuration, and its key map under the file's full names."""
        prefix, words = self._parts[kind]
        if kind == "text_encoder" and prefix == TRANSFORMERS:
            word = diffusers_text_encoder.PREFIX
            config = ldm_config.clip_config(self._shapes(words, prefix, word), str(self.path))
            entries = diffusers_text_encoder.key_map(config)
        else:
            read_config, key_map = _LAYOUTS[kind]
            config = read_config(self._shapes(words, prefix), str(self.path))
            entries = key_map(config)
        if kind == "autoencoder":
            config["scaling_factor"] = read_scaling(self._tensors, config["scaling_factor"], str(self.path))
        full = [replace(entry, keys=tuple(prefix + key for key in entry.keys)) for entry in entries]
        if self._ema and kind == self._averaged():
            full = [replace(entry, keys=tuple(ldm_keys.ema_key(key) for key in entry.keys)) for entry in full]
        return config, full

    def _shapes(self, words: tuple[str, ...], prefix: str, more: str = "") -> dict[str, tuple[int, ...]]:
        """The shapes of what begins with one of `words`, under the names behind `prefix`, and `more` if it is there."""
        return {
            name.removeprefix(prefix).removeprefix(more): tensor.shape
            for name, tensor in self._tensors.items()
            if name.startswith(words)
        }


_LAYOUTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., list[Entry]]]] = {
    "unet": (ldm_config.unet_config, ldm_keys.unet_key_map),
    "autoencoder": (ldm_config.autoencoder_config, ldm_keys.autoencoder_key_map),
    "text_encoder": (ldm_config.open_clip_config, ldm_keys.open_clip_key_map),
}


def _without_nesting(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    bare = {name.removeprefix(NESTING): tensor for name, tensor in tensors.items()}
    # Two names that become one stay as they are, and are left over.
    return bare if len(bare) == len(tensors) else dict(tensors)


def _find_parts(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind -> its prefix, "" in a file of its own, and the words that its tensors' names begin with."""
    parts: dict[str, tuple[str, tuple[str, ...]]] = {}
    for kind, prefix, first, words in (
        ("unet", "model.diffusion_model.", "input_blocks.0.0.weight", _UNET_WORDS),
        ("autoencoder", "first_stage_model.", "decoder.conv_in.weight", _AUTOENCODER_WORDS),
    ):
        if any(name.startswith(prefix) for name in tensors):
            parts[kind] = (prefix, (prefix,))
        elif first in tensors:
            parts[kind] = ("", words)
    for prefix in (TRANSFORMERS, OPEN_CLIP):
        if any(name.startswith(prefix) for name in tensors):
            parts["text_encoder"] = (prefix, (prefix,))
    return parts


def _split_fused(tensors: Mapping[str, StoredTensor], ignored: set[str]) -> dict[str, StoredTensor]:
    """The tensors with each `attn.in_proj_weight` and `_bias` as the three that lie in it, one below the other."""
    split: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".in_proj_")
        if leaf in ("weight", "bias") and name not in ignored and tensor.shape and tensor.shape[0] % 3 == 0:
            for part, third in zip(ldm_keys.FUSED_PARTS, tensor.thirds(), strict=True):
                split[f"{module}.{part}.{leaf}"] = third
        else:
            split[name] = tensor
    return split
