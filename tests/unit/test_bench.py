"""A benchmark measures every cell of all models in turns, says what it could not do, and warns of what misleads."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

import upop
from upop import benchrun, meters
from upop.bench import Bench, Cell, Row, Subject, judge, recorded_accuracy
from upop.benchrun import Grid, measure_cell, run_bench, short_names
from upop.cli import bench as cli_bench
from upop.errors import UpopError
from upop.families import find_structures
from upop.folder import weights_hash
from upop.meters import NoMeter, find_meter, peak_mib
from upop.plots import accuracy_over_time
from upop.profiling import Times, time_in_turns

CPU = torch.device("cpu")
NONE = NoMeter("not measured: a test")


def write_result(model: Path, **changes) -> None:
    """A run's result.json beside the model folder, with the little that a benchmark reads of it."""
    accuracy = {"dense": {"validation": 0.9, "test": 0.8}, "retrain": {"validation": 0.7, "test": 0.6}}
    result = {"accuracy": accuracy, "weights": weights_hash(model)} | changes
    (model.parent / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_model, random_keep) -> list[str]:
    """Model folders of a dense model and of the same, pruned, in run folders with known accuracies."""
    root = tmp_path_factory.mktemp("runs")
    dense = make_model("deit")
    models = {"dense": dense, "pruned": upop.slim(dense, random_keep(find_structures(dense)))}
    for name, model in models.items():
        upop.save_pretrained(model, root / name / "model")
        write_result(root / name / "model")
    return [str(root / name / "model") for name in models]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Makes runners that do nothing but leave their model's parameter count here, and refuse onnx in bfloat16.

    Memory is not measured for them, nor freed: that takes longer than all else.
    """
    made: list[str] = []

    def fake(model, images, *, runtime="eager", dtype="float32", threads=None):
        if (runtime, dtype) == ("onnx", "bfloat16"):
            raise UpopError("runtime onnx: expected dtype float32")
        name = str(sum(p.numel() for p in model.parameters()))
        return lambda: made.append(name)

    monkeypatch.setattr(benchrun, "make_runner", fake)
    monkeypatch.setattr(benchrun, "peak_mib", lambda run, device: 1.0)
    monkeypatch.setattr(benchrun, "_free", lambda device: None)
    return made


def cell(models, chosen: Cell | None = None) -> list[Row]:
    chosen = chosen or Cell("eager", "float32", 2)
    return measure_cell(models, chosen, image_size=32, seconds=0, device=CPU, meter=NONE)


def test_there_is_a_row_for_every_model_in_every_cell(folders, calls):
    found = run_bench(folders, Grid(batches=(1, 3), seconds=0, device="cpu"))
    wanted = product(("eager", "compile", "onnx"), ("float32", "bfloat16"), (1, 3), ("dense", "pruned"))
    assert [(r.runtime, r.dtype, r.batch, r.model) for r in found.rows] == list(wanted)
    assert found.status == "complete"
    for row in found.rows:
        refused = (row.runtime, row.dtype) == ("onnx", "bfloat16")
        assert (row.refused is not None) == refused == (row.median_ms is None)
        assert row.runs == (0 if refused else benchrun.MIN_RUNS)
        if not refused:
            assert row.images_per_s == pytest.approx(1e3 * row.batch / row.median_ms)
        assert (row.memory_mib is not None) == (row.runtime != "onnx")
        assert row.joules_per_image is None


def test_the_models_take_turns(calls):
    models = {"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(2, 1)}
    cell(models)
    warm_up = 3
    assert calls == ["2", "3"] + ["2", "3"] * (warm_up + benchrun.MIN_RUNS)


def test_times_in_turns_are_all_kept_in_order():
    made: list[str] = []
    found = time_in_turns({n: lambda n=n: made.append(n) for n in "ab"}, min_runs=4, max_seconds=0)
    assert "".join(made) == "ab" * 7
    assert found["a"].runs == len(found["a"].runs_ms) == 4
    assert Times((4.0, 1.0, 2.0, 3.0, 9.0)).median_ms == 3
    assert Times((4.0, 1.0, 2.0, 3.0, 9.0)).spread_ms == 2
    with pytest.raises(UpopError, match="time_in_turns: expected min_runs >= 2, for a median and a spread, got 1"):
        time_in_turns({}, min_runs=1)


def test_the_ratio_is_that_of_neighbouring_passes(calls, monkeypatch):
    # The machine is ten times slower in the last two passes; medians alone would say 2.5.
    times = {"a": Times((2.0, 4.0, 2.0, 40.0, 40.0)), "b": Times((1.0, 1.6, 1.0, 10.0, 20.0))}
    monkeypatch.setattr(benchrun, "time_in_turns", lambda *_, **__: times)
    a, b = cell({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)}, Cell("eager", "float32", 8))
    assert (a.speedup_low, a.speedup, a.speedup_high) == (1, 1, 1)
    assert (b.speedup_low, b.speedup, b.speedup_high) == (2, 2, 2.5)
    assert (b.median_ms, b.runs, b.images_per_s) == (1.6, 5, 5000)
    assert b.spread_ms == 9


def test_what_cannot_run_is_a_row_that_says_why_and_the_others_are_measured(monkeypatch):
    def broken(model, images, **_):
        if model.in_features == 1:
            raise RuntimeError("\nout of luck\nand a long traceback")
        return lambda: images.sum()

    monkeypatch.setattr(benchrun, "make_runner", broken)
    a, b = cell({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(2, 1)})
    assert (a.refused, a.median_ms, a.runs) == ("RuntimeError: out of luck", None, 0)
    assert b.refused is None
    assert b.median_ms > 0
    assert b.speedup is None, "there is nothing to compare it with"


def test_an_error_while_timing_costs_one_cell_only(monkeypatch, calls):
    def broken(*_, **__):
        raise MemoryError("no more")

    monkeypatch.setattr(benchrun, "time_in_turns", broken)
    rows = cell({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(2, 1)})
    assert [row.refused for row in rows] == ["MemoryError: no more"] * 2


def test_bench_json_is_there_after_every_cell_and_reads_back_the_same(folders, calls, tmp_path):
    seen: list[tuple[str, int, int]] = []

    class Watcher(benchrun.Nobody):
        def ends(self, rows):
            written = json.loads((tmp_path / "bench.json").read_text())
            seen.append((written["status"], len(written["rows"]), len(rows)))

    grid = Grid(runtimes=["eager"], batches=[1], seconds=0, device="cpu", threads=1)
    found = run_bench(folders, grid, out=tmp_path, watcher=Watcher())
    assert seen == [("partial", 2, 2), ("complete", 4, 2)]
    values = json.loads((tmp_path / "bench.json").read_text())
    assert Bench.from_dict(values) == Bench.from_dict(found.to_dict())
    assert Bench.from_dict(values).to_dict() == values
    assert values["threads"] == 1
    assert {"torch", "onnxruntime"} <= set(values["versions"])
    assert {"command", "hardware", "memory", "energy", "min_runs", "seconds_per_cell"} <= set(values)
    dense, pruned = values["models"]
    assert pruned["params"] < dense["params"]
    assert pruned["macs"] < dense["macs"]
    assert pruned["accuracy"] == {"validation": 0.7, "test": 0.6}
    with pytest.raises(UpopError, match=r"x\.json: expected schema 1, got None; run upop bench again"):
        Bench.from_dict({}, where="x.json")
    with pytest.raises(UpopError, match=r"bench\.json: expected what upop bench writes, got 'rows'"):
        Bench.from_dict({"schema": 1, "models": []})


def test_threads_hold_for_the_benchmark_and_not_after_it(folders, monkeypatch):
    used: list[int] = []

    def fake(model, images, **_):
        return lambda: used.append(torch.get_num_threads())

    monkeypatch.setattr(benchrun, "make_runner", fake)
    before = torch.get_num_threads()
    grid = Grid(runtimes=["eager"], dtypes=["float32"], batches=[1], seconds=0, threads=2, device="cpu")
    assert run_bench(folders, grid).facts["threads"] == 2
    assert set(used) == {2}
    assert torch.get_num_threads() == before


def test_all_models_see_the_same_images_and_callers_random_numbers_stay(monkeypatch):
    seen = []

    def fake(model, images, **_):
        seen.append(images)
        return lambda: None

    monkeypatch.setattr(benchrun, "make_runner", fake)
    models = {"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)}
    state = torch.get_rng_state()
    cell(models)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*seen)
    assert seen[0].shape == (2, 3, 32, 32)


def test_a_pruned_model_needs_less_memory_than_its_dense_one(folders):
    grid = Grid(runtimes=["eager"], dtypes=["float32", "bfloat16"], batches=[4], seconds=0, device="cpu")
    single, small, half, _ = run_bench(folders, grid).rows
    assert small.memory_mib < single.memory_mib
    # Half, and where the CPU has matrix tiles what it packs weights into, which shows in so small a model.
    assert 0.45 * single.memory_mib < half.memory_mib < 0.7 * single.memory_mib


# What a reader is warned of.

DENSE = Subject("dense", "d", None, 100, 1000, {"attn": [64, 64], "mlp": [8, 8]}, {})
SMALL = Subject("small", "s", None, 50, 500, {"attn": [5, 24], "mlp": [4, 4]}, {})


def pair(batch: int, dense_ms: float, small_ms: float, dtype: str = "float32", spread: float = 0.0) -> list[Row]:
    """Rows of the two models in one cell."""
    ratio = dense_ms / small_ms
    return [
        Row(name, "eager", dtype, batch, ms, spread, 10, 1e3 * batch / ms, r, r, r)
        for name, ms, r in (("dense", dense_ms, 1.0), ("small", small_ms, ratio))
    ]


def warnings(*cells: list[Row], small: Subject = SMALL) -> dict[tuple[str, int], str | None]:
    rows = judge([row for rows in cells for row in rows], (DENSE, small))
    assert all(row.warning is None for row in rows if row.model == "dense")
    return {(row.dtype, row.batch): row.warning for row in rows if row.model == "small"}


def test_a_plain_gain_needs_no_warning():
    assert warnings(pair(1, 10, 5), pair(64, 640, 320)) == {("float32", 1): None, ("float32", 64): None}


def test_a_batch_too_small_to_show_the_gain_is_named_with_how_much_is_overhead():
    found = warnings(pair(1, 10, 9), pair(64, 160, 80))
    assert found["float32", 64] is None
    assert found["float32", 1] == (
        "1.11 times as fast, 2.00 at batch 64: the batch is too small, dense does 4.0 times as many images a second "
        "at batch 64, so that about 75 % of its time here is overhead that pruning does not shorten"
    )
    # Half of the gain or more is there; or there is no overhead, whatever else it is.
    assert warnings(pair(1, 10, 6.6), pair(64, 160, 80))["float32", 1] is None
    assert warnings(pair(1, 10, 9), pair(64, 640, 320))["float32", 1] is None


def test_a_pruned_model_that_is_not_faster_is_named_with_the_reasons_that_are_known():
    found = warnings(pair(1, 10, 10), pair(1, 10, 12, "bfloat16"), pair(64, 160, 80))
    assert found["float32", 1].startswith("not faster than dense: the batch is too small, dense does 4.0 times")
    assert found["bfloat16", 1] == (
        "not faster than dense: 1 of 2 head dims (5) are no multiples of 8, as bfloat16 kernels want them; "
        "bfloat16 is no faster than float32 on this machine, for dense neither (10.00 and 10.00 ms)"
    )


def test_a_batch_is_not_called_too_small_for_what_smaller_ones_do():
    found = warnings(pair(1, 1, 0.5), pair(64, 640, 640))
    assert found == {
        ("float32", 1): None,
        ("float32", 64): "not faster than dense: no reason known from what was measured",
    }


def test_a_gain_within_the_scatter_is_no_clear_one():
    rows = pair(64, 100, 90, spread=30)
    rows[1] = replace(rows[1], speedup_low=0.9)
    assert warnings(rows)["float32", 64] == (
        "not clearly faster than dense: times scatter by 33 %, measure for longer or on a quiet machine"
    )
    assert warnings(pair(64, 90, 90))["float32", 64] == "not faster than dense: no reason known from what was measured"


def test_a_model_as_large_as_the_first_is_told_so():
    found = warnings(pair(1, 10, 10), pair(64, 160, 160), small=replace(SMALL, macs=1000))
    assert set(found.values()) == {"not faster than dense: it has no fewer multiply-accumulates (1,000 and 1,000)"}


def test_rows_that_were_refused_are_not_judged():
    lost = [Row(name, "eager", "float32", 1, refused="why") for name in ("dense", "small")]
    rows = pair(1, 10, 20, "bfloat16")
    assert set(warnings(lost)) == {("float32", 1)}
    assert warnings(lost)["float32", 1] is None
    assert warnings([rows[0]], [replace(lost[1], dtype="bfloat16")])["bfloat16", 1] is None


# Accuracies.


def test_accuracy_is_read_from_the_run_that_made_the_folder(folders, tmp_path, make_model):
    assert recorded_accuracy(Path(folders[1])) == {"validation": 0.7, "test": 0.6}
    assert recorded_accuracy(tmp_path / "model") == {}
    model = tmp_path / "model"
    upop.save_pretrained(make_model(seed=1), model)
    upop.save_pretrained(make_model(seed=2), tmp_path / "dense")
    write_result(model)
    assert recorded_accuracy(model) == {"validation": 0.7, "test": 0.6}
    assert recorded_accuracy(tmp_path / "dense") == {"validation": 0.9, "test": 0.8}
    assert recorded_accuracy(tmp_path / "slim") == {}
    write_result(model, weights="another's")
    assert recorded_accuracy(model) == {}
    (tmp_path / "result.json").write_text("[]")
    assert recorded_accuracy(model) == {}


def test_names_are_short_and_never_alike(tmp_path):
    assert short_names(["runs/half/model", "runs/half/dense", "facebook/deit"]) == ["half", "dense", "deit"]
    assert short_names(["a/half/model", "b/half/model", "c"]) == ["a/half/model", "b/half/model", "c"]
    assert short_names(["half", "half", "half"]) == ["half", "half (2)", "half (3)"]


# The picture and the command line.


def bench_of(rows: list[Row], **accuracies: dict[str, float]) -> dict:
    models = tuple(replace(m, accuracy=accuracies.get(m.name, {})) for m in (DENSE, SMALL))
    facts = {"device": "cpu", "threads": 1, "hardware": {"device": "a CPU"}}
    return Bench("complete", facts, models, tuple(rows)).to_dict()


def test_the_picture_shows_a_point_per_model_at_the_batch_that_is_asked_for(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    points: list[tuple[float, float]] = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda *a, **k: points.append(a[1:3]) or errorbar(*a, **k))
    rows = pair(1, 10, 9) + pair(64, 160, 80) + pair(64, 120, 70, "bfloat16")
    values = bench_of(rows, dense={"validation": 0.9, "test": 0.8}, small={"validation": 0.7, "test": 0.6})
    accuracy_over_time(values, tmp_path / "all.png")
    assert points == [(160, 80), (80, 60), (120, 80), (70, 60)]
    points.clear()
    accuracy_over_time(values, tmp_path / "one.png", runtime="eager", dtype="float32", batch=1)
    assert points == [(10, 80), (9, 60)]
    with Image.open(tmp_path / "all.png") as all_panels, Image.open(tmp_path / "one.png") as one:
        assert len(all_panels.convert("RGB").getcolors(1 << 20)) > 10, "an empty picture has one colour"
        assert all_panels.width > one.width
    points.clear()
    accuracy_over_time(bench_of(rows, small={"validation": 0.7}), tmp_path / "validation.png", batch=64)
    assert points == [(80, 70), (70, 70)]
    with pytest.raises(UpopError, match=r"x\.png: nothing to draw, no model of a known accuracy was measured in onnx"):
        accuracy_over_time(values, tmp_path / "x.png", runtime="onnx")
    with pytest.raises(UpopError, match="nothing to draw, no model of a known accuracy was measured in any way"):
        accuracy_over_time(bench_of(rows), tmp_path / "x.png")


def test_the_command_prints_cells_reasons_and_warnings_and_writes_both_files(folders, calls, tmp_path, capsys):
    out = tmp_path / "bench"
    cli_bench.bench(*folders[:1], folders[1:], batches="1, 2", seconds="0", device="cpu", threads="1", folder=out)
    text = capsys.readouterr().out
    assert "cell 1/12: eager float32 batch 1" in text
    assert "cell 12/12: onnx bfloat16 batch 2: ms refused, refused" in text
    assert "not measured: onnx bfloat16 batch 1, 2: runtime onnx: expected dtype float32" in text
    assert "validation 70.00 %, test 60.00 %" in text
    assert "energy: " in text
    assert f"in {out}: bench.json bench.png" in text
    assert json.loads((out / "bench.json").read_text())["status"] == "complete"
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_where_no_accuracy_is_known_and_draws_nothing(tmp_path, calls, make_model, capsys):
    upop.save_pretrained(make_model(), tmp_path / "mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bench.png").write_text("of an older benchmark")
    mine, out = str(tmp_path / "mine"), tmp_path / "out"
    options = {"runtimes": "eager", "batches": "1", "seconds": "0", "device": "cpu", "folder": out}
    with pytest.raises(UpopError, match="already holds a bench; choose another folder, or say --overwrite"):
        cli_bench.bench(mine, [mine], **options)
    (out / "bench.json").write_text("an older benchmark")
    with pytest.raises(UpopError, match="already holds a bench; choose another folder, or say --overwrite"):
        cli_bench.bench(mine, [mine], **options)
    assert (out / "bench.json").read_text() == "an older benchmark"
    assert (out / "bench.png").exists()
    cli_bench.bench(mine, [mine], **options, overwrite=True)
    text = capsys.readouterr().out
    assert "no accuracy is known for mine, mine (2)" in text
    assert not (out / "bench.png").exists()


def test_eager_runs_for_real_in_both_dtypes(folders):
    found = run_bench(folders, Grid(runtimes=["eager"], batches=[2], seconds=0, device="cpu"))
    assert all(row.refused is None and row.median_ms > 0 for row in found.rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_measures_memory_and_waits_for_its_work(folders):
    found = run_bench(folders, Grid(runtimes=["eager"], batches=[1, 64], seconds=0, device="cuda"))
    assert all(row.refused is None and row.memory_mib > 0 for row in found.rows)
    assert found.facts["device"] == "cuda"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"runtimes": ["onx"]}, "runtimes: expected one of eager, compile, onnx, got 'onx'; did you mean 'onnx'?"),
        ({"runtimes": []}, "runtimes: expected one or more of eager, compile, onnx, got none"),
        ({"dtypes": ["fp16"]}, "dtypes: expected one of float32, bfloat16, got 'fp16'"),
        ({"batches": [1, 0]}, "batches: expected numbers of images from 1, got 0"),
        ({"seconds": float("nan")}, "seconds: expected a number from 0, got nan"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"device": "tpu"}, "device: expected one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(UpopError) as error:
        Grid(**wrong)
    assert str(error.value).startswith(message)


def test_what_is_no_model_or_no_pair_is_refused(folders, tmp_path, make_model):
    grid = Grid(device="cpu")
    with pytest.raises(UpopError, match="bench: expected two or more models to compare, got 1"):
        run_bench(folders[:1], grid)
    with pytest.raises(UpopError, match=r"expected a model folder with config\.json"):
        run_bench([folders[0], str(tmp_path)], grid)
    upop.save_pretrained(make_model(image=48), tmp_path / "large")
    with pytest.raises(
        UpopError, match=r"large: expected images of 32 pixels like .*model, got 48; compare models that"
    ):
        run_bench([folders[0], str(tmp_path / "large")], grid)


def test_the_command_refuses_bad_lists_and_folders_that_hold_something_else(folders, tmp_path):
    wrong = {
        "batches": ("1,x", "", "-1", "1.5"),
        "threads": ("two", "1,8"),
        "seconds": ("x",),
    }
    for option, text in ((option, text) for option, texts in wrong.items() for text in texts):
        with pytest.raises(UpopError, match=rf"--{option}: expected .*, got '.*'"):
            cli_bench.bench(folders[0], folders[1:], **{option: text}, folder=tmp_path)
    for holds in ("config.json", ".upop-run"):
        folder = tmp_path / holds.strip(".")
        folder.mkdir()
        (folder / holds).touch()
        with pytest.raises(UpopError, match="holds a run or a model; choose another folder"):
            cli_bench.bench(folders[0], folders[1:], folder=folder)
    (tmp_path / "file").touch()
    with pytest.raises(UpopError, match="expected a folder, found a file"):
        cli_bench.bench(folders[0], folders[1:], folder=tmp_path / "file")


# Memory and energy.


def test_peak_memory_counts_what_lives_at_the_same_time(capfd):
    one = torch.zeros(256, 1024)  # 1 MiB

    def three_at_once() -> torch.Tensor:
        return (one + 1) + (one * 2)

    def two_at_once() -> torch.Tensor:
        return ((one + 1) * 2) - 3

    assert peak_mib(three_at_once, CPU) == pytest.approx(3, abs=0.01)
    assert peak_mib(two_at_once, CPU) == pytest.approx(2, abs=0.01)
    assert "profiler" not in capfd.readouterr().err


def zone(root: Path, number: int, name: str, energy: int, most: int = 1000) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")
    return folder


def test_energy_is_that_of_the_packages_also_where_a_counter_starts_again(tmp_path):
    first, second = zone(tmp_path, 0, "package-0", 100), zone(tmp_path, 1, "package-1", 900)
    board = zone(tmp_path, 2, "psys", 5)
    meter = find_meter(CPU, powercap=tmp_path)

    def work() -> None:
        (first / "energy_uj").write_text("400\n")
        (second / "energy_uj").write_text("200\n")
        (board / "energy_uj").write_text("900\n")

    assert meter.joules(work) == pytest.approx((300 + 300) / 1e6)
    assert "RAPL" in meter.about


def test_energy_is_none_with_a_reason_where_the_machine_does_not_tell(tmp_path):
    called: list[int] = []
    meter = find_meter(CPU, powercap=tmp_path)
    assert meter.joules(lambda: called.append(1)) is None
    assert called == [], "no time is spent on what is not measured"
    assert meter.about == f"not measured: no RAPL energy counters under {tmp_path}"
    (zone(tmp_path, 0, "package-0", 1) / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0/energy_uj").mkdir()
    assert "energy_uj cannot be read" in find_meter(CPU, powercap=tmp_path).about


def test_a_counter_that_fails_meanwhile_costs_no_time_that_was_measured(calls):
    class Meter:
        about = "a test"

        def joules(self, work):
            raise OSError("the counter is gone")

    models = {"a": torch.nn.Linear(1, 1)}
    [row] = measure_cell(models, Cell("eager", "float32", 3), image_size=8, seconds=0, device=CPU, meter=Meter())
    assert row.median_ms > 0
    assert (row.joules_per_image, row.refused) == (None, None)


def test_energy_per_image_is_that_of_the_model_alone(calls):
    class Meter:
        about = "a test"

        def joules(self, work):
            calls.clear()
            work()
            assert len(set(calls)) == 1
            return 6.0 * len(calls)

    models = {"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(2, 1)}
    chosen = Cell("eager", "float32", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchrun, "time_in_turns", lambda passes, **_: {n: Times((500.0, 500.0)) for n in passes})
        rows = measure_cell(models, chosen, image_size=8, seconds=0, device=CPU, meter=Meter())
    assert [row.joules_per_image for row in rows] == [2, 2]
    assert len(calls) == benchrun.ENERGY_SECONDS / 0.5


def test_nvml_is_asked_by_the_gpus_uuid_and_its_absence_is_said(monkeypatch):
    class Library:
        class NVMLError(Exception): ...

        energy = 1000

        def nvmlInit(self): ...  # noqa: N802

        def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
            assert uuid == "GPU-abc"
            return "handle"

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
            return self.energy

    gpu, library = torch.device("cuda"), Library()
    properties = type("Properties", (), {"uuid": "abc"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(meters.importlib, "import_module", lambda _: library)
    meter = find_meter(gpu)
    assert meter.joules(lambda: setattr(library, "energy", 3500)) == 2.5
    monkeypatch.setattr(meters.importlib, "import_module", lambda name: __import__("no_such_module_" + name))
    assert find_meter(gpu).joules(lambda: None) is None
    assert "pip install nvidia-ml-py" in find_meter(gpu).about
