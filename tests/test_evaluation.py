"""The judge itself: perfect drawings are found, others are not; and the page that says it."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import parts, randomize, to_numpy

from latentdiff import presets
from latentdiff.backend import psnr_and_ssim
from latentdiff.checkpoints.diffusers import write_component
from latentdiff.cli import main
from latentdiff.data import index_source
from latentdiff.data.draws import uniform
from latentdiff.evaluation import Pictures, pictures_of_run
from latentdiff.evaluation.report_clip import find
from latentdiff.evaluation.retrieval import Gallery, describe
from latentdiff.models.image_encoder import CLIPImageEncoder
from latentdiff.training import CLIPTraining
from latentdiff.training_config import as_json, read_config, run_config

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "emoji"))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import judge_emoji  # noqa: E402
import toy_pictures  # noqa: E402


def pictures(count, seed=0, size=32):
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), "uint8")
    return coarse.repeat(size // 8, axis=1).repeat(size // 8, axis=2)


def test_a_gallery_finds_itself():
    gallery = pictures(40)
    found = Gallery(gallery).find(gallery[10:30], np.arange(10, 30))
    assert (found.nearest, found.in_five, found.median_rank, found.chance) == (1.0, 1.0, 0.0, 1 / 40)


def test_rank_is_how_many_are_nearer():
    gallery = pictures(40)
    drawn = gallery[[0, 1, 2]]
    found = Gallery(gallery).find(drawn, np.array([0, 2, 1]))  # two of them are each other's
    assert found.nearest == pytest.approx(1 / 3) and found.median_rank >= 1


def test_drawings_that_know_nothing_are_found_by_chance():
    found = Gallery(pictures(50)).find(pictures(200, seed=1), np.arange(200) % 50)
    assert found.nearest < 0.08 and 12 < found.median_rank < 38


def test_description_is_that_of_the_emojis_judge():
    images = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), "uint8")
    np.testing.assert_allclose(describe(images), judge_emoji.describe(images), atol=1e-5)


def test_other_sizes_are_told():
    with pytest.raises(ValueError, match="multiples of 8"):
        describe(np.zeros((1, 12, 16, 3), "uint8"))
    with pytest.raises(ValueError, match="must have the gallery's size"):
        Gallery(pictures(2)).find(pictures(2, size=16), np.arange(2))


def test_psnr_and_ssim_of_known_pictures():
    images = pictures(2)
    other = np.clip(images.astype(int) // 2 + 60, 0, 255).astype("uint8")
    psnr, ssim = psnr_and_ssim(images, other)
    errors = ((images.astype(float) - other) ** 2).mean(axis=(1, 2, 3))
    assert psnr == pytest.approx((10 * np.log10(255**2 / errors)).mean(), rel=1e-5)
    assert 0 < ssim < 1 and psnr_and_ssim(images, images)[1] == pytest.approx(1.0)


def test_report_says_and_shows_everything(tmp_path, capsys):
    toy_pictures.main(tmp_path / "toy", count=20, size=16)
    presets.save_pipeline(parts(), tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    arguments = ["--data", str(tmp_path / "toy"), "--output", str(tmp_path / "report"), "--size", "16", "--no-progress"]
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--num-steps", "1", "--count", "8", "--batch-size", "4"]
    assert main(["evaluate", str(tmp_path / "model"), *arguments, *options]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "report.md")
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures["count"] == 8 and len(figures["loss_by_t"]) == 10
    assert figures["loss"] == pytest.approx(np.mean([x for x in figures["loss_by_t"] if x]), rel=0.5)
    page = (tmp_path / "report" / "report.md").read_text()
    for name in ("reconstructions.png", "seen.png", "loss_by_t.png", "sheet.png"):
        assert name in page and (tmp_path / "report" / name).is_file()
    with Image.open(tmp_path / "report" / "sheet.png") as sheet:
        assert sheet.size == (4 * 16, 2 * 16)
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "model"), *arguments])
    assert "must be new" in capsys.readouterr().err


def write_run(directory, kind, data, **values):
    """What a run of a kind leaves, but for its model and its checkpoints; `clipnorm` is newer than the run."""
    config = read_config(kind, None, {"data": [str(data)], "steps": 4, "size": 16, "batch_size": 4, **values})
    directory.mkdir(exist_ok=True)
    kept = {name: value for name, value in as_json(config).items() if name != "clipnorm"}
    (directory / "config.json").write_text(json.dumps({**kept, "data_digest": "0"}))
    (directory / "losses.csv").write_text("step,loss\n1,0.5\n2,0.25\n3,-0.125\n4,0.125\n")


def report_of(directory):
    """The figures and the page; every picture that the page names is there, and no other."""
    page = (directory / "report.md").read_text()
    assert set(re.findall(r"\((\w+\.png)\)", page)) == {path.name for path in directory.glob("*.png")}
    return json.loads((directory / "report.json").read_text()), page


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Captioned pictures, of 16 x 16 pixels."""
    toy = tmp_path_factory.mktemp("pictures") / "toy"
    toy_pictures.main(toy, count=24, size=16)
    return toy


def test_a_run_is_judged_by_its_validations_data(toy, tmp_path, capsys):
    run = tmp_path / "run"
    presets.save_pipeline(parts(), run / "model")
    write_run(run, "diffusion", "gone/", validation_data=[str(toy)], start="x", prompts=["a red circle"])
    options = ["--num-steps", "1", "--count", "4", "--batch-size", "4", "--no-progress"]
    assert main(["evaluate", str(run), *options]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "report.md")
    figures, page = report_of(run / "report")
    assert (figures["count"], figures["pictures"], figures["data"]) == (4, 24, [str(toy)])
    assert figures["trained_on"] is False and "nearest of 24" in page and "losses.png" in page
    with Image.open(run / "report" / "sheet.png") as sheet:
        assert sheet.size == (4 * 16, 16)


def test_what_a_run_held_out_is_judged_and_the_rest_is_searched(toy):
    config = read_config("diffusion", None, {"data": [str(toy)], "steps": 1, "start": "x", "validation": 0.3})
    index = index_source(str(toy))
    found = pictures_of_run(config, 4)
    numbers = [int(e.digest[:13], 16) for e in index]
    held = {e.digest for e, at in zip(index, uniform(config.seed, np.array(numbers)), strict=True) if at < 0.3}
    assert 4 <= len(held) < 20 and {e.digest for e in found.judged} == held
    assert {e.digest for e in found.others} == {e.digest for e in index} - held and found.trained_on is False
    few = pictures_of_run(config, len(held) + 1)
    assert [e.name for e in few.judged] == [e.name for e in index] and not few.others and few.trained_on


def test_no_more_are_judged_than_whole_batches(toy):
    index = index_source(str(toy))
    pictures = Pictures(["toy"], index.select(range(2, 13)), index.select(range(2)))
    names = [e.name for e in index]
    for count, batch_size, expected in ((100, 4, 8), (100, 16, 11), (3, 16, 3), (7, 2, 6)):
        found = pictures.at_most(count, batch_size)
        assert [e.name for e in found.judged] == names[2 : 2 + expected] and len(found) == 13
        assert sorted(e.name for e in (*found.judged, *found.others)) == names[:13]


@pytest.fixture(scope="module")
def autoencoder(toy, tmp_path_factory):
    """A run of an autoencoder, which draws no better than its random weights."""
    run = tmp_path_factory.mktemp("runs") / "autoencoder"
    shutil.copytree(toy, run / "uncaptioned", ignore=shutil.ignore_patterns("*.txt"))
    network = parts().autoencoder
    write_run(run, "autoencoder", run / "uncaptioned", validation=0.5)
    write_component(run / "model", "autoencoder", network.config, presets.HeldArrays(network))
    return run


def test_a_run_of_an_autoencoder_is_judged_by_what_comes_back(autoencoder, toy, capsys):
    assert main(["evaluate", str(autoencoder), "--batch-size", "4", "--no-progress"]) == 0
    assert capsys.readouterr().out.strip() == str(autoencoder / "report" / "report.md")
    figures, page = report_of(autoencoder / "report")
    assert "pictures come back from their latents" in page and "losses.png" in page
    assert figures["kind"] == "autoencoder" and figures["trained_on"] is False and 4 <= figures["count"] < 24

    held = pictures_of_run(run_config("autoencoder", autoencoder), 4).judged
    images = np.stack([np.asarray(Image.open(toy / e.name).convert("RGB")) for e in held])[: figures["count"]]
    back = to_numpy(parts().autoencoder(images.astype("float32") / 127.5 - 1))
    back = np.round((np.clip(back, -1, 1) + 1) * 127.5)
    errors = ((images - back) ** 2).mean(axis=(1, 2, 3))
    assert figures["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), abs=0.01)
    with Image.open(autoencoder / "report" / "reconstructions.png") as sheet:
        assert np.abs(np.asarray(sheet)[:16, :16].astype(int) - images[0]).max() == 0


def test_an_autoencoders_directory_is_judged_on_pictures_without_captions(autoencoder, tmp_path):
    Image.fromarray(pictures(1, size=16)[0]).save(tmp_path / "alone.png")
    arguments = ["--data", str(tmp_path), "--size", "16", "--output", str(tmp_path / "report"), "--no-progress"]
    assert main(["evaluate", str(autoencoder / "model"), *arguments]) == 0
    figures, page = report_of(tmp_path / "report")
    assert (figures["count"], figures["trained_on"]) == (1, None) and "Judged on 1 of 1 pictures." in page


@pytest.fixture(scope="module")
def clip(toy, tmp_path_factory):
    """A run of a CLIP pair with random weights."""
    run = tmp_path_factory.mktemp("runs") / "clip"
    write_run(run, "clip", toy, validation=0.0, patch_size=8)
    text_encoder, tokenizer = parts().text_encoder, parts().tokenizer
    image_encoder = CLIPImageEncoder(16, 8, width=8, depth=1, heads=2, mlp_width=8, projection_dim=4)
    training = CLIPTraining(text_encoder, randomize(image_encoder, seed=5), tokenizer.end_id)
    training.save_to_preset(run / "model", tokenizer)
    return run


def test_a_run_of_a_clip_pair_is_judged_by_what_finds_its_own(clip, toy):
    assert main(["evaluate", str(clip), "--batch-size", "8", "--no-progress"]) == 0
    figures, page = report_of(clip / "report")
    assert (figures["kind"], figures["count"], figures["captions"]) == ("clip", 24, 12)
    assert figures["trained_on"] is True and "24 of 24 pictures of its training" in page and "losses.png" in page

    training, tokenizer = CLIPTraining.from_preset(clip / "model"), parts().tokenizer
    index = index_source(str(toy))
    images = np.stack([np.asarray(Image.open(toy / e.name).convert("RGB"), "float32") for e in index]) / 127.5 - 1
    captions = sorted({e.captions[0] for e in index})
    image, text = to_numpy(training.embed_image(images)), to_numpy(training.embed_text(tokenizer(captions)))
    order = np.argsort(-(text @ image.T), axis=1)  # each caption's pictures, the nearest first
    right = [[index[j].captions[0] == caption for j in row] for caption, row in zip(captions, order, strict=True)]
    said = figures["text_to_image"]
    assert said["nearest"] == pytest.approx(np.mean([row[0] for row in right]))
    assert said["in_five"] == pytest.approx(np.mean([any(row[:5]) for row in right]))
    assert said["chance"] == pytest.approx(2 / 24)
    assert said["chance_in_five"] == pytest.approx(1 - np.prod([(22 - i) / (24 - i) for i in range(5)]))
    order = np.argsort(-(image @ text.T), axis=1)
    right = [[captions[i] == e.captions[0] for i in row] for e, row in zip(index, order, strict=True)]
    said = figures["image_to_text"]
    assert said["nearest"] == pytest.approx(np.mean([row[0] for row in right]))
    assert said["in_five"] == pytest.approx(np.mean([any(row[:5]) for row in right]))
    assert (said["chance"], said["chance_in_five"]) == (pytest.approx(1 / 12), pytest.approx(5 / 12))


def test_found_is_what_is_right_among_the_nearest():
    nearness = np.tile([9.0, 8, 7, 6, 5, 4, 3], (4, 1))
    right = np.zeros((4, 7), bool)
    right[[0, 1, 2, 3, 3], [0, 4, 5, 1, 6]] = True
    found = find(nearness, right)
    assert (found.nearest, found.in_five) == (1 / 4, 3 / 4)
    assert found.chance == pytest.approx((3 * 1 / 7 + 2 / 7) / 4)
    assert found.chance_in_five == pytest.approx((3 * 5 / 7 + 1 - 1 / 21) / 4)  # 1 of 21 hands of five misses both


def test_what_is_the_same_for_everything_finds_nothing():
    """As a pair that has collapsed, or has become NaN."""
    for nearness in (np.ones((20, 20)), np.full((20, 20), np.nan)):
        found = find(nearness, np.eye(20, dtype=bool))
        assert (found.nearest, found.in_five) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "autoencoder",
            ["--prompts", "x", "--seed", "1"],
            "An autoencoder draws nothing: it must be evaluated without",
        ),
        ("autoencoder", ["--prompts", "x", "--seed", "1"], "Received: --prompts, --seed."),
        ("clip", ["--size", "32", "--num-steps", "2"], "Received: --num-steps, --size."),
        ("autoencoder/model", ["--data", "x", "--output", "y"], "--size must be given for an autoencoder"),
        (
            "autoencoder",
            ["--size", "17", "--data"],
            "`size` must be a multiple of 2 and at least 11. Received: size=17",
        ),
        ("autoencoder", ["--size", "8", "--data"], "`size` must be a multiple of 2 and at least 11. Received: size=8"),
        ("empty", [], "must be an autoencoder, a CLIP pair, a pipeline, or a run of one. Received: "),
        ("unet", [], "with unet."),
        ("begun", [], "A run has a model from its first checkpoint on."),
    ],
)
def test_what_cannot_be_evaluated_is_told(model, options, message, autoencoder, clip, toy, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "begun", "clip", toy)
    network = parts().unet
    write_component(tmp_path / "unet", "unet", network.config, presets.HeldArrays(network))
    name, _, below = model.partition("/")
    path = {"autoencoder": autoencoder, "clip": clip}.get(name, tmp_path / name) / below
    data = [str(toy)] if options[-1:] == ["--data"] else []
    with pytest.raises(SystemExit):
        main(["evaluate", str(path), "--output", str(tmp_path / "report"), *options, *data])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_model_alone_says_nothing_of_data(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "emoji"])
    assert "--data and --output must be given, but for a run's directory. Received: 'emoji'." in capsys.readouterr().err
