"""The comparison with the peers: what its command reads, in which order it asks, and what it makes of the answers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import machine, profile, report, start, weights, worker
from benchmarks.__main__ import read_options
from benchmarks.cases import SIZES, Case, make_cases
from benchmarks.measure import difference
from benchmarks.systems import SYSTEMS, Job, Measured
from benchmarks.workers import Pool, WorkerFailed, environment, interleaved


def test_command_line_is_read():
    options = read_options(["--tasks", "unet", "memory", "--size", "emoji", "--dtypes", "bfloat16", "float32"])
    assert options.tasks == ["unet", "memory"]
    assert options.dtypes == ["float32", "bfloat16"]
    assert options.systems == list(SYSTEMS)
    assert options.output.name == "peers-emoji.json"


def test_jax_is_asked_where_there_is_a_gpu(monkeypatch):
    case = Case("unet", "bfloat16", 512)
    monkeypatch.setattr(machine, "gpus", list)
    assert SYSTEMS["latentdiff-jax"].why_not(case, "sd15") == "no GPU"
    assert SYSTEMS["latentdiff"].why_not(case, "sd15") is None
    monkeypatch.setattr(machine, "gpus", lambda: ["one"])
    assert SYSTEMS["latentdiff-jax"].why_not(case, "sd15") is None
    assert environment(2, SYSTEMS["latentdiff-jax"].backend)["KERAS_BACKEND"] == "jax"
    assert environment(2)["KERAS_BACKEND"] == "tensorflow"


@pytest.mark.parametrize("wrong", [["--repetitions", "0"], ["--threads", "0"], ["--systems", "pytorch"]])
def test_wrong_command_line_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        read_options(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_memory_is_read_off_the_generation():
    assert make_cases(["memory"], SIZES["sd15"], ["float32"]) == [Case("generate", "float32", 512)]
    both = make_cases(["memory", "generate"], SIZES["sd15"], ["float32", "bfloat16"])
    assert both == [Case("generate", "bfloat16", 512)]


def test_unet_is_asked_at_both_sizes_in_both_dtypes():
    names = {case.name for case in make_cases(["unet"], SIZES["sd15"], ["float32", "bfloat16"])}
    assert names == {"unet 256 float32", "unet 512 float32", "unet 256 bfloat16", "unet 512 bfloat16"}


def test_repetitions_are_interleaved():
    asked = list(interleaved("abc", 4))
    for repetition in range(4):
        assert sorted(name for r, name in asked if r == repetition) == ["a", "b", "c"]
    assert [r for r, _ in asked] == sorted(r for r, _ in asked)
    assert asked[:6] == [(0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "b"), (1, "a")]


class Started:
    """A worker of a name, with its peak of memory."""

    def __init__(self, name, peak, log):
        self.name, self.log, self.ready = name, log, {"peak_gib": peak}
        log.append(f"+{name}")

    def end(self):
        self.log.append(f"-{self.name}")


def test_workers_stay_alive_while_memory_holds_them():
    log = []
    pool = Pool(lambda name: Started(name, 2, log), budget=6, needs=dict.fromkeys("abc", 2))
    for _, name in interleaved("abc", 3):
        assert pool.worker(name).name == name
    pool.close()
    assert log == ["+a", "+b", "+c", *log[3:]] and sorted(log[3:]) == ["-a", "-b", "-c"]


def test_worker_asked_longest_ago_makes_room():
    log = []
    pool = Pool(lambda name: Started(name, 3, log), budget=6, needs=dict.fromkeys("abc", 3))
    for _, name in interleaved("abc", 2):
        pool.worker(name)
    assert log == ["+a", "+b", "-a", "+c", "-c", "+a"]  # c and b are there still when they are asked again


def test_worker_that_fills_memory_alone_is_started_still():
    log = []
    pool = Pool(lambda name: Started(name, 9, log), budget=6, needs={"a": 9, "b": 9})
    pool.worker("a"), pool.worker("b")
    assert log == ["+a", "-a", "+b"]


def result(runs, **more):
    settings = {"size": "sd15", "threads": 2, "num_steps": 20, "repetitions": 3, "cold_repetitions": 3}
    machine = {"processor": "P", "gpus": [], "packages": {"numpy": "2"}}
    blank = {"skipped": [], "errors": [], "differences": []}
    return {"machine": machine, "settings": settings, "runs": runs, **blank, **more}


def runs_of(case, system, seconds, **figures):
    return [{"case": case, "system": system, "repetition": i, "wall_s": s, **figures} for i, s in enumerate(seconds)]


def test_medians_and_ratios_are_numpys():
    rng = np.random.default_rng(0)
    seconds = {name: rng.uniform(1, 2, size=5).tolist() for name in ("latentdiff", "diffusers", "diffusers-compile")}
    rows = report.rows(result([run for name, each in seconds.items() for run in runs_of("text float32", name, each)]))
    best = min(np.median(seconds["diffusers"]), np.median(seconds["diffusers-compile"]))
    for row in rows:
        assert row.median == np.median(seconds[row.system])
        assert row.ratio == pytest.approx(np.median(seconds[row.system]) / best)
        assert row.spread == pytest.approx(np.ptp(seconds[row.system]) / np.median(seconds[row.system]))


def test_ratio_needs_diffusers():
    (row,) = report.rows(result(runs_of("text float32", "keras-cv", [1.0])))
    assert row.ratio is None


def test_start_ends_before_its_process_does():
    (row,) = report.rows(result(runs_of("start 512 float32", "diffusers", [9.0], done_s=4.0)))
    assert row.median == 4.0


def test_generation_gives_time_and_memory():
    rows = report.rows(result(runs_of("generate 512 float32", "diffusers", [9.0, 8.0], peak_gib=3.5)))
    assert [(row.case, row.unit, row.median) for row in rows] == [
        ("generate 512 float32", "s", 8.5),
        ("memory 512 float32", "GiB", 3.5),
    ]


@pytest.mark.parametrize(("ours", "verdict"), [(0.79, "met"), (0.81, "**missed**")])
def test_goal_is_judged_on_the_largest_pictures(ours, verdict):
    runs = [
        *runs_of("unet 256 bfloat16", "latentdiff", [5.0]),
        *runs_of("unet 256 bfloat16", "diffusers", [1.0]),
        *runs_of("unet 512 bfloat16", "latentdiff", [ours]),
        *runs_of("unet 512 bfloat16", "diffusers", [1.2]),
        *runs_of("unet 512 bfloat16", "diffusers-channels-last", [1.0]),
    ]
    (line,) = [line for line in report.goal_lines(result(runs)) if "UNet evaluation, bfloat16 (" in line]
    assert line == f"- UNet evaluation, bfloat16 (unet 512 bfloat16): {ours:.2f} of the best of diffusers, goal 0.80: {verdict}"  # fmt: skip  # noqa: E501


def test_bend_is_the_distance_from_numpys_line():
    assert report.bend({"1": 3.0, "2": 5.0, "4": 9.0}) == pytest.approx(0, abs=1e-12)
    counts, times = np.arange(1, 5), np.array([1.0, 2.1, 2.9, 4.4])
    line = np.polyval(np.polyfit(counts, times, 1), counts)
    found = report.bend(dict(zip(map(str, counts), times, strict=True)))
    assert found == pytest.approx(np.abs(times / line - 1).max())


def test_laws_are_judged():
    straight = {"1": 1.0, "2": 2.0, "3": 3.0}
    run = {"case": "scaling 512 float32", "system": "latentdiff", "batch": straight, "steps": straight}
    held = {"traces": 0, "growth_mib": 0.5}
    bent = {"1": 1.0, "2": 2.0, "3": 3.5}
    for broken in ({"traces": 1}, {"growth_mib": 30.0}, {"batch": bent}, {"steps": bent}, {}):
        (line,) = report.law_lines(result([{**run, **held, **broken}]))
        assert line.endswith("missed**" if broken else ": met")


@pytest.mark.parametrize(("seconds", "verdict"), [(0.19, ": met"), (0.21, "missed**")])
def test_what_fit_adds_is_judged(seconds, verdict):
    runs = runs_of("fit float32", "latentdiff", [seconds])
    (line,) = [line for line in report.goal_lines(result(runs)) if "`fit` adds" in line]
    assert line.endswith(verdict)


def test_table_names_what_failed_and_what_was_left_out():
    runs = runs_of("train float32", "diffusers", [2.0], cpu_s=3.5)
    skipped = [{"system": "keras-cv", "case": "text float32", "reason": "keras_cv not installed"}]
    errors = [{"system": "openvino", "case": "text float32", "error": "RuntimeError: no"}]
    differences = [{"case": "train float32", "system": "diffusers", "relative": 1e-6}]
    said = report.table(result(runs, skipped=skipped, errors=errors, differences=differences))
    assert "| train float32 | diffusers | 2 s | 0% | 1.00 (16.0 images/s) | 3.5 | 1.0e-06 |" in said.splitlines()
    assert "- FAILED: openvino, text float32: RuntimeError: no" in said
    assert "- left out: keras-cv, keras_cv not installed: text float32" in said


def test_difference_is_relative_for_numbers_and_grey_levels_for_pictures():
    assert difference(np.array([1.0, -4.0]), np.array([1.5, -5.0])) == {"relative": 0.2}
    ours, theirs = np.array([0, 255], "uint8"), np.array([4, 253], "uint8")
    assert difference(ours, theirs) == {"grey_levels": 3.0}


def test_a_run_draws_its_plots(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import __main__ as command
    from benchmarks import measure

    done = SimpleNamespace(run=lambda: result(runs_of("text float32", "latentdiff", [1.0, 1.1])))
    monkeypatch.setattr(measure, "Measurement", lambda options, folder: done)
    command.main(["--size", "tiny", "--plots", str(tmp_path / "drawn")])
    assert (tmp_path / "drawn" / "benchmark_speed.png").read_bytes().startswith(b"\x89PNG")
    assert "benchmark_speed.png" in capsys.readouterr().out


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    runs = [*runs_of("text float32", "latentdiff", [1, 2]), *runs_of("text float32", "diffusers", [2, 3])]
    (path,) = plots.draw(result(runs), tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_repetition_lasts_as_long_as_asked():
    calls = []
    repeat = worker.Repeat(lambda: calls.append(1), seconds=1e9)
    assert repeat.calls == worker.MOST_CALLS
    repeat()
    assert len(calls) == 1 + worker.MOST_CALLS


def test_what_measures_by_itself_is_asked_once_a_repetition():
    calls = []
    repeat = worker.Repeat(Measured(lambda: calls.append(1) or {"wall_s": 0.5}), seconds=1e9)
    assert calls == []
    assert repeat() == {"wall_s": 0.5} and calls == [1]


def test_system_that_is_not_installed_is_named():
    absent = SYSTEMS["diffusers"].__class__("theirs", packages=("no_such_package",))
    assert absent.why_not(Case("unet", "float32", 16), "tiny") == "no_such_package not installed"
    assert "sd15" in (
        SYSTEMS["keras-cv"].__class__("kerascv", sizes=("sd15",)).why_not(Case("text", "float32"), "tiny")
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the tiny model in it."""
    work = tmp_path_factory.mktemp("benchmarks")
    weights.write("tiny", work / "tiny")
    return work


def job(work, case, system="latentdiff"):
    return Job(system, case, work / "tiny", work, "tiny", threads=1, num_steps=2, seconds=0.0)


@pytest.mark.parametrize(("task", "shape"), [("unet", (2, 8, 8, 4)), ("text", (1, 77, 8)), ("decode", (1, 16, 16, 3))])
def test_latentdiff_is_rehearsed(task, shape, tiny):
    case = Case(task, "float32", None if task == "text" else 16)
    repeat = worker.warm(job(tiny, case))
    said = np.load(worker.output_path(tiny, case, "latentdiff"))
    assert said.shape == shape and np.isfinite(said).all() and said.std() > 0
    assert repeat()["wall_s"] > 0


def test_profile_finds_operations_of_each_kind(tiny):
    found = profile.measure("unet", job(tiny, Case("unet", "float32", 16)))
    assert {"convolutions", "products of matrices", "softmax"} <= found["kinds"].keys()
    assert all(0 < seconds for seconds in found["kinds"].values()) and found["wall_s"] > 0
    assert not any("function" in name for name in found["rest"])
    assert found["floor"]["multiply_adds"] > 1e5 and 0 < found["floor"]["seconds"] < 1


def test_start_is_the_sum_of_its_stages(tmp_path):
    said = start.main(["--size", "tiny", "--dtype", "float32", "--output", str(tmp_path / "start.json")])
    stages = [seconds for name, seconds in said.items() if name.endswith("_s")]
    assert said["import_keras_s"] > 0.1 and said["trace_unet_s"] > 0.01 and min(stages) >= 0
    assert sum(stages) == pytest.approx(2 * said["whole_s"], abs=0.02)
    assert json.loads((tmp_path / "start.json").read_text())["whole_s"] == said["whole_s"]


@pytest.mark.parametrize(("dtype", "columns"), [("float32", 5), ("bfloat16", 3)])
def test_products_are_counted(dtype, columns):
    import tensorflow as tf

    def function(x):
        y = tf.nn.conv2d(x, tf.ones((3, 3, 4, 8), dtype), 1, "SAME")  # 2 x 6 x 7 positions of 9 x 4 numbers, 8 times
        return tf.matmul(tf.reshape(y, (2, 42, 8)), tf.ones((2, 8, columns), dtype)) @ tf.ones((columns, 1), dtype)

    graph = tf.function(function).get_concrete_function(tf.TensorSpec((2, 6, 7, 4), dtype)).graph
    counts = [profile.multiply_adds(product) for product in profile.products(graph)]
    assert counts == [84 * 36 * 8, 84 * 8 * columns, 84 * columns]
    took = [profile._alone(product, profile.in_tensorflow) for product in profile.products(graph)]
    assert len(took) == 3 and min(took) > 0


def test_generation_is_rehearsed(tiny):
    case = Case("generate", "float32", 16)
    worker.cold(job(tiny, case))
    assert (tiny / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert np.load(worker.output_path(tiny, case, "latentdiff")).shape == (16, 16, 3)


def test_job_survives_the_pipe(tiny):
    from dataclasses import asdict

    given = job(tiny, Case("unet", "float32", 16))
    line = json.dumps({**asdict(given), "directory": str(given.directory), "work": str(given.work)})
    assert worker.read_job(line) == given


def test_failing_system_does_not_end_the_run(tiny, monkeypatch):
    from benchmarks import measure

    def started(job, timeout):
        raise WorkerFailed("RuntimeError: no")

    monkeypatch.setattr(measure, "Worker", started)
    options = read_options(["--size", "tiny", "--tasks", "text", "--systems", "latentdiff", "--dtypes", "float32"])
    options.output = tiny / "results.json"
    measurement = measure.Measurement(options, tiny)
    measurement.run()
    kept = json.loads(Path(options.output).read_text())
    assert kept["errors"] == [{"system": "latentdiff", "case": "text float32", "error": "RuntimeError: no"}]
    assert kept["runs"] == [] and "processor" in kept["machine"]
