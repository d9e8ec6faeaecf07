"""Makes `tests/goldens`: two tiny models and a CLIP pair, and what diffusers and transformers say with them.

    python scripts/make_goldens.py [tests/goldens]

Needs the extra with torch, diffusers and transformers. `tests/test_goldens.py` and `tests/test_clip_directory.py`
read the result without them. The models' weights depend on the machine in their last bits, so models and arrays are
always made together.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "peers"))


def goldens(kind: str, directory: Path) -> dict[str, np.ndarray]:
    """The arrays of one kind; everything that is random is among them."""
    import reference
    import tiny_pipelines

    pipe = reference.open_pipeline(directory)
    rng = np.random.default_rng(0)
    shape = (len(reference.PROMPTS), *tiny_pipelines.LATENT_SIZE, 4)
    noise = rng.standard_normal((1 + reference.NUM_STEPS, *shape)).astype(np.float32)
    timestep = np.array([1, 951], dtype=np.float32)
    image = rng.uniform(-1, 1, (1, 24, 40, 3)).astype(np.float32)
    tokens = reference.tokens(pipe, reference.TEXTS)
    context = reference.context(pipe, reference.tokens(pipe, reference.PROMPTS))
    arrays = {
        "texts": np.array(reference.TEXTS),
        "tokens": tokens,
        "prompts": np.array(reference.PROMPTS),
        "context": context,
        "noise": noise,
        "timestep": timestep,
        "unet": reference.unet_output(pipe.unet, noise[0], timestep, context),
        "image": image,
        "encoded": reference.encoded(pipe.vae, image),
        "decoded": reference.decoded(pipe.vae, noise[0]),
        "num_steps": np.array(reference.NUM_STEPS),
        "guidance_scale": np.array(reference.GUIDANCE_SCALE),
    }
    for sampler in reference.SAMPLERS:
        latent = reference.final_latent(pipe, noise if sampler in reference.NOISY else noise[0], sampler=sampler)
        arrays[f"latent_{sampler}"] = latent
        arrays[f"picture_{sampler}"] = reference.picture(pipe, latent)
    arrays["made_by"] = np.array([f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch")])
    return arrays


def main() -> None:
    import reference  # noqa: F401  (sets torch's threads)
    import tiny_clip
    import tiny_pipelines

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "tests" / "goldens")
    directory = parser.parse_args().directory
    for kind in tiny_pipelines.SCHEDULERS:
        tiny_pipelines.save(tiny_pipelines.build(kind), kind, directory / kind)
        np.savez_compressed(directory / f"{kind}.npz", **goldens(kind, directory / kind))
    tiny_clip.save_goldens(directory / "clip")


if __name__ == "__main__":
    main()
