"""Models of a hub, named `hf://owner/name`, `hf://owner/name@revision` or `hf://owner/name/file.safetensors`.

`huggingface_hub`, an extra, fetches into its own cache and finds again what is there, also without a network
(`HF_HUB_OFFLINE=1`). Of a repository only those files are asked for that a model is read from: safetensors of one
variant, JSON, and the tokenizer's text.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from latentdiff.checkpoints import clip_directory
from latentdiff.checkpoints.diffusers import KINDS
from latentdiff.checkpoints.files import PICKLE_SUFFIXES, CheckpointError, pickle_message

SCHEME = "hf://"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ADDRESS = re.compile(rf"hf://({_WORD}/{_WORD})(?:@({_WORD}))?(?:/(.*))?")


class Address(NamedTuple):
    """A repository, a branch, tag or commit of it or None, and a file in it or None."""

    repository: str
    revision: str | None
    file: str | None


def parse_address(text: str) -> Address:
    """The parts of an address.

    Raises:
        ValueError: If it is not of one of the three forms, or names a file that is not safetensors or lies elsewhere.
    """
    match = _ADDRESS.fullmatch(text)
    if not match or ".." in match[1] or "--" in match[1] or ".." in (match[2] or ""):
        raise ValueError(
            f"A hub's model must be `hf://owner/name`, with `@revision` or `/file.safetensors`. Received: {text!r:.200}"
        )
    file = match[3] or None
    if file is not None:
        if file.lower().endswith(PICKLE_SUFFIXES):
            raise CheckpointError(pickle_message(f"`{text}`"))
        parts = file.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"A file of a hub's model must be a plain path of a safetensors file. Received: {file!r:.200}"
            )
    return Address(match[1], match[2], file)


def wanted_files(parts: Collection[str] | None = None, variant: str | None = None) -> list[str]:
    """Patterns of the files that parts of a model are read from.

    Args:
        parts: Of "unet", "autoencoder", "text_encoder" and "tokenizer", which may also be all of their repository, or
            "clip", a CLIPModel with its tokenizer. None is a whole pipeline.
        variant: Of the weights, for example "fp16"; None is the plain files.
    """
    files = ["model_index.json"]
    folders = {name: f"{kind.folder}/" for name, kind in KINDS.items()} | {"tokenizer": "tokenizer/"}
    for name in folders if parts is None else parts:
        names: list[str] = list(TOKENIZER_FILES) if name in ("tokenizer", "clip") else []
        if name != "tokenizer":
            stem = KINDS[name].stem if name in KINDS else clip_directory.STEM
            middle = f".{variant}" if variant else ""
            names += ["config.json", f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"]
            names.append(f"{stem}{middle}-?????-of-?????.safetensors")
        if name == "clip":
            names.append(clip_directory.PREPROCESSOR_FILE)
        for place in (folders[name],) if parts is None else dict.fromkeys((folders.get(name, ""), "")):
            files += [place + file for file in names]
    return files + (["scheduler/scheduler_config.json"] if parts is None else [])


def fetch(text: str, parts: Collection[str] | None = None, variant: str | None = None) -> Path:
    """The directory or the file of an address in the cache, fetched where it is not there.

    Args:
        text: An address.
        parts, variant: See `wanted_files`.

    Raises:
        ValueError: If the address is malformed, or there is no such model for you.
        ImportError: If `huggingface_hub` is not installed.
        FileNotFoundError: If the model is not in the cache and cannot be fetched.
    """
    address = parse_address(text)
    try:
        from huggingface_hub import errors, hf_hub_download, snapshot_download
    except ImportError as error:
        raise ImportError(f"`{text}` needs huggingface_hub: pip install latentdiff[hub]") from error
    try:
        if address.file:
            return Path(hf_hub_download(address.repository, address.file, revision=address.revision))
        patterns = wanted_files(parts, variant)
        return Path(snapshot_download(address.repository, revision=address.revision, allow_patterns=patterns))
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"`{text}` is not in the cache of huggingface_hub, or not whole, and cannot be fetched. {error}"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ValueError(f"`{text}` cannot be fetched. {error}") from error
