"""Data sets in tables: parquet files in the Hub's layout, and data sets of the Hub itself.
Must not read images, nor import `datasets` or pyarrow before they are needed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upop.data.items import Ints
from upop.data.listing import Listing, by_split, key_of, split_of
from upop.data.rows import HubItems, ParquetItems, reading_parquet
from upop.errors import DataError, one_line
from upop.hub import reason
from upop.reading import check_file, parse_json, size

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
MOST_ROWS = 2**27  # of a file
MOST_GROUP = 2 * 2**30  # bytes of a row group, which is read as a whole
SHARD = re.compile(r"([^-]+?)(?:-(\d+)-of-(\d+)(?:-.*)?|-.*)?\.parquet")


def parquet_names(folder: Path) -> list[str]:
    """All parquet files below a folder, relative to it, hidden folders left out."""
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in files if name.endswith(".parquet")]
    return sorted(Path(file).relative_to(folder).as_posix() for file in found)


def parquet_folder(folder: Path) -> Listing:
    """A folder with `train-*.parquet` and, if there, `validation-*` and `test-*`, as the Hub stores them."""
    shards = _shards(folder, parquet_names(folder))
    names = [name for part in shards.values() for name in part]
    schemas = [_schema(folder / name) for name in names]
    features = _features(schemas[0])
    image, label = _columns(schemas[0].names, features, str(folder / names[0]))
    for name, schema in zip(names, schemas, strict=True):
        if not {image, label} <= set(schema.names):
            raise DataError(
                f"{folder / name}: expected columns {image!r} and {label!r} as in {names[0]}, "
                f"got {', '.join(schema.names)}; give all files the same columns"
            )
        _check_image_type(schema.field(image).type, image, folder / name)
    columns = _known({split: _read(folder, part, label) for split, part in shards.items()}, str(folder))
    names = [name for split in columns for name in shards[split]]
    items = ParquetItems(folder, names, image)
    classes, labels, parts = _labels(columns, _names(features[label]), str(folder))
    return Listing(folder.resolve().name, classes, items, labels, parts, key=key_of(folder, items.files()))


def hub_dataset(name: str) -> Listing:
    """A data set of the Hub, downloaded by the `datasets` library or taken from its cache."""
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, access, unknown name, broken files: each has an exception of its own
        raise DataError(f"could not load {name} from the Hub: {reason(error)}") from error
    tables = {split: loaded[called] for split, called in by_split(loaded, name).items()}
    if "train" not in tables:
        raise DataError(f"{name}: expected a split 'train', got {', '.join(loaded)}; choose another data set")
    # One of them may be the test; where that is known, others do no harm.
    if "test" not in tables and (others := [called for called in loaded if split_of(called) is None]):
        raise DataError(
            f"{name}: expected splits called train, validation and test, got {', '.join(others)}; "
            "download it and name its files so"
        )
    features = _by_column(tables["train"].features.to_dict())
    image, label = _columns(tables["train"].column_names, features, name)
    if (kind := features[image].get("_type")) != "Image":
        raise DataError(
            f"{name}: expected images in column {image!r}, got {kind or 'a list'}; choose another data set"
        )
    columns = _known({split: table.data.column(label) for split, table in tables.items()}, name)
    classes, labels, parts = _labels(columns, _names(features[label]), name)
    plain = {split: tables[split].cast_column(image, datasets.Image(decode=False)) for split in columns}
    files = [entry["filename"] for table in plain.values() for entry in table.cache_files]
    key = key_of(Path("/"), files) if files else None
    return Listing(name, classes, HubItems(name, plain, image), labels, parts, key=key)


def _shards(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Files of each split, train first; incomplete or ambiguous sets are errors."""
    matches = {
        name: match for name in names if (match := SHARD.fullmatch(name.rsplit("/")[-1])) and split_of(match[1])
    }
    called = by_split((match[1] for match in matches.values()), str(folder))
    if "train" not in called:
        raise DataError(
            f"{folder}: expected parquet files named train-*.parquet, got {', '.join(names[:3])}; rename them"
        )
    if len(folders := sorted({name.rpartition("/")[0] for name in matches})) > 1:
        raise DataError(f"{folder}: several data sets in it: {', '.join(folders[:5])}; name the folder of one")
    if others := [name for name in names if name not in matches]:
        raise DataError(
            f"{folder}: expected parquet files named train, validation or test alone, got {others[0]} besides; "
            "rename it or take it out"
        )
    order = ["train", *(split for split in called if split != "train")]
    shards = {split: [name for name in names if matches[name][1] == called[split]] for split in order}
    for split, part in shards.items():
        totals = {int(matches[name][3]) for name in part if matches[name][3]}
        numbers = {int(matches[name][2]) for name in part if matches[name][3]}
        if totals and len(numbers) < max(totals):
            raise DataError(
                f"{folder}: expected all {max(totals)} parquet files of {split}, got {len(numbers)}; "
                "complete the download"
            )
        if totals and totals != {len(part)}:
            raise DataError(
                f"{folder}: expected {max(totals)} parquet files of {split}, got {len(part)} of several uploads; "
                "remove the others"
            )
    return shards


def _schema(file: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    with reading_parquet(file):
        check_file(file)
        with ParquetFile(file) as opened:
            _check_sizes(opened.metadata, file)
            return opened.schema_arrow


def _check_sizes(metadata: Any, file: Path) -> None:
    """Raise DataError for what would not fit in memory, as far as the file tells."""
    groups = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    if metadata.num_rows > MOST_ROWS or max(groups, default=0) > MOST_GROUP:
        raise DataError(
            f"{file}: expected at most {MOST_ROWS:,} rows and row groups of {size(MOST_GROUP)}, got "
            f"{metadata.num_rows:,} and {size(max(groups, default=0))}; write it again with smaller row groups"
        )


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the Hub's metadata, if there are any, declare of each column."""
    try:
        text = schema.metadata[b"huggingface"].decode("utf-8")
        declared = {str(name): kind for name, kind in parse_json(text)["info"]["features"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        declared = {}
    return _by_column({name: declared.get(name) for name in schema.names})


def _by_column(declared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: feature if isinstance(feature, dict) else {} for name, feature in declared.items()}


def _names(feature: Mapping[str, Any]) -> list[str] | None:
    """The classes' names, where the metadata declare any: texts, no two alike."""
    names = feature.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return names if len(set(names)) == len(names) else None


def _read(folder: Path, names: Sequence[str], column: str) -> Any:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    pieces = []
    for name in names:
        with reading_parquet(folder / name):
            pieces.append(ParquetFile(folder / name).read(columns=[column]).column(0))
            if pieces[-1].type != pieces[0].type:
                raise DataError(
                    f"{folder / name}: expected labels of type {pieces[0].type} as in {names[0]}, got "
                    f"{pieces[-1].type}; give all files the same columns"
                )
    return pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], type=pieces[0].type)


def _columns(names: Sequence[str], features: Mapping[str, Mapping[str, Any]], where: str) -> tuple[str, str]:
    """Names of the image and the label column: the usual ones, else the only one of that declared type."""
    chosen = []
    for usual, kind in ((IMAGE_COLUMNS, "Image"), (LABEL_COLUMNS, "ClassLabel")):
        declared = [name for name in names if features[name].get("_type") == kind]
        found = [name for name in usual if name in names] or (declared if len(declared) == 1 else [])
        if not found:
            raise DataError(
                f"{where}: expected a column {' or '.join(map(repr, usual))}, "
                f"got {', '.join(names) or 'no columns'}; rename the column"
            )
        chosen.append(found[0])
    return chosen[0], chosen[1]


def _check_image_type(kind: Any, column: str, file: Path) -> None:
    import pyarrow as pa

    bytes_type = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(bytes_type) or pa.types.is_large_binary(bytes_type)):
        raise DataError(
            f"{file}: expected encoded images (bytes, or a struct of bytes and path) in column {column!r}, "
            f"got {kind}; convert the column"
        )


def _known(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Label columns, all of int64 or all of strings, without those of secret labels, which are of no use here.

    Labels are secret where all are -1, as in ImageNet's test split, or empty.
    """
    import pyarrow.compute as pc

    known: dict[str, Any] = {}
    for split, column in columns.items():
        if not len(column):
            raise DataError(f"{where}: expected images in {split}, got none; add images or remove the empty split")
        empty = column.null_count
        if empty and (split == "train" or empty < len(column)):
            raise DataError(f"{where}: expected a label for every image, got {empty} empty in {split}")
        plain = None if empty else _plain_labels(column, where)
        if plain is not None and (split == "train" or pc.unique(plain).to_pylist() != [-1]):
            known[split] = plain
    for split, column in known.items():
        if column.type != known["train"].type:
            raise DataError(
                f"{where}: expected labels of one type, got {known['train'].type} in train and {column.type} in "
                f"{split}; convert the column"
            )
    return known


def _plain_labels(column: Any, where: str) -> Any:
    """A column of any type of integers or strings as int64 or string; raises DataError for other types."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_integer(kind)):
        raise DataError(f"{where}: expected labels as integers or strings, got {column.type}; convert the column")
    try:
        return column.cast(kind).cast(pa.string() if text else pa.int64())
    except pa.ArrowException as error:  # integers beyond int64
        raise DataError(f"{where}: labels cannot be used: {one_line(error)}; convert the column") from error


def _labels(
    columns: Mapping[str, Any], declared: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], Ints, dict[str, Ints]]:
    """Classes, labels [n] of all splits and the positions of each, from one Arrow column per split."""
    values = {split: column.to_numpy() for split, column in columns.items()}
    together = np.concatenate(list(values.values()))
    starts = np.cumsum([0, *(len(part) for part in values.values())])
    parts = {split: np.arange(first, stop) for split, first, stop in zip(values, starts, starts[1:], strict=False)}
    if not declared:
        names = np.unique(together)
        _check_same_values(values, parts, where)
        declared = [str(name) for name in names]
    elif together.dtype.kind == "O":
        names = np.array(declared, dtype=object)
    else:
        names = np.arange(len(declared))
    if len(unknown := np.setdiff1d(together, names)):
        raise DataError(
            f"{where}: expected labels from {names[0]} to {names[-1]} ({len(names)} classes), "
            f"got {unknown[0]}; correct the labels or the class names"
        )
    number = {name: place for place, name in enumerate(names.tolist())}
    labels = np.array([number[value] for value in together.tolist()], dtype=np.int64)
    return tuple(declared), labels, parts


def _check_same_values(values: Mapping[str, Any], parts: Mapping[str, Ints], where: str) -> None:
    """Without declared names, a class is what occurs: then it must occur in every split."""
    for split in parts:
        if odd := sorted(set(values[split].tolist()) ^ set(values["train"].tolist())):
            raise DataError(
                f"{where}: expected the same classes in train and {split}, got {odd[0]!r} in one only; "
                "give both the same classes"
            )
