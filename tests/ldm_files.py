"""Single files in LDM's layout, made from diffusers' tensors by a map of the tests' own.

The map is written from the code of Rombach et al. (`ldm/modules/diffusionmodules/openaimodel.py` and `model.py`) and of
open_clip: it builds the lists of modules as their constructors do, and reads each tensor's name off its place in them.
"""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from latentdiff.checkpoints import diffusers

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": (32, 64),
    "blocks_per_level": 1,
    "attention": (True, False),
    "heads": (8, 8),
    "transformer_depth": (1, 1),
    "context_dim": 16,
    "dense_projection": False,
    "groups": 32,
    "norm_epsilon": 1e-5,
    "entry_epsilon": 1e-6,
    "gelu": "exact",
    "flip_sin_to_cos": True,
    "freq_shift": 0.0,
    "mid_attention": True,
}
AUTOENCODER = {
    "channels": (32, 64),
    "blocks_per_level": 1,
    "latent_channels": 4,
    "image_channels": 3,
    "groups": 32,
    "norm_epsilon": 1e-6,
    "scaling_factor": 0.18215,
    "shift_factor": 0.0,
    "mid_attention": True,
}
TEXT = {
    "vocabulary_size": 49408,
    "context_length": 77,
    "width": 16,
    "depth": 2,
    "heads": 1,
    "mlp_width": 24,
    "activation": "quick_gelu",
    "norm_epsilon": 1e-5,
}
CONFIGS = {
    "sd1": {"unet": UNET, "autoencoder": AUTOENCODER, "text_encoder": TEXT},
    "sd2": {
        "unet": {**UNET, "channels": (32, 64, 64), "attention": (True, True, False), "heads": (1, 1, 1)}
        | {"transformer_depth": (1, 2, 1), "dense_projection": True, "blocks_per_level": 2},
        "autoencoder": {**AUTOENCODER, "channels": (32, 32, 64), "blocks_per_level": 2},
        "text_encoder": {**TEXT, "activation": "gelu", "depth": 3},
    },
}
STEMS = {"unet": "diffusion_pytorch_model", "autoencoder": "diffusion_pytorch_model", "text_encoder": "model"}


def component(directory: Path, kind: str, config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """diffusers' tensors of a network with random weights, written to its directory, by name.

    The numbers are float16's and bfloat16's both, so that a file of either holds the same.
    """
    rng = np.random.default_rng(seed)
    arrays = {
        entry.path: rng.integers(-128, 128, entry.shape).astype("float32") / 64
        for entry in diffusers.key_map(kind, config)
    }
    diffusers.write_component(directory, kind, config, arrays)
    return safetensors.numpy.load_file(directory / f"{STEMS[kind]}.safetensors")


def whole_file(tensors: dict[str, dict[str, np.ndarray]], kind: str) -> dict[str, np.ndarray]:
    """A pipeline's tensors under LDM's names.

    Args:
        tensors: component -> diffusers' name -> array.
        kind: "sd1" or "sd2".
    """
    config = CONFIGS[kind]["unet"]
    shape = (len(config["channels"]), config["blocks_per_level"], config["attention"])
    return {
        **prefixed("model.diffusion_model.", unet(tensors["unet"], *shape)),
        **prefixed("first_stage_model.", autoencoder(tensors["autoencoder"])),
        **(clip(tensors["text_encoder"]) if kind == "sd1" else open_clip(tensors["text_encoder"])),
    }


def unet(tensors, levels, blocks, attention):
    """`UNetModel`: its blocks are one list each on the way in, in the middle and on the way out."""
    inputs = [["conv_in"]]
    for level in range(levels):
        for j in range(blocks):
            inputs.append([f"down_blocks.{level}.resnets.{j}"])
            if attention[level]:
                inputs[-1].append(f"down_blocks.{level}.attentions.{j}")
        if level != levels - 1:
            inputs.append([f"down_blocks.{level}.downsamplers.0"])
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    outputs = []
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            up = levels - 1 - level  # diffusers counts them from the bottom
            outputs.append([f"up_blocks.{up}.resnets.{i}"])
            if attention[level]:
                outputs[-1].append(f"up_blocks.{up}.attentions.{i}")
            if level and i == blocks:
                outputs[-1].append(f"up_blocks.{up}.upsamplers.0")
    places = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    places |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
    places |= {name: f"middle_block.{k}" for k, name in enumerate(middle)}
    for words, modules in (("input_blocks", inputs), ("output_blocks", outputs)):
        places |= {name: f"{words}.{n}.{k}" for n, module in enumerate(modules) for k, name in enumerate(module)}
    renamed = {}
    for name, array in tensors.items():
        module = max((m for m in places if name.startswith(m + ".")), key=len)
        inner = name[len(module) + 1 :]
        if ".resnets." in module:
            for theirs, own in (
                ("norm1.", "in_layers.0."),
                ("conv1.", "in_layers.2."),
                ("time_emb_proj.", "emb_layers.1."),
                ("norm2.", "out_layers.0."),
                ("conv2.", "out_layers.3."),
                ("conv_shortcut.", "skip_connection."),
            ):
                if inner.startswith(theirs):
                    inner = own + inner[len(theirs) :]
                    break
        elif "downsamplers" in module:
            inner = inner.replace("conv.", "op.")
        renamed[f"{places[module]}.{inner}"] = array
    return renamed


def autoencoder(tensors):
    """`AutoencoderKL`: `Encoder.down` and `Decoder.up` are both counted from the full size; attention is by 1 x 1."""
    ups = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    renamed = {}
    for name, array in tensors.items():
        name = re.sub(r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", name)
        name = re.sub(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
        name = re.sub(
            r"^decoder\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)",
            lambda m: f"decoder.up.{ups - 1 - int(m[1])}." + (f"block.{m[3]}" if m[3] else "upsample"),
            name,
        )
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            array = array[:, :, None, None] if array.ndim == 2 else array
        renamed[name] = array
    return renamed


def clip(tensors):
    """`FrozenCLIPEmbedder`: transformers' own model, with the positions as transformers 4 kept them."""
    positions = np.arange(77)[None]
    named = {f"text_model.{name.removeprefix('text_model.')}": array for name, array in tensors.items()}
    named["text_model.embeddings.position_ids"] = positions
    return prefixed("cond_stage_model.transformer.", named)


def open_clip(tensors, more_layers=0):
    """`FrozenOpenCLIPEmbedder`: open_clip's text tower, `nn.MultiheadAttention` with its fused projection.

    Args:
        tensors: of transformers' names.
        more_layers: how many layers of zeros follow those that Stable Diffusion uses.
    """
    tensors = {name.removeprefix("text_model."): array for name, array in tensors.items()}
    width = tensors["final_layer_norm.weight"].shape[0]
    depth = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"encoder\.layers\.(\d+)\.", name)))
    renamed = {
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["final_layer_norm.weight"],
        "ln_final.bias": tensors["final_layer_norm.bias"],
        "text_projection": np.ones((width, 12), "float32"),
        "logit_scale": np.array(4.6, "float32"),
        "attn_mask": np.zeros((77, 77), "float32"),
    }
    for i in range(depth + more_layers):
        layer, block = f"encoder.layers.{min(i, depth - 1)}", f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            three = [tensors[f"{layer}.self_attn.{which}_proj.{leaf}"] for which in "qkv"]
            renamed[f"{block}.attn.in_proj_{leaf}"] = np.concatenate(three, axis=0)
            renamed[f"{block}.attn.out_proj.{leaf}"] = tensors[f"{layer}.self_attn.out_proj.{leaf}"]
            for ours, theirs in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1")):
                renamed[f"{block}.{ours}.{leaf}"] = tensors[f"{layer}.{theirs}.{leaf}"]
            renamed[f"{block}.mlp.c_proj.{leaf}"] = tensors[f"{layer}.mlp.fc2.{leaf}"]
    return prefixed("cond_stage_model.model.", renamed)


def averaged(tensors, offset=1.0):
    """`LitEma` of the wrapper around the UNet: names without their dots, other numbers, and its two counters."""
    shadow = {
        "model_ema." + name.split(".", 1)[1].replace(".", ""): (array + np.float32(offset)).astype(array.dtype)
        for name, array in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    counters = {"model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int32(470000)}
    return shadow | {name: np.array(value) for name, value in counters.items()}


def schedule(T=1000, start=0.00085, end=0.012):
    """The buffers that `DDPM.register_schedule` leaves in a file."""
    betas = np.linspace(start**0.5, end**0.5, T) ** 2
    alpha_bar = np.cumprod(1 - betas)
    arrays = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": np.append(1.0, alpha_bar[:-1]),
        "sqrt_alphas_cumprod": alpha_bar**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log(1 - alpha_bar),
        "sqrt_recip_alphas_cumprod": alpha_bar**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1) ** 0.5,
        "posterior_variance": betas,
        "posterior_log_variance_clipped": np.log(betas),
        "posterior_mean_coef1": betas,
        "posterior_mean_coef2": betas,
    }
    return {name: array.astype("float32") for name, array in arrays.items()}


def prefixed(prefix, tensors):
    return {prefix + name: array for name, array in tensors.items()}


def save(path, tensors, metadata=None):
    safetensors.numpy.save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, path, metadata)
    return path
