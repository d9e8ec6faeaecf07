"""Prompt in, picture out: what the arguments of `generate` do, and what they are not to change."""

import gc
import os
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
from tiny_models import LATENT, PICTURE, numbers, relative_error, run, to_numpy

import latentdiff as ld
from benchmarks.machine import memory_mib
from latentdiff.backend import Compiled
from latentdiff.diffusion.noise import normal, split_seeds
from latentdiff.diffusion.samplers import make_table
from latentdiff.diffusion.schedule import scaled_linear_schedule
from latentdiff.generate_arguments import read_table

PROMPTS = ["a red heart", "the cat"]
STEPS = 3


@pytest.fixture
def generate(tiny_pipe):
    """`generate` with two prompts, three steps, seeds 5 and 6, unless told otherwise."""

    def call(prompt=PROMPTS, **arguments):
        return tiny_pipe.generate(prompt, **{"num_steps": STEPS, "seed": 5, "progress": False, **arguments})

    return call


def grey_levels(first, second):
    """The largest difference of two pictures."""
    assert first.dtype == second.dtype == np.uint8
    assert first.shape == second.shape
    return np.abs(first.astype(int) - second).max()


def decoded(latent, pipe):
    """The picture of a latent."""
    image = to_numpy(run(pipe.autoencoder.decode, latent, model=pipe.autoencoder))
    return np.clip(np.round((image + 1) * 127.5), 0, 255).astype("uint8")


@pytest.fixture
def latents(generate):
    """The latents (R, B, h, w, c) after each row of `generate`."""

    def call(**arguments):
        seen = []
        generate(callback=lambda step, latent: seen.append(latent), **arguments)
        return np.stack(seen)

    return call


def test_picture_has_the_models_own_size_and_grey_levels(generate):
    images = generate()
    assert images.shape == (2, *PICTURE)
    assert images.dtype == np.uint8
    assert len(np.unique(images)) > 50
    assert grey_levels(images[0], images[1]) > 20


def test_height_and_width_are_the_pictures(generate):
    assert generate("a cat", height=6, width=10, num_steps=1, guidance_scale=1).shape == (1, 6, 10, 3)


def test_images_come_in_the_order_of_the_prompts(generate):
    each = generate(seed=[5, 5])
    several = generate(num_images=2, seed=[5, 5, 5, 5], batch_size=2)
    assert several.shape == (4, *PICTURE)
    assert grey_levels(several, each[[0, 0, 1, 1]]) <= 1
    assert grey_levels(each[0], each[1]) > 1


def test_one_negative_prompt_is_for_all(generate):
    one, each = generate(negative_prompt="green"), generate(negative_prompt=["green", "green"])
    np.testing.assert_array_equal(one, each)


def test_negative_prompts_are_for_their_own_prompts(generate):
    plain, first = generate(), generate(negative_prompt=["green tree", ""])
    assert grey_levels(plain[0], first[0]) > 1
    assert grey_levels(plain[1], first[1]) <= 1


def test_seed_counts_on_from_image_to_image(generate):
    np.testing.assert_array_equal(generate(seed=5), generate(seed=[5, 6]))
    np.testing.assert_array_equal(generate(seed=5), generate(seed=np.array([5, 6])))


def test_no_seed_is_another_each_time(generate):
    assert grey_levels(generate(seed=None), generate(seed=None)) > 1


def test_same_seed_makes_the_same_bits(generate):
    np.testing.assert_array_equal(generate(output="latent"), generate(output="latent"))


def test_picture_does_not_depend_on_its_batch(generate):
    three = generate([PROMPTS[1], *PROMPTS], seed=[7, 5, 6])
    assert grey_levels(three[1:], generate()) <= 1


def test_parts_of_a_batch_make_the_same_pictures(generate):
    whole = generate([*PROMPTS, PROMPTS[0]])
    parts = generate([*PROMPTS, PROMPTS[0]], batch_size=2)
    assert grey_levels(parts, whole) <= 1


SCRIPT = """
import sys
import numpy as np
import latentdiff as ld
pipe = ld.TextToImage.from_preset(sys.argv[1], dtype="float32")
arguments = {"num_steps": 3, "seed": 5, "progress": False}
prompts = ["a red heart", "the cat"]
latent = pipe.generate(prompts, output="latent", **arguments)
np.savez(sys.argv[2], latent=latent, image=pipe.generate(prompts, **arguments))
"""


def in_another_process(backend, directory, target):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-c", SCRIPT, str(directory), str(target)]
    subprocess.run(command, env=environment, check=True, timeout=900)
    with np.load(target) as file:
        return dict(file)


def test_same_seed_makes_the_same_bits_in_another_process(generate, tiny_directory, tmp_path):
    """Which opens what this one saved."""
    theirs = in_another_process(keras.backend.backend(), tiny_directory, tmp_path / "out.npz")
    np.testing.assert_array_equal(generate(output="latent"), theirs["latent"])
    np.testing.assert_array_equal(generate(), theirs["image"])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's run compares the two")
def test_backends_make_the_same_picture(generate, tiny_directory, tmp_path):
    theirs = in_another_process("jax", tiny_directory, tmp_path / "out.npz")
    assert grey_levels(generate(), theirs["image"]) <= 1
    assert relative_error(generate(output="latent"), theirs["latent"]) < 1e-3


def test_noise_handed_in_takes_the_place_of_the_seeds(generate):
    noise = to_numpy(normal(split_seeds([5, 6]), 0, LATENT))
    assert grey_levels(generate(noise=noise, seed=99), generate(seed=5)) <= 1
    assert grey_levels(generate(noise=noise[::-1], seed=99), generate(seed=5)) > 1


def test_noise_of_each_row_is_handed_in(generate):
    seeds = split_seeds([5, 6])
    noise = np.stack([to_numpy(normal(seeds, k, LATENT)) for k in range(1 + STEPS)])
    expected = generate(sampler="euler_ancestral")
    assert grey_levels(generate(sampler="euler_ancestral", noise=noise, seed=99), expected) <= 1
    noise[1] = noise[2]
    assert grey_levels(generate(sampler="euler_ancestral", noise=noise, seed=99), expected) > 1


def test_noise_beyond_the_first_comes_from_the_seeds_where_it_is_not_handed_in(generate):
    noise = to_numpy(normal(split_seeds([5, 6]), 0, LATENT))
    expected = generate(sampler="euler_ancestral")
    assert grey_levels(generate(sampler="euler_ancestral", noise=noise), expected) <= 1
    assert grey_levels(generate(sampler="euler_ancestral", noise=noise, seed=99), expected) > 1


def test_callback_sees_each_row(generate):
    seen = []
    latent = generate(output="latent", callback=lambda step, latent: seen.append((step, latent)))
    assert [step for step, _ in seen] == [1, 2, 3]
    assert all(array.shape == (2, *LATENT) and array.dtype == np.float32 for _, array in seen)
    np.testing.assert_array_equal(seen[-1][1], latent)
    assert latent.shape == (2, *LATENT) and latent.dtype == np.float32


def test_callback_may_stop_the_run(generate, latents, tiny_pipe):
    steps = []
    image = generate(callback=lambda step, latent: steps.append(step) or step < 2)
    assert steps == [1, 2]
    assert grey_levels(image, decoded(latents()[1], tiny_pipe)) <= 1


def test_callback_stops_the_parts_that_follow_too(generate):
    assert generate(batch_size=1, callback=lambda step, latent: False).shape == (1, *PICTURE)


def test_picture_is_the_decoded_latent(generate, tiny_pipe):
    assert grey_levels(generate(), decoded(generate(output="latent"), tiny_pipe)) <= 1


def test_guidance_scale_one_is_conditional(generate):
    conditional = generate(guidance_scale=1, output="latent")
    np.testing.assert_array_equal(generate(guidance_scale=1, negative_prompt="green", output="latent"), conditional)
    # As near to 1 as float32 comes, the prompt is weighed against the empty one.
    assert relative_error(generate(guidance_scale=1 + 2e-7, output="latent"), conditional) < 1e-3
    assert relative_error(generate(guidance_scale=3, output="latent"), conditional) > 1e-2


def test_guidance_away_from_the_prompt_itself_is_conditional(generate):
    conditional = generate(guidance_scale=1, output="latent")
    assert relative_error(generate(negative_prompt=PROMPTS, guidance_scale=7, output="latent"), conditional) < 1e-3


def test_conditional_acts_outside_of_the_guidance_interval(latents):
    """Of the levels of 3 steps, t = 667, 334 and 1, the first lies above 2 and the last below 0.1."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)[[667, 334, 1]]
    ratio = np.sqrt((1 - alpha_bar) / alpha_bar)
    assert ratio[0] > 2 > ratio[1] > 0.1 > ratio[2]

    conditional, guided = latents(guidance_scale=1), latents()
    below = latents(guidance_interval=(0, 2))
    np.testing.assert_array_equal(below[0], conditional[0])
    assert relative_error(below[1], conditional[1]) > 1e-3
    above = latents(guidance_interval=(2, np.inf))
    np.testing.assert_array_equal(above[0], guided[0])
    assert relative_error(above[1], guided[1]) > 1e-3
    np.testing.assert_array_equal(latents(guidance_interval=(100, 200)), conditional)
    np.testing.assert_array_equal(latents(guidance_interval=(0, np.inf)), guided)


def test_guidance_rescale_changes_the_guided_alone(generate):
    assert relative_error(generate(guidance_rescale=0.7, output="latent"), generate(output="latent")) > 1e-3
    plain, rescaled = (generate(guidance_scale=1, guidance_rescale=r, output="latent") for r in (0.0, 0.7))
    np.testing.assert_array_equal(plain, rescaled)


def test_ddim_with_eta_one_is_ddpm(latents):
    """But for the last row, where DDPM ends clean and DDIM at the level of t = 1."""
    ddim, ddpm = latents(sampler="ddim", eta=1.0), latents(sampler="ddpm")
    assert relative_error(ddim[:-1], ddpm[:-1]) < 1e-3
    assert relative_error(latents()[:-1], ddpm[:-1]) > 1e-2


def test_no_sampler_is_the_directorys_own(generate):
    np.testing.assert_array_equal(generate(), generate(sampler="ddim"))
    assert grey_levels(generate(), generate(sampler="heun")) > 1


def test_second_call_traces_nothing_again(generate, tiny_pipe):
    generate()
    generate(sampler="euler_ancestral")
    before = tiny_pipe.traces
    assert before > 0
    generate(
        ["a grinning face", "two dogs"], negative_prompt=["green", "blue"], num_steps=2, guidance_scale=2.5, seed=99
    )
    for sampler in ("pndm", "dpmpp_2m_karras", "unipc", "dpmpp_2m_sde"):
        generate(sampler=sampler)
    generate(eta=0.5, guidance_rescale=0.5, guidance_interval=(0, 1000), noise=numbers(2, *LATENT))
    assert tiny_pipe.traces == before


def test_many_calls_leave_nothing_behind(generate):
    """Of 200 pictures, each with words and a seed of its own."""
    for i in range(10):
        generate(f"picture {i}", seed=i)
    gc.collect()
    before = memory_mib()
    for i in range(10, 210):
        generate(f"picture {i}", seed=i)
    gc.collect()
    assert memory_mib() - before < 4


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere only a call traces")
def test_what_was_traced_ahead_is_not_traced_by_the_call(tiny_pipe):
    compiled = Compiled(tiny_pipe.parts.unet.get_layer("conv_in"), [])
    compiled.trace((1, *LATENT))
    assert compiled.traces == 1
    compiled(numbers(1, *LATENT))
    assert compiled.traces == 1


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere only a call traces")
def test_decoder_is_traced_while_the_sampler_runs(tiny_directory, monkeypatch):
    """In another thread, between the first step and the last, for every size of picture once, and in no other case."""
    trace, ready, ahead = Compiled.trace, threading.Event(), []

    def traced(self, *shapes):
        ahead.append((self, shapes, threading.current_thread() is threading.main_thread()))
        trace(self, *shapes)
        ready.set()

    def before_the_last(i, latent):
        """Waits, within the sampler's loop, for what goes on beside it."""
        if i == 1:
            assert ready.wait(60)
            ready.clear()

    monkeypatch.setattr(Compiled, "trace", traced)
    pipe = ld.TextToImage.from_preset(tiny_directory, dtype="float32")
    pipe.loops_inside = False  # on a GPU too
    for wanted, output, size in ((False, "latent", 8), (True, "image", 8), (True, "image", 8), (True, "image", 16)):
        pipe.generate("a red circle", num_steps=2, seed=0, height=size, progress=False, output=output,
                      callback=before_the_last if wanted else None)  # fmt: skip
    (h, w, c) = LATENT
    assert [each[1:] for each in ahead] == [(((1, height, w, c),), False) for height in (h, h, 2 * h)]
    assert {each[0] for each in ahead} == {pipe._decode}
    assert pipe._decode.traces == 2


def test_guidance_is_switched_on_and_off_at_one_trace_each(generate, tiny_pipe):
    generate()
    generate(guidance_scale=1)
    before = tiny_pipe.traces
    generate()
    generate(guidance_scale=1)
    generate(guidance_interval=(0, 2))
    assert tiny_pipe.traces == before


def test_loop_within_the_function_makes_the_same_picture_and_traces_nothing_again(generate, tiny_pipe, monkeypatch):
    kinds = [{"sampler": "euler"}, {"sampler": "euler", "guidance_scale": 1}]
    others = [{"sampler": "ddpm"}, {"sampler": "dpmpp_2m", "num_steps": 6}, {"eta": 0.5, "sampler": "ddim"}]
    others += [{"sampler": "heun", "noise": numbers(2, *LATENT)}]
    expected = [generate(**case) for case in kinds + others]
    monkeypatch.setattr(tiny_pipe, "loops_inside", True)
    monkeypatch.setattr(tiny_pipe, "step_function", None)
    made = [generate(**case) for case in kinds]
    traces = tiny_pipe.traces
    made += [generate(**case) for case in others]
    assert tiny_pipe.traces == traces
    assert max(map(grey_levels, made, expected)) <= 1


def test_loop_within_the_function_is_left_where_somebody_looks_on(generate, tiny_pipe, monkeypatch):
    monkeypatch.setattr(tiny_pipe, "loops_inside", True)
    monkeypatch.setattr(tiny_pipe, "loop_function", None)
    rows = []
    generate(callback=lambda row, latent: rows.append(row))
    assert rows[-1] == len(rows) > 1
    generate(guidance_interval=(0, 2))
    generate(cache_interval=2)
    generate(sampler="ddpm", noise=numbers(1 + STEPS, 2, *LATENT))


def test_table_is_the_schedules_of_the_settings(tiny_pipe):
    expected = make_table("euler", scaled_linear_schedule(), 4)
    table = read_table("euler", 4, 0.0, tiny_pipe.settings, tiny_pipe.schedule)
    np.testing.assert_array_equal(table.matrix, expected.matrix)
    np.testing.assert_array_equal(table.timestep, expected.timestep)


def test_dtype_is_what_the_networks_compute_in(tiny_pipe):
    assert tiny_pipe.dtype == "float32"


BAD = [
    ({"prompt": 7}, TypeError, "`prompt` must be text"),
    ({"prompt": None}, TypeError, "`prompt` must be text"),
    ({"prompt": b"a cat"}, TypeError, "`prompt` must be text"),
    ({"prompt": ["a cat", 7]}, TypeError, "`prompt` must be text"),
    ({"prompt": []}, ValueError, "`prompt` must hold at least one prompt"),
    ({"negative_prompt": None}, TypeError, "`negative_prompt` must be text"),
    ({"negative_prompt": ["", "", ""]}, ValueError, "Received: 3 for 2 prompts."),
    ({"num_images": 0}, ValueError, "Received: num_images=0."),
    ({"num_images": True}, ValueError, "Received: num_images=True."),
    ({"num_steps": 0}, ValueError, "Received: num_steps=0."),
    ({"num_steps": 1001}, ValueError, "T=1000"),
    ({"num_steps": 2.5}, ValueError, "Received: num_steps=2.5."),
    ({"num_steps": True}, ValueError, "Received: num_steps=True."),
    ({"height": 9}, ValueError, "`height` must be a positive multiple of 2. Received: height=9."),
    ({"width": 0}, ValueError, "`width` must be a positive multiple of 2. Received: width=0."),
    ({"width": -8}, ValueError, "Received: width=-8."),
    ({"height": 8.0}, ValueError, "Received: height=8.0."),
    ({"sampler": "eular"}, ValueError, "Did you mean euler"),
    ({"sampler": 3}, ValueError, "Received: sampler=3."),
    ({"seed": -1}, ValueError, "Received: seed=-1."),
    ({"seed": 2**63 - 1}, ValueError, "for every image"),
    ({"seed": [1, 2, 3]}, ValueError, "one for each of the 2 images. Received: 3."),
    ({"seed": 1.5}, TypeError, "Received: seed=1.5."),
    ({"seed": "1"}, TypeError, "Received: seed='1'."),
    ({"seed": True}, TypeError, "Received: seed=True."),
    ({"seed": [1, 1.5]}, TypeError, "Received: 1.5."),
    ({"noise": np.zeros((2, 4, 5, 4))}, ValueError, "here (2, 4, 6, 4), or (1 + R, B, h, w, c), here (4, 2, 4, 6, 4)."),
    ({"noise": np.zeros((3, 2, *LATENT))}, ValueError, "Received: (3, 2, 4, 6, 4)."),
    ({"noise": np.full((2, *LATENT), np.nan)}, ValueError, "`noise` must be finite"),
    ({"guidance_scale": np.nan}, ValueError, "Received: guidance_scale=nan."),
    ({"guidance_scale": "5"}, ValueError, "Received: guidance_scale='5'."),
    ({"guidance_rescale": 1.5}, ValueError, "Received: guidance_rescale=1.5."),
    ({"guidance_rescale": "1"}, ValueError, "Received: guidance_rescale='1'."),
    ({"guidance_interval": (2, 1)}, ValueError, "Received: (2, 1)."),
    ({"guidance_interval": (1, 2, 3)}, ValueError, "Received: (1, 2, 3)."),
    ({"guidance_interval": 2}, ValueError, "Received: 2."),
    ({"cache_interval": 0}, ValueError, "`cache_interval` must be a whole number, at least 1. Received: 0."),
    ({"cache_interval": -2}, ValueError, "Received: -2."),
    ({"cache_interval": 2.0}, ValueError, "Received: 2.0."),
    ({"cache_interval": True}, ValueError, "Received: True."),
    ({"cache_interval": None}, ValueError, "Received: None."),
    ({"eta": 2.0}, ValueError, "Received: eta=2.0."),
    ({"eta": 0.5, "sampler": "euler"}, ValueError, "`eta` belongs to the sampler ddim alone"),
    ({"batch_size": 0}, ValueError, "Received: batch_size=0."),
    ({"batch_size": 1.5}, ValueError, "Received: batch_size=1.5."),
    ({"tiled": 1}, ValueError, "`tiled` must be True, False or None. Received: tiled=1."),
    ({"output": "jpeg"}, ValueError, "`output` must be one of image, latent. Received: output='jpeg'."),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(case[0])[:40] for case in BAD])
def test_bad_argument_is_told_before_anything_is_computed(arguments, error, message, generate, tiny_pipe, monkeypatch):
    def refuse(*arrays):
        raise AssertionError("something was computed")

    for name in ("_encode", "_decode", "_normal"):
        monkeypatch.setattr(tiny_pipe, name, refuse)
    with pytest.raises(error) as caught:
        generate(**arguments)
    assert message in str(caught.value)
