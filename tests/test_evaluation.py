"""The judge itself: perfect drawings are found, others are not; and the page that says it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import parts

from latentdiff import presets
from latentdiff.backend import psnr_and_ssim
from latentdiff.cli import main
from latentdiff.evaluation.retrieval import Gallery, describe

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


def test_a_run_is_judged_by_its_own_data(tmp_path, capsys):
    toy_pictures.main(tmp_path / "toy", count=8, size=16)
    run = tmp_path / "run"
    presets.save_pipeline(parts(), run / "model")
    kept = {"data": ["trained/"], "validation_data": [str(tmp_path / "toy")], "size": 16, "prompts": ["a red circle"]}
    (run / "config.json").write_text(json.dumps(kept))
    options = ["--num-steps", "1", "--count", "4", "--batch-size", "4", "--no-progress"]
    assert main(["evaluate", str(run), *options]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "report.md")
    figures = json.loads((run / "report" / "report.json").read_text())
    assert (figures["count"], figures["data"]) == (4, [str(tmp_path / "toy")])
    with Image.open(run / "report" / "sheet.png") as sheet:
        assert sheet.size == (4 * 16, 16)


def test_a_model_alone_says_nothing_of_data(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "emoji"])
    assert "--data and --output must be given, but for a run's directory. Received: 'emoji'." in capsys.readouterr().err
