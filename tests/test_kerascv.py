"""KerasCV's files: every array at its place, whatever is wrong told, nothing read but the file itself."""

import shutil
import warnings

import h5py
import ml_dtypes
import numpy as np
import pytest

from latentdiff.checkpoints.diffusers import write_component
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.h5_files import open_layers
from latentdiff.checkpoints.sources import open_source
from latentdiff.convert import convert

C = 32  # channels of the smallest level that 32 groups divide
TIME = 4 * C


def norm(width):
    return [("gamma", (width,)), ("beta", (width,))]


def dense(inputs, outputs, bias=True):
    return [("kernel", (inputs, outputs)), ("bias", (outputs,))][: 1 + bias]


def conv(inputs, outputs, size=3):
    return [("kernel", (size, size, inputs, outputs)), ("bias", (outputs,))]


def res_block(inputs, outputs, time=TIME):
    """`ResBlock`: entry flow, embedding flow, exit flow, and what `build` adds."""
    flow = norm(inputs) + conv(inputs, outputs) + (dense(time, outputs) if time else [])
    return flow + norm(outputs) + conv(outputs, outputs) + (conv(inputs, outputs, 1) if inputs != outputs else [])


def spatial_transformer(width, context):
    attention = [
        dense(width, width, False),
        dense(width, width, False),
        dense(width, width, False),
        dense(width, width),
    ]
    cross = [attention[0], dense(context, width, False), dense(context, width, False), attention[3]]
    parts = [norm(width), conv(width, width, 1), norm(width), *attention, norm(width), *cross, norm(width)]
    parts += [dense(width, 8 * width), dense(4 * width, width), conv(width, width, 1)]
    return [weight for part in parts for weight in part]


def unet(context=6):
    """KerasCV's `DiffusionModel` as its code reads, every level 32 wide but the second, which is 64."""
    a, b = C, 2 * C
    layers = [dense(a, TIME), conv(4, a), dense(TIME, TIME)]
    widths = [a]
    for inputs, width in ((a, a), (a, b), (b, a), (a, a)):
        for each in (inputs, width):
            layers.append(res_block(each, width))
            layers += [spatial_transformer(width, context)] * (len(widths) < 10)
            widths.append(width)
        if len(widths) < 12:
            layers.append(conv(width, width))
            widths.append(width)
    layers += [res_block(a, a), spatial_transformer(a, context), res_block(a, a)]
    x = a
    for level, width in enumerate((a, a, b, a)):
        for _ in range(3):
            layers.append(res_block(x + widths.pop(), width))
            layers += [spatial_transformer(width, context)] * (level > 0)
            x = width
        if level < 3:
            layers.append(conv(width, width))
    return [*layers, norm(a), conv(a, 4)]


def attention_block(width):
    return norm(width) + 4 * conv(width, width, 1)


def encoder():
    """KerasCV's `ImageEncoder`."""
    a, b = C, 2 * C
    layers = [conv(3, a), res_block(a, a, 0), res_block(a, a, 0), conv(a, a)]
    layers += [res_block(a, b, 0), res_block(b, b, 0), conv(b, b), res_block(b, a, 0), res_block(a, a, 0), conv(a, a)]
    layers += [res_block(a, a, 0)] * 3 + [attention_block(a), res_block(a, a, 0)]
    return [*layers, norm(a), conv(a, 8), conv(8, 8, 1)]


def decoder():
    """KerasCV's `Decoder`."""
    a, b = C, 2 * C
    layers = [conv(4, 4, 1), conv(4, a), res_block(a, a, 0), attention_block(a), res_block(a, a, 0)]
    layers += [res_block(a, a, 0)] * 3 + [conv(a, a)] + [res_block(a, a, 0)] * 3 + [conv(a, a)]
    layers += [res_block(a, b, 0), res_block(b, b, 0), res_block(b, b, 0), conv(b, b)]
    return [*layers, res_block(b, a, 0), res_block(a, a, 0), res_block(a, a, 0), norm(a), conv(a, 3)]


def text_encoder(width=768):
    """KerasCV's `TextEncoder`, of one layer."""
    embeddings = [("embeddings", (10, width)), ("embeddings", (5, width))]
    layer = norm(width) + 4 * dense(width, width) + norm(width)
    return [embeddings, layer + dense(width, 4 * width) + dense(4 * width, width), norm(width)]


def write(path, layers, dtype="float32"):
    """The layout of Keras 2: each array is filled with its number in the file, from 1 on."""
    number = 0
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"input_1", *(f"layer_{i}".encode() for i in range(len(layers)))]
        file.attrs["backend"] = b"tensorflow"
        file.create_group("input_1").attrs["weight_names"] = []
        for i, layer in enumerate(layers):
            group = file.create_group(f"layer_{i}")
            names = [f"layer_{i}/part_{j}/{leaf}:0" for j, (leaf, _) in enumerate(layer)]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, (_, shape) in zip(names, layer, strict=True):
                number += 1
                group.create_dataset(name, data=np.full(shape, number, dtype))
    return path


NAMES = {
    "kcv_encoder.h5": text_encoder,
    "kcv_diffusion_model.h5": unet,
    "kcv_decoder.h5": decoder,
    "vae_encoder.h5": encoder,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The four files; the text encoder's in float16, whose 7 million numbers then pass 2048 unevenly but once each."""
    directory = tmp_path_factory.mktemp("kerascv")
    for name, layers in NAMES.items():
        write(directory / name, layers(), "float16" if name == "kcv_encoder.h5" else "float32")
    return directory


@pytest.fixture
def half(directory, tmp_path):
    """A directory of the autoencoder's two files, to be spoilt."""
    for name in ("kcv_decoder.h5", "vae_encoder.h5"):
        shutil.copy(directory / name, tmp_path / name)
    return tmp_path


def numbers_of(component):
    """Variable path -> the number that all of its elements hold."""
    held = {}
    for path, array in component.weights.items():
        assert array.min() == array.max()
        held[path] = int(array.flat[0])
    return held


def refused(path, kind="autoencoder"):
    with pytest.raises(CheckpointError) as caught:
        dict(open_source(path).component(kind).weights)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        (
            "text_encoder",
            {
                "token_embedding/embeddings": 1,
                "position_embedding/embeddings": 2,
                "layer_0/norm_1/gamma": 3,
                "layer_0/attention/query/kernel": 5,
                "layer_0/attention/value/bias": 10,
                "layer_0/mlp_2/bias": 18,
                "final_norm/beta": 20,
            },
        ),
        (
            "unet",
            {
                "time_mlp_1/kernel": 1,
                "conv_in/kernel": 3,
                "time_mlp_2/bias": 6,
                "down_0_resnet_0/norm_1/gamma": 7,
                "down_0_resnet_0/time/kernel": 11,
                "down_0_resnet_0/conv_2/bias": 16,
                "down_0_attention_0/norm/gamma": 17,
                "down_0_attention_0/block_0/self_attention/key/kernel": 24,
                "down_0_attention_0/block_0/cross_attention/query/kernel": 30,
                "down_0_attention_0/block_0/geglu/kernel": 37,
                "down_0_attention_0/proj_out/bias": 42,
                "down_0_downsample/conv/kernel": 79,
                "down_1_resnet_0/skip/bias": 92,
            },
        ),
    ],
)
def test_every_array_lands_on_one_variable(kind, places, directory):
    held = numbers_of(open_source(directory).component(kind))
    assert sorted(held.values()) == list(range(1, len(held) + 1))
    assert {path: held[path] for path in places} == places


def test_an_autoencoder_is_read_from_two_files(directory):
    component = open_source(directory).component("autoencoder")
    held = numbers_of(component)
    assert sorted(held.values()) == sorted([*range(1, 109), *range(1, 141)])
    places = {
        "encoder/conv_in/kernel": 1,
        "encoder/down_0_downsample/conv/bias": 20,
        "encoder/down_1_resnet_0/skip/kernel": 29,
        "encoder/mid_attention/query/kernel": 87,
        "encoder/quant_conv/bias": 108,
        "decoder/post_quant_conv/kernel": 1,
        "decoder/mid_attention/out/bias": 22,
        "decoder/up_0_resnet_0/norm_1/gamma": 31,
        "decoder/conv_out/bias": 140,
    }
    assert {path: held[path] for path in places} == places
    assert component.config["channels"] == (32, 64, 32, 32)
    assert component.config["norm_epsilon"] == 1e-5
    assert component.weights["decoder/mid_attention/key/kernel"].shape == (32, 32)


def test_arrays_come_in_the_dtype_that_is_asked_for(directory):
    weights = open_source(directory).component("autoencoder", dtype="bfloat16").weights
    assert weights["encoder/conv_in/kernel"].dtype == ml_dtypes.bfloat16
    assert open_source(directory).component("text_encoder").weights["final_norm/beta"].dtype == np.float16


def test_a_file_is_told_by_its_content(directory, tmp_path):
    shutil.copy(directory / "kcv_diffusion_model.h5", tmp_path / "tuned.h5")
    source = open_source(tmp_path / "tuned.h5")
    assert source.kinds == ("unet",)
    assert source.component("unet").config["gelu"] == "tanh"
    with pytest.raises(FileNotFoundError, match=r"unet's file lacks: kcv_encoder.h5 or text_encoder_v2_1.h5, "):
        source.settings()


def test_missing_files_are_named(half):
    source = open_source(half)
    assert source.kinds == ("autoencoder",)
    with pytest.raises(FileNotFoundError, match="lacks: kcv_diffusion_model.h5 or diffusion_model_v2_1.h5"):
        source.component("unet")
    (half / "vae_encoder.h5").unlink()
    with pytest.raises(FileNotFoundError, match="lacks: vae_encoder.h5"):
        open_source(half).component("autoencoder")


def test_two_models_in_one_directory_are_refused(directory):
    two = directory / "text_encoder_v2_1.h5"
    two.touch()
    try:
        assert "Received: kcv_encoder.h5 and text_encoder_v2_1.h5" in refused(directory)
    finally:
        two.unlink()


def test_a_file_under_another_ones_name_is_refused(half):
    shutil.copy(half / "vae_encoder.h5", half / "kcv_decoder.h5")
    assert "must be KerasCV's decoder. Received: its encoder." in refused(half)


def test_a_model_saved_whole_has_its_weights_in_a_group(directory, tmp_path):
    with h5py.File(directory / "kcv_diffusion_model.h5") as old, h5py.File(tmp_path / "whole.h5", "w") as new:
        old.copy(old, new, name="model_weights")
        new.attrs["model_config"] = b'{"class_name": "Lambda"}'
    whole, plain = open_layers(tmp_path / "whole.h5"), open_layers(directory / "kcv_diffusion_model.h5")
    assert [layer.name for layer in whole] == [layer.name for layer in plain]


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replace_first(file, **kwargs):
    """The encoder's first kernel, held in another way."""
    group, name = file["layer_0"], "layer_0/part_0/kernel:0"
    array = group[name][()]
    del group[name]
    return group, name, array


def to_external_link(file):
    group, name, _ = replace_first(file)
    group[name] = h5py.ExternalLink("/etc/passwd", "/")


def to_soft_link(file):
    group, name, _ = replace_first(file)
    group[name] = h5py.SoftLink("/layer_1/layer_1/part_2/kernel:0")


def to_external_storage(file):
    group, name, array = replace_first(file)
    group.create_dataset(name, array.shape, "f4", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def to_virtual(file):
    group, name, array = replace_first(file)
    layout = h5py.VirtualLayout(array.shape, "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", array.shape)
    group.create_virtual_dataset(name, layout)


def to_huge(file):
    group, name, _ = replace_first(file)
    group.create_dataset(name, (3, 3, 3, 2**40), "f4", chunks=(3, 3, 3, 2**10))


def to_huge_contiguous(file):
    group, name, _ = replace_first(file)
    group.create_dataset(name, (3, 3, 3, 2**40), "f4")


def to_compressed(file):
    group, name, array = replace_first(file)
    group.create_dataset(name, data=array, compression="gzip")


def to_objects(file):
    group, name, _ = replace_first(file)
    group.create_dataset(name, (3, 3, 3, 32), h5py.string_dtype())


def to_integers(file):
    group, name, array = replace_first(file)
    group.create_dataset(name, data=array.astype("i4"))


def to_big_endian(file):
    group, name, array = replace_first(file)
    group.create_dataset(name, data=array.astype(">f4"))


def to_group(file):
    group, name, _ = replace_first(file)
    group.create_group(name)


def to_one_array_twice(file):
    group, name, _ = replace_first(file)
    group[name] = file["layer_3/layer_3/part_0/kernel:0"]


def to_nan(file):
    file["layer_0/layer_0/part_1/bias:0"][3] = np.nan


def to_names_above(file):
    file["layer_0"].attrs["weight_names"] = [b"../layer_1/x", b"layer_0/part_1/bias:0"]


def to_the_same_name_twice(file):
    file["layer_0"].attrs["weight_names"] = [b"layer_0/part_1/bias:0"] * 2


def to_long_name(file):
    file.attrs["layer_names"] = [b"a" * 5000, b"b"]


def to_number_names(file):
    file.attrs["layer_names"] = [1, 2]


def to_keras_3(file):
    del file.attrs["layer_names"]
    file.create_group("layers")


def to_other_shape(file):
    group, name, array = replace_first(file)
    group.create_dataset(name, data=array[:, :, :, :-1])


def to_swapped_names(file):
    names = [*map(str.encode, file["layer_1"].attrs["weight_names"])]
    file["layer_1"].attrs["weight_names"] = [names[1], names[0], *names[2:]]


def to_fewer_layers(file):
    file.attrs["layer_names"] = np.array(file.attrs["layer_names"][:-1], "S")  # as Keras writes many of them


def to_more_layers(file):
    group = file.create_group("extra")
    group["kernel"] = np.ones(3, "f4")
    group.attrs["weight_names"] = [b"kernel"]
    file.attrs["layer_names"] = [*map(str.encode, file.attrs["layer_names"]), b"extra"]


def to_more_arrays(file):
    group = file["layer_1"]
    group["more"] = np.ones(3, "f4")
    group.attrs["weight_names"] = [*map(str.encode, group.attrs["weight_names"]), b"more"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_external_link, "must hold its weights itself. Received: ExternalLink at `layer_0/part_0/kernel:0`"),
        (to_soft_link, "must hold its weights itself. Received: SoftLink"),
        (to_external_storage, "must hold its weights itself. Received: an array of other files"),
        (to_virtual, "must hold its weights itself. Received: an array of other files"),
        (to_huge, "contiguous and uncompressed"),
        (to_huge_contiguous, "(3, 3, 3, 1099511627776) must lie within it"),
        (to_compressed, "contiguous and uncompressed"),
        (to_objects, "must be float16, float32 or float64, little-endian. Received: object"),
        (to_integers, "must be float16, float32 or float64, little-endian. Received: int32"),
        (to_big_endian, "little-endian. Received: >f4"),
        (to_group, "must have a dataset at `layer_0/part_0/kernel:0`. Received: Group"),
        (to_one_array_twice, "arrays must lie apart"),
        (to_nan, "Weights must be finite. Received: NaN or infinity in `layer_0/layer_0/part_1/bias:0`"),
        (to_names_above, "must have plain names. Received: '../layer_1/x'"),
        (to_the_same_name_twice, "must name each once"),
        (to_long_name, "a name must have at most 4096 bytes, and has 5000"),
        (to_number_names, "`layer_names` in `/` must be a list of strings. Received: int64"),
        (to_keras_3, "This is a `.weights.h5` of Keras 3"),
        (
            to_other_shape,
            "layer_0/layer_0/part_0/kernel:0 (encoder/conv_in/kernel) must be (3, 3, 3, 32), is (3, 3, 3, 31)",
        ),
        (to_swapped_names, "layer_1/part_1/beta:0 (encoder/down_0_resnet_0/norm_1/gamma) must be a gamma"),
        (to_fewer_layers, "Received: 17; missing: quant_conv; left over: none"),
        (to_more_layers, "Received: 19; missing: none; left over: extra"),
        (to_more_arrays, "arrays: layer_1 (down_0_resnet_0) must have 8, has 9"),
    ],
)
def test_what_keras_never_writes_is_refused(change, message, half):
    edit(half / "vae_encoder.h5", change)
    assert message in refused(half)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"version https://git-lfs"])
def test_what_is_no_hdf5_is_refused(content, half):
    (half / "vae_encoder.h5").write_bytes(content)
    assert "vae_encoder.h5" in refused(half)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("kcv_diffusion_model.h5", "unet", {"entry_epsilon": 1e-6, "gelu": "exact"}),
        ("kcv_encoder.h5", "text_encoder", {"activation": "quick_gelu"}),
        (".", "autoencoder", {"norm_epsilon": 1e-6}),
    ],
)
def test_a_converted_network_is_as_stable_diffusion_was_trained(name, kind, said, directory, half, tmp_path):
    source = half if kind == "autoencoder" else directory / name
    before = open_source(source).component(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(source, tmp_path / "out")
    told = " ".join(str(warning.message) for warning in caught)
    changed = {argument for argument, value in said.items() if before.config[argument] != value}
    assert all(f"{argument}={before.config[argument]!r}" in told for argument in changed)
    assert bool(caught) == bool(changed)
    after = open_source(tmp_path / "out").component(kind)
    assert {argument: after.config[argument] for argument in said} == said
    assert {argument for argument in before.config if after.config[argument] != before.config[argument]} == changed
    for path, array in before.weights.items():
        np.testing.assert_array_equal(after.weights[path], array)


def test_what_keras_cv_computes_is_refused_in_a_diffusers_directory(directory, tmp_path):
    for kind, name in (("unet", "entry_epsilon=1e-05"), ("autoencoder", "norm_epsilon=1e-05")):
        component = open_source(directory).component(kind)
        with pytest.raises(ValueError, match=name):
            write_component(tmp_path / kind, kind, component.config, component.weights)


def test_averaged_weights_and_variants_are_refused(half):
    with pytest.raises(CheckpointError, match="one kind of weights"):
        open_source(half, ema=True)
    with pytest.raises(ValueError, match="no variants"):
        open_source(half).component("autoencoder", variant="fp16")


def test_the_pipeline_is_that_of_kerascv(directory):
    source = open_source(directory)
    settings = source.settings()
    assert (settings.sampler, settings.spacing, settings.set_alpha_to_one) == ("ddim", "linspace", True)
    assert open_source(directory, prediction="v").settings().prediction == "v"
    assert source.tokenizer()["pad_token"] == "<|endoftext|>"
    assert source.kinds == ("text_encoder", "unet", "autoencoder")


@pytest.fixture(scope="module")
def structure(directory):
    """The image encoder's file, and where in it no array lies."""
    path = directory / "vae_encoder.h5"
    content = path.read_bytes()
    free = np.ones(len(content), bool)
    for layer in open_layers(path):
        for weight in layer.weights:
            free[weight.begin : weight.end] = False
    return content, np.flatnonzero(free)


@pytest.mark.parametrize("seed", range(100))
def test_damage_is_an_error_or_moves_nothing(seed, structure, tmp_path):
    """Bytes of the structure change, or the file is cut: what is still read has the right places' shapes."""
    random = np.random.default_rng(seed)
    content, places = bytearray(structure[0]), structure[1]
    for place in random.choice(places, random.choice([1, 3, 30])):
        content[place] = random.integers(256)
    if seed % 5 == 0:
        del content[random.integers(len(content)) :]
    path = tmp_path / "vae_encoder.h5"
    path.write_bytes(content)
    try:
        layers = open_layers(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert sum(weight.view().nbytes for layer in layers for weight in layer.weights) <= len(content)
