"""What a benchmark of models side by side found, as plain values, and what a reader must be warned of.

Must not measure, load models or need torch: bench.json can be read and judged anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from upop.errors import UpopError
from upop.folder import weights_hash
from upop.reading import read_json

SCHEMA = 1
HEAD_DIMS = ("attn", "dims", "qk", "v")  # kinds whose widths are head dims
ALIGNED = 8  # elements: what kernels for 16-bit numbers want widths to be multiples of
OVERHEAD = 1.5  # so many times the images a second at a larger batch: a third of the time is overhead
SCATTER = 0.25  # interquartile range over median from which a time is no basis for a verdict


@dataclass(frozen=True)
class Cell:
    """One way of running all models: `runtime`, `dtype` of the weights, `batch` images in a pass."""

    runtime: str
    dtype: str
    batch: int

    def __str__(self) -> str:
        return f"{self.runtime} {self.dtype} batch {self.batch}"


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: short, no two alike; folder: where it came from.
        weights: what tells its weights from all others, see folder.weights_hash; None where there is no file of them.
        params: parameters; macs: multiply-accumulates of one image.
        widths: units per layer and kind (such as `attn`, in head dims, and `mlp`); empty for an unknown family.
        accuracy: in [0, 1] per split, as its run has recorded it; empty where no run stands behind it.
    """

    name: str
    folder: str
    weights: str | None
    params: int
    macs: int
    widths: Mapping[str, Sequence[int]]
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One model in one cell. What could not be measured is None.

    Attributes:
        median_ms, spread_ms: of one pass of the whole batch; the spread is the interquartile range of `runs` passes.
        images_per_s: batch over median.
        speedup: times as fast as the first model, the median over pairs of passes that ran one after the other;
            speedup_low and speedup_high are the quartiles.
        memory_mib: peak MiB of tensors in a pass, weights among them and images not.
        joules_per_image: see `energy` of Bench.facts.
        refused: why it was not measured; warning: what to know before its speedup is believed.
    """

    model: str
    runtime: str
    dtype: str
    batch: int
    median_ms: float | None = None
    spread_ms: float | None = None
    runs: int = 0
    images_per_s: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    memory_mib: float | None = None
    joules_per_image: float | None = None
    refused: str | None = None
    warning: str | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.runtime, self.dtype, self.batch)


@dataclass(frozen=True)
class Bench:
    """All models in all cells.

    Attributes:
        status: `complete`, or `partial` while cells are still to come.
        facts: where the numbers come from: command, versions, hardware, threads, what `memory` and `energy` mean.
        models: the first is what all others are compared with.
    """

    status: str
    facts: Mapping[str, Any]
    models: tuple[Subject, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """For bench.json; `from_dict` is the way back."""
        models, rows = [asdict(model) for model in self.models], [asdict(row) for row in self.rows]
        return {"schema": SCHEMA, "status": self.status, **self.facts, "models": models, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "bench.json") -> Self:
        """Raises UpopError, naming `where`, for what `to_dict` has not made."""
        if values.get("schema") != SCHEMA:
            raise UpopError(f"{where}: expected schema {SCHEMA}, got {values.get('schema')}; run upop bench again")
        facts = {key: value for key, value in values.items() if key not in ("schema", "status", "models", "rows")}
        try:
            models = tuple(Subject(**_known(Subject, model)) for model in values["models"])
            rows = tuple(Row(**_known(Row, row)) for row in values["rows"])
            return cls(status=values["status"], facts=facts, models=models, rows=rows)
        except (KeyError, TypeError, AttributeError) as error:
            raise UpopError(f"{where}: expected what upop bench writes, got {error}; run upop bench again") from error


def _known(kind: type[Subject] | type[Row], values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind)}


def recorded_accuracy(folder: Path) -> dict[str, float]:
    """Accuracy per split that the run which made the model folder has recorded; empty where none did.

    A run's `model` is the one after its last stage; `dense` and `slim` are those of these stages. Numbers of other
    weights than lie in the folder now are not taken.
    """
    file = folder.parent / "result.json"
    try:
        result = read_json(file)
        stage = folder.name if folder.name in ("dense", "slim") else list(result["accuracy"])[-1]
        if folder.name == "model" and result.get("weights"):
            same = result["weights"] == weights_hash(folder)
        else:
            # Only the final model's weights are told by their hash.
            same = (folder / "model.safetensors").stat().st_mtime <= file.stat().st_mtime
        return {split: float(value) for split, value in result["accuracy"][stage].items()} if same else {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}


def judge(rows: Sequence[Row], models: Sequence[Subject]) -> tuple[Row, ...]:
    """`rows` with a warning where a model is not faster than the first, or its batch too small to show its gain."""
    measured = {(row.model, row.cell): row for row in rows if row.median_ms is not None}
    return tuple(replace(row, warning=_warning(row, measured, models)) for row in rows)


Measured = Mapping[tuple[str, Cell], Row]


def _warning(row: Row, measured: Measured, models: Sequence[Subject]) -> str | None:
    first = models[0]
    if row.model == first.name or row.speedup is None or row.speedup_low is None:
        return None
    if row.speedup_low <= 1:
        why = _reasons(row, measured, first, next(model for model in models if model.name == row.model))
        verdict = "not faster" if row.speedup <= 1 else "not clearly faster"
        return f"{verdict} than {first.name}: {'; '.join(why) or 'no reason known from what was measured'}"
    best = _at_best_batch(row.model, row.cell, measured)
    if best is None or best.speedup is None or row.speedup - 1 >= (best.speedup - 1) / 2:
        return None
    if overhead := _overhead(row.cell, measured, first):
        return f"{row.speedup:.2f} times as fast, {best.speedup:.2f} at batch {best.batch}: {overhead}"
    return None


def _reasons(row: Row, measured: Measured, first: Subject, own: Subject) -> list[str]:
    """What, of all that is known to eat up a gain, applies to `row`."""
    if own.macs >= first.macs:
        return [f"it has no fewer multiply-accumulates ({own.macs:,} and {first.macs:,})"]
    found = []
    if overhead := _overhead(row.cell, measured, first):
        found.append(overhead)
    if row.dtype == "bfloat16":
        found += _bfloat16(row.cell, measured, first, own)
    base = measured[first.name, row.cell]
    scatter = max((r.spread_ms or 0.0) / (r.median_ms or 1.0) for r in (row, base))
    if scatter > SCATTER:
        found.append(f"times scatter by {100 * scatter:.0f} %, measure for longer or on a quiet machine")
    return found


def _overhead(cell: Cell, measured: Measured, first: Subject) -> str:
    """Says so where much of the first model's time is what operations cost whatever their size; else nothing."""
    here, best = measured[first.name, cell], _at_best_batch(first.name, cell, measured)
    if best is None or (gain := (best.images_per_s or 0.0) / (here.images_per_s or 1.0)) < OVERHEAD:
        return ""
    return (
        f"the batch is too small, {first.name} does {gain:.1f} times as many images a second at batch {best.batch}, "
        f"so that about {100 * (1 - 1 / gain):.0f} % of its time here is overhead that pruning does not shorten"
    )


def _bfloat16(cell: Cell, measured: Measured, first: Subject, own: Subject) -> list[str]:
    found = []
    dims = [width for kind in HEAD_DIMS for width in own.widths.get(kind, ())]
    odd = [width for width in dims if width % ALIGNED]
    if odd:
        some = ", ".join(str(width) for width in odd[:3])
        found.append(
            f"{len(odd)} of {len(dims)} head dims ({some}{', ..' if len(odd) > 3 else ''}) are no "
            f"multiples of {ALIGNED}, as bfloat16 kernels want them"
        )
    here = measured[first.name, cell].median_ms or 0.0
    single = measured.get((first.name, replace(cell, dtype="float32")))
    if single is not None and here >= (single.median_ms or 0.0):
        found.append(
            f"bfloat16 is no faster than float32 on this machine, for {first.name} neither "
            f"({here:.2f} and {single.median_ms:.2f} ms)"
        )
    return found


def _at_best_batch(model: str, cell: Cell, measured: Measured) -> Row | None:
    """The model's row of most images a second among larger batches of the same runtime and dtype."""
    larger = [r for (m, c), r in measured.items() if m == model and c.batch > cell.batch]
    alike = [r for r in larger if (r.runtime, r.dtype) == (cell.runtime, cell.dtype)]
    return max(alike, key=lambda r: r.images_per_s or 0.0, default=None)
