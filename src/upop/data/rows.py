"""Images in the rows of tables: in order out of parquet files, at random out of memory-mapped ones.
Must not decode images, nor import `datasets` or pyarrow before they are needed.
"""

import bisect
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from upop.data import cache
from upop.data.items import MOST_BYTES, Ints, size_and_time
from upop.errors import DataError, UpopError, one_line
from upop.reading import read_bytes


class ParquetItems:
    """Images in a column of parquet files, read by row groups: quick in order, slow at random."""

    def __init__(self, root: Path, names: Sequence[str], column: str) -> None:
        from pyarrow.parquet import ParquetFile

        self.root, self.column = str(root), column
        self.groups: list[tuple[str, int, int]] = []  # file, row group, rows of the file before it
        self.starts: list[int] = []  # rows of all files before the group
        self.count = 0
        self.naming: list[str] = []  # files with cells that may name an image's file
        for name in names:
            metadata, before = ParquetFile(root / name).metadata, 0
            for group in range(metadata.num_row_groups):
                self.groups.append((name, group, before))
                self.starts.append(self.count + before)
                before += metadata.row_group(group).num_rows
            self.count += before
            if _may_lack_bytes(metadata, column):
                self.naming.append(name)

    def __len__(self) -> int:
        return self.count

    def files(self) -> list[str]:
        """Files below the root whose content this is: the tables, and what cells name where they hold no bytes."""
        from pyarrow.parquet import ParquetFile

        named: list[str] = []
        for name in self.naming:
            with reading_parquet(Path(self.root, name)):
                cells = ParquetFile(Path(self.root, name)).read(columns=[f"{self.column}.path"]).column(0)
                named += filter(None, map(_path, cells.to_pylist()))
        return [*dict.fromkeys(name for name, _, _ in self.groups), *named]

    def name(self, index: int) -> str:
        group = bisect.bisect_right(self.starts, index) - 1
        name, _, before = self.groups[group]
        return f"{name} row {before + index - self.starts[group]}"

    def sizes(self, index: Ints) -> Ints:
        with reading_parquet(Path(self.root)):
            groups = (_row_group(self.root, name, group, self.column) for name, group, _ in self.groups)
            return np.concatenate([_lengths(column, self.root) for column in groups])[index]

    def read(self, index: int) -> bytes:
        group = bisect.bisect_right(self.starts, index) - 1
        name, number, _ = self.groups[group]
        column = _row_group(self.root, name, number, self.column)
        return _encoded(column[index - self.starts[group]].as_py(), self.root)


class MappedItems:
    """The same images, copied to an Arrow file that is mapped into memory: quick at random."""

    def __init__(self, items: ParquetItems, file: Path) -> None:
        self.items, self.file = items, str(file)
        self.root = items.root

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return self.items.name(index)

    def sizes(self, index: Ints) -> Ints:
        return _lengths(_mapped(self.file), self.root)[index]

    def read(self, index: int) -> bytes:
        return _encoded(_mapped(self.file)[index].as_py(), self.root)


class HubItems:
    """Images in a column of the `datasets` library's tables, which are mapped into memory."""

    def __init__(self, root: str, tables: Mapping[str, Any], column: str) -> None:
        self.root, self.column = root, column
        self.splits, self.tables = list(tables), list(tables.values())
        self.starts = np.cumsum([0, *(len(table) for table in self.tables)]).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, index: int) -> str:
        part = bisect.bisect_right(self.starts, index) - 1
        return f"{self.splits[part]} row {index - self.starts[part]}"

    def sizes(self, index: Ints) -> Ints:
        return np.concatenate([_lengths(table.data.column(self.column), "") for table in self.tables])[index]

    def read(self, index: int) -> bytes:
        part = bisect.bisect_right(self.starts, index) - 1
        return _encoded(self.tables[part][index - self.starts[part]][self.column], "")


def for_random_access(items: ParquetItems, key: str) -> ParquetItems | MappedItems:
    """Items that are quick to read at random; the slow ones where the cache folder cannot take a copy."""
    file = cache.folder() / f"{key}.arrow"
    if not _holds(file, len(items)):
        with contextlib.suppress(Exception):  # the cache must never be the cause of an error
            _copy(items, file)
    return MappedItems(items, file) if _holds(file, len(items)) else items


def _holds(file: Path, count: int) -> bool:
    try:
        return len(_mapped(str(file))) == count
    except Exception:  # not there, or broken in one of many ways
        return False


def _copy(items: ParquetItems, file: Path) -> None:
    import pyarrow as pa

    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    os.close(handle)
    try:
        first = _row_group(items.root, *items.groups[0][:2], items.column)
        schema = pa.schema([("image", first.type)])
        with pa.OSFile(partial, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for name, group, _ in items.groups:
                column = _row_group(items.root, name, group, items.column)
                writer.write_table(pa.table([column], schema=schema))
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise
    _mapped.cache_clear()


@lru_cache(maxsize=8)
def _mapped(file: str) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(file)).read_all().column(0)


def free_row_groups() -> None:
    """Let go of what reading in order has left in memory."""
    _row_group.cache_clear()


@lru_cache(maxsize=4)
def _row_group(root: str, name: str, group: int, column: str) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(Path(root, name)).read_row_group(group, columns=[column]).column(0)


def _encoded(cell: Any, root: str) -> bytes:
    """The image of a cell: bytes, or a struct of bytes and, where these are missing, the path of a file."""
    if isinstance(cell, bytes):
        return cell
    if cell is not None and cell["bytes"] is not None:
        return bytes(cell["bytes"])
    if path := _path(cell):
        return read_bytes(_inside(root, path), most=MOST_BYTES)
    raise ValueError("an empty cell")


def _path(cell: Any) -> str | None:
    """The file that a cell names, if it does."""
    path = cell.get("path") if isinstance(cell, dict) else None
    return path if isinstance(path, str) else None


def _inside(root: str, name: str) -> Path:
    """The file that a cell names: below the data set's folder, or in the caches of the Hub's libraries."""
    from datasets import config
    from huggingface_hub import constants

    path = Path(root, name)
    allowed = [root] if root else [config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    # Links inside are the owner's of the folder; a name that climbs out of it is the table's.
    if not any(Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)) for folder in allowed):
        raise ValueError(f"a path that leads out of the data set: {name[:100]}")
    return path


def _may_lack_bytes(metadata: Any, column: str) -> bool:
    """Whether there are cells that name a file in place of their bytes, as far as a parquet file's statistics tell."""
    paths = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    if not {f"{column}.bytes", f"{column}.path"} <= set(paths):
        return False
    place = paths.index(f"{column}.bytes")
    known = [metadata.row_group(group).column(place).statistics for group in range(metadata.num_row_groups)]
    return any(each is None or not each.has_null_count or each.null_count > 0 for each in known)


def _lengths(column: Any, root: str) -> Ints:
    """Encoded bytes of each cell: of the file that it names, where it holds none itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
    lengths = np.array(pc.fill_null(pc.binary_length(encoded), 0), dtype=np.int64)
    for place in np.flatnonzero(pc.is_null(encoded)).tolist() if encoded.null_count else []:
        if path := _path(column[place].as_py()):
            lengths[place] = size_and_time(Path(root, path))[0]
    return lengths


@contextlib.contextmanager
def reading_parquet(file: Path) -> Iterator[None]:
    """Turns what pyarrow says of a broken file into an error that names it."""
    import pyarrow as pa

    try:
        yield
    except UpopError:
        raise
    # Names in a damaged file need not be text.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: expected a parquet file, got {one_line(error)}; download it again") from error
