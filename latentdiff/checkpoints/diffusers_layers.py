"""The keys of the layers that diffusers' and transformers' networks share: `key` is theirs, `path` is ours."""

from __future__ import annotations

from latentdiff.checkpoints.key_map import Entry


def conv(key: str, path: str, size: int, inputs: int, outputs: int) -> list[Entry]:
    """A size x size convolution with its bias."""
    return [
        Entry(f"{path}/kernel", (f"{key}.weight",), "conv", (size, size, inputs, outputs)),
        Entry(f"{path}/bias", (f"{key}.bias",), "same", (outputs,)),
    ]


def dense(key: str, path: str, inputs: int, outputs: int, bias: bool = True) -> list[Entry]:
    """A dense kernel, with its bias where it has one."""
    kernel = Entry(f"{path}/kernel", (f"{key}.weight",), "dense", (inputs, outputs))
    return [kernel, Entry(f"{path}/bias", (f"{key}.bias",), "same", (outputs,))] if bias else [kernel]


def norm(key: str, path: str, width: int) -> list[Entry]:
    """A normalisation's scale and offset."""
    return [
        Entry(f"{path}/gamma", (f"{key}.weight",), "same", (width,)),
        Entry(f"{path}/beta", (f"{key}.bias",), "same", (width,)),
    ]


def clip_layer(key: str, path: str, width: int, mlp_width: int) -> list[Entry]:
    """A layer of CLIP's transformers, of the text's or of the image's."""
    entries = norm(f"{key}.layer_norm1", f"{path}/norm_1", width)
    entries += dense(f"{key}.self_attn.q_proj", f"{path}/attention/query", width, width)
    entries += dense(f"{key}.self_attn.k_proj", f"{path}/attention/key", width, width)
    entries += dense(f"{key}.self_attn.v_proj", f"{path}/attention/value", width, width)
    entries += dense(f"{key}.self_attn.out_proj", f"{path}/attention/out", width, width)
    entries += norm(f"{key}.layer_norm2", f"{path}/norm_2", width)
    entries += dense(f"{key}.mlp.fc1", f"{path}/mlp_1", width, mlp_width)
    return entries + dense(f"{key}.mlp.fc2", f"{path}/mlp_2", mlp_width, width)


def resnet(key: str, path: str, inputs: int, outputs: int, time: int | None = None) -> list[Entry]:
    """A residual block, told the time by a dense layer of `time` inputs where there is one."""
    entries = norm(f"{key}.norm1", f"{path}/norm_1", inputs)
    entries += conv(f"{key}.conv1", f"{path}/conv_1", 3, inputs, outputs)
    if time is not None:
        entries += dense(f"{key}.time_emb_proj", f"{path}/time", time, outputs)
    entries += norm(f"{key}.norm2", f"{path}/norm_2", outputs)
    entries += conv(f"{key}.conv2", f"{path}/conv_2", 3, outputs, outputs)
    if inputs != outputs:
        entries += conv(f"{key}.conv_shortcut", f"{path}/skip", 1, inputs, outputs)
    return entries
