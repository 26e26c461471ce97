"""Everything of upop that reads what others may have written: a valid example each, and the command that reads it."""

import functools
import hashlib
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Build = Callable[[Path], None]


@dataclass(frozen=True)
class Reader:
    """`build` fills the folder `in`; `read` is a command line, or a function that may raise UpopError only.

    Paths are relative to the folder that holds `in` and `out`. `files` are globs of what gets mutated.
    """

    build: Build
    read: tuple[str, ...] | Callable[[], object]
    files: tuple[str, ...]
    mend: Callable[[], object] | None = None  # after a mutation: makes sums right again, so that it gets further in
    weight: int = 1


def _model(folder: Path, **config: Any) -> Any:
    """A classifier of images of 8 x 8 pixels, of a few hundred weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    settings = {**shape, "image_size": 8, "patch_size": 4, "id2label": {0: "ant", 1: "bee"}, **config}
    model = ViTForImageClassification(ViTConfig(**settings)).eval()
    model.save_pretrained(folder)
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model


def build_model(folder: Path) -> None:
    _model(folder / "model")


def build_sharded_model(folder: Path) -> None:
    model = _model(folder / "model")
    (folder / "model/model.safetensors").unlink()
    model.save_pretrained(folder / "model", max_shard_size="4KB")


def build_slim_model(folder: Path) -> None:
    import torch

    import upop
    from upop.families import find_structures

    model = _model(folder / "model")
    keep = {s.name: torch.arange(s.units) % 3 > 0 for s in find_structures(model)}
    shutil.rmtree(folder / "model")
    upop.save_pretrained(upop.slim(model, keep), folder / "model")


def _images(seed: int, count: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def _encoded(image: np.ndarray[Any, Any], kind: str) -> bytes:
    from PIL import Image

    made = io.BytesIO()
    Image.fromarray(image).save(made, kind)
    return made.getvalue()


def build_images(folder: Path) -> None:
    build_model(folder)
    kinds = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "tif": "TIFF", "bmp": "BMP", "webp": "WEBP", "ppm": "PPM"}
    for seed, name in enumerate(("ant", "bee")):
        (folder / "images" / name).mkdir(parents=True)
        for number, (image, (end, kind)) in enumerate(
            zip(_images(seed), [*kinds.items(), ("png", "PNG")], strict=True)
        ):
            (folder / f"images/{name}/{number}.{end}").write_bytes(_encoded(image, kind))


def build_cached_images(folder: Path) -> None:
    from upop.data import load_data

    build_images(folder)
    load_data(str(folder / "images"), image_size=8)


def build_parquet(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    build_model(folder)
    (folder / "data").mkdir()
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for seed, split in enumerate(("train", "test")):
        cells = [{"bytes": _encoded(image, "PNG"), "path": f"{n}.png"} for n, image in enumerate(_images(seed, 12))]
        column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({"image": column, "label": [0, 1] * 6}).replace_schema_metadata(metadata)
        write_table(table, folder / f"data/{split}-00000-of-00001.parquet", row_group_size=5)


def build_pickles(folder: Path) -> None:
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    _model(folder / "model", image_size=32, patch_size=16)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
        (place / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [0, 1] * 3}, protocol=2))
    (place / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"ant", b"bee"]}, protocol=2))


def build_results(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
    import fake_results as fake

    made = {"dense": fake.dense(), "c": fake.continued(0), "open": fake.open_ended(0, tolerance=0.02)}
    for method in ("upop", "magnitude"):
        made |= {f"{method}-{seed}": fake.result(method=method, seed=seed, target="prunable=0.8") for seed in range(2)}
    states: dict[str, Any] = {label: {"state": "done"} for label in made}
    states["lost"] = {"state": "failed", "error": "the loss is not finite"}
    fake.write(folder / "results", made, {"runs": states, "dense": "dense", "about": "an invented study"})


def build_trace(folder: Path) -> None:
    from upop.trace import Trace

    (folder / "run").mkdir()
    masks = np.linspace(255, 0, 6 * 24).reshape(6, 24).astype(np.uint8)
    units = np.array([8, 16], dtype=np.int32)
    kinds, layers = np.array(["attn", "mlp"]), np.zeros(2, dtype=np.int32)
    steps, ratio = np.arange(6, dtype=np.int32), np.linspace(0, 0.5, 6, dtype=np.float32)
    Trace(steps, ratio, masks, kinds, layers, units).save(folder / "run/trace.npz")
    config = {"model": "a/b", "target": "params=0.5", "method": "upop"}
    (folder / "run/result.json").write_text(json.dumps({"config": config}))


def build_config(folder: Path) -> None:
    (folder / "run.toml").write_text(
        'model = "deit-digits"\ndata = "digits"\ntarget = "params=0.5"\nepochs_dense = 1\nepochs_search = 1.5\n'
        'epochs_retrain = 1\nstages = "dense,search,retrain"\nstructures = "attn,mlp"\nflip = false\nseed = 0\n'
        'align = "attn=2"\nout = "out/run"\nsubset = 100\nlr = 0.001\nthreads = 1\nbatch_size = 50\n'
    )


def build_study(folder: Path) -> None:
    (folder / "few.toml").write_text(
        'about = "two methods"\nhardware = "any"\ncommand = "upop study few"\nseeds = [0, 1]\n'
        '[dense]\nmodel = "deit-digits"\nepochs_dense = 1\n[base]\ndata = "digits"\nepochs_search = 1\n'
        '[[grid]]\nmethod = ["upop", "magnitude"]\ntarget = ["params=0.5", "params=0.3"]\n'
    )


def build_checkpoint(folder: Path) -> None:
    """A run that was stopped in the middle of its search."""
    from upop.config import make_config
    from upop.run import prune

    class Stop:
        def stage(self, name: str, about: str) -> None: ...

        def progress(self, progress: Any) -> None:
            if "ratio" in progress.extra and progress.step == 2:
                raise KeyboardInterrupt

        def epoch(self, number: int, accuracy: float) -> None: ...

    options = {"model": "deit-digits", "data": "digits", "subset": 40, "batch_size": 20, "epochs_dense": 1}
    options |= {"epochs_search": 2, "epochs_retrain": 1, "latency_seconds": 0.01, "checkpoint_minutes": 1e-9}
    config = make_config({**options, "threads": 1, "out": str(folder / "run")})
    try:
        prune(config, observer=Stop())
    except KeyboardInterrupt:
        older, _ = sorted((folder / "run/checkpoints").iterdir())
        shutil.rmtree(older)  # which would be taken in place of a damaged one
        return
    raise AssertionError("the run was to be stopped")


class Enough(Exception):  # noqa: N818
    """The run goes on: there is nothing more to read."""


def read_checkpoint() -> None:
    from upop.run import resume

    class GoesOn:
        def stage(self, name: str, about: str) -> None: ...

        def progress(self, progress: Any) -> None:
            raise Enough

        def epoch(self, number: int, accuracy: float) -> None: ...

    shutil.copytree("in/run", "out/run", symlinks=True, ignore=_no_pipes)
    try:
        resume(Path("out/run"), observer=GoesOn())
    except Enough:
        pass
    finally:
        shutil.rmtree("out/run")


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    """What cannot be copied, or would fill the disk: then it is missing."""
    paths = {name: Path(folder, name) for name in names}
    return [n for n, p in paths.items() if not p.is_dir() and not (p.is_file() and p.stat().st_size < 2**24)]


def seal_again() -> None:
    """Give checkpoints that were changed the digests of what they are now, as an enemy would."""
    for seal in Path("in/run/checkpoints").glob("*/seal.json"):
        files = [seal.parent / name for name in ("state.json", "tensors.safetensors")]
        if all(file.is_file() and not file.is_symlink() and file.stat().st_size < 2**24 for file in files):
            found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
            seal.unlink(missing_ok=True)
            seal.write_text(json.dumps(found))


def build_trainer_state(folder: Path) -> None:
    import torch

    from upop.callback import save_state

    save_state({"search": {"step": 3, "masks": {"a": torch.ones(4)}}, "ratio": 0.5}, folder)


def read_trainer_state() -> None:
    from upop.callback import load_state

    load_state(Path("in"))


def build_records(folder: Path) -> None:
    from upop.folder import weights_hash

    build_model(folder)
    accuracy = {"dense": {"validation": 0.5, "test": 0.5}, "retrain": {"validation": 0.5, "test": 0.5}}
    result = {"accuracy": accuracy, "loss": accuracy, "data": {"name": "x"}, "weights": weights_hash(folder / "model")}
    (folder / "result.json").write_text(json.dumps(result))


def read_records() -> None:
    from upop.bench import recorded_accuracy
    from upop.folder import recorded

    for found in (recorded_accuracy(Path("in/model")), *recorded(Path("in/model"), {"name": "x"}).values()):
        assert all(isinstance(value, float) for value in found.values())


def build_bench(folder: Path) -> None:
    from upop.bench import Bench, Row, Subject

    models = tuple(Subject(name, name, None, 9, 9, {"attn": [4, 4]}, {"test": 0.5}) for name in ("a", "b"))
    rows = tuple(Row(name, "eager", "float32", 1, median_ms=1.0, spread_ms=0.1, runs=3) for name in ("a", "b"))
    bench = Bench("complete", {"command": "upop bench a b"}, models, rows)
    (folder / "bench.json").write_text(json.dumps(bench.to_dict()))


def read_bench() -> None:
    from upop.bench import Bench
    from upop.reading import read_json

    Bench.from_dict(read_json(Path("in/bench.json")))


def build_latency_table(folder: Path) -> None:
    points = {kind: [[0.25, 1.0], [0.5, 1.5], [0.75, 1.8]] for kind in ("attn", "mlp")}
    widths = {f"layers.{n}.{kind}": 4 for n in range(2) for kind in ("attn", "mlp")}
    (folder / "table.json").write_text(json.dumps({"dense_ms": 2.0, "points": points, "widths": widths}))


def read_latency_table() -> None:
    from upop.latency import LatencyTable
    from upop.reading import read_json

    LatencyTable.from_dict(read_json(Path("in/table.json")))


def build_study_folder(folder: Path) -> None:
    (folder / "few.toml").write_text(
        '[base]\nmodel = "deit-digits"\ndata = "digits"\nepochs_search = 1\n[[grid]]\nmethod = ["upop"]\n'
    )
    standing = _standing()
    (run,) = standing.study.runs
    from upop.config import given_values
    from upop.run import SCHEMA

    standing.folder(run).mkdir(parents=True)
    values = {"schema": SCHEMA, "status": "complete", "given": given_values(run.config), "start": None, "data": {}}
    (standing.folder(run) / "result.json").write_text(json.dumps(values))
    standing.failure_file(run).parent.mkdir()
    standing.failure_file(run).write_text(json.dumps({"given": given_values(run.config), "error": "no"}))


def read_study_folder() -> None:
    """A broken result is one that does not count, a broken record of a failure none."""
    from upop.study import write_manifest

    standing = _standing()
    (run,) = standing.study.runs
    standing.result(run)
    standing.failure(run)
    standing.out = Path("out")
    write_manifest(standing)


def _standing() -> Any:
    from upop.study import Standing
    from upop.studyfile import load_study

    # The data's digest is one that a study computes itself.
    return Standing(load_study(Path("in/few.toml"), Path("in/runs")), Path("in/runs"), "0123", any_code=True)


EVAL = ("eval", "in/model", "--batch-size", "4", "--device", "cpu", "--data")
READERS: dict[str, Reader] = {
    "model": Reader(build_model, ("analyze", "in/model"), ("model/*",), weight=4),
    "slim model": Reader(build_slim_model, ("analyze", "in/model"), ("model/*",), weight=3),
    "sharded model": Reader(build_sharded_model, ("analyze", "in/model"), ("model/*",)),
    "images": Reader(build_images, (*EVAL, "in/images"), ("images/*/*",), weight=4),
    "cached images": Reader(build_cached_images, (*EVAL, "in/images"), ("cache/upop/*",)),
    "parquet": Reader(build_parquet, (*EVAL, "in/data"), ("data/*",), weight=3),
    "pickles": Reader(build_pickles, (*EVAL, "in/cifar-10-batches-py"), ("cifar-10-batches-py/*",), weight=2),
    "results": Reader(
        build_results, ("report", "in/results", "--out", "out/report"), ("results/**/*.json",), weight=4
    ),
    "collected": Reader(
        build_results, ("report", "in/results", "--out", "out/all", "--collect"), ("results/**/*.json",)
    ),
    "trace": Reader(build_trace, ("animate", "in/run", "--out", "out/search.html"), ("run/*",), weight=2),
    "config": Reader(build_config, ("prune", "--config", "in/run.toml", "--dry-run"), ("run.toml",), weight=2),
    "study": Reader(build_study, ("study", "in/few.toml", "--out", "out/few", "--dry-run"), ("few.toml",), weight=2),
    "study folder": Reader(build_study_folder, read_study_folder, ("runs/**/*.json",)),
    "checkpoint": Reader(
        build_checkpoint, read_checkpoint, ("run/checkpoints/*/*", "run/dense/*"), seal_again, weight=2
    ),
    "trainer state": Reader(build_trainer_state, read_trainer_state, ("*",)),
    "records": Reader(build_records, read_records, ("result.json",)),
    "bench": Reader(build_bench, read_bench, ("bench.json",)),
    "latency table": Reader(build_latency_table, read_latency_table, ("table.json",)),
}


@functools.cache
def quiet() -> None:
    """What the command line does once before it reads: here before, so that every reading is spared it."""
    from upop.cli.show import quiet_libraries

    quiet_libraries()
