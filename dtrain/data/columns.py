"""Columns of CSV and Parquet files, read through pyarrow; what is wrong is told by file, column and row.

Rows are counted as a spreadsheet shows them: the header of a CSV file is row 1; a Parquet file has no header.
"""

import csv
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain import component
from dtrain.data.kept import unreadable
from dtrain.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".pq")


def find(source: str | Sequence[str]) -> list[str]:
    """The files behind `source`: files, folders and globs. Raises `InputError` when one leads to no file."""
    found: list[str] = []
    for pattern in [source] if isinstance(source, str) else source:
        path = os.path.abspath(os.path.expanduser(pattern))
        if os.path.isdir(path):
            some = sorted(os.path.join(path, name) for name in os.listdir(path) if name.lower().endswith(SUFFIXES))
        elif os.path.isfile(path):
            some = [path]
        else:
            some = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not some:
            raise InputError(
                f"data.source: {pattern!r} leads to no file (looked at {path}); name a CSV or Parquet file, or a folder"
                " of them"
            )
        found += some
    for path in found:
        if not path.lower().endswith(SUFFIXES):
            raise InputError(f"data.source: {path} is neither CSV nor Parquet by its name ({', '.join(SUFFIXES)})")
    return found


def resolved(source: str | Sequence[str], folder: Path) -> tuple[str, ...]:
    """Paths as they are from anywhere."""
    paths = [source] if isinstance(source, str) else source
    return tuple(os.path.abspath(folder / Path(path).expanduser()) for path in paths)


def header(path: str) -> list[str]:
    """The names of the columns; reads no more than it must. Raises `InputError` when there are none."""
    if _is_parquet(path):
        try:
            from pyarrow import lib, parquet
        except ImportError as error:
            raise InputError(
                f"data.features: to read them from {path} needs the package 'pyarrow'; install dtrain[train],"
                " or list the features"
            ) from error
        try:
            names = list(parquet.read_schema(path).names)
        except (OSError, lib.ArrowInvalid) as error:
            raise _broken(path, error) from error
    else:
        import gzip

        try:
            opener = gzip.open if path.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
                names = next(csv.reader(stream, delimiter=_delimiter(path)), [])
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            raise _broken(path, error) from error
    if not names:
        raise InputError(f"data.source: {path} is empty; give a file with a header and rows")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"data.source: {path} has more than one column {repeated[0]!r}; give them different names")
    return names


def read(path: str, names: Sequence[str]) -> "Table":
    """Columns of a file. Raises `InputError` when it cannot be read, and what `Table` raises."""
    check(path, names, header(path))
    return Table(path, _read(path, names), 1 if _is_parquet(path) else 2)


def check(where: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises `InputError` for a column that is not there."""
    for name in names:
        if name not in known:
            raise InputError(
                f"data: {where} has no column {name!r}{component.suggestion(name, known)};"
                " name another, or take it out of the job"
            )


class Table:
    """Columns of `where`, whose first row has the number `first`. Raises `InputError` when there is no row."""

    def __init__(self, where: str, columns: "pa.Table", first: int) -> None:
        self._path, self._columns, self._first = where, columns, first
        self.num_rows: int = columns.num_rows
        if not self.num_rows:
            raise InputError(f"data.source: {where} has columns and no row; give it some")

    def numbers(self, name: str, may_miss: bool = False) -> "np.ndarray":
        """A column as numbers, float64 [rows], NaN where one is missing. Raises `InputError` for the first bad cell."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._columns.column(name)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.utf8_trim_whitespace(column)
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
        try:
            values = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            for row, cell in enumerate(column.to_pylist()):
                if cell is not None and not _is_number(cell):
                    raise self._at(name, row, f"has {str(cell)[:40]!r}, which is no number") from error
            raise InputError(
                f"data: column {name!r} of {self._path} holds {column.type}, which are no numbers; leave it out"
            ) from error
        values = np.array(values, dtype=np.float64)
        if np.isinf(values).any():
            raise self._at(name, int(np.flatnonzero(np.isinf(values))[0]), "has an infinite number")
        if not may_miss and np.isnan(values).any():
            raise self._at(name, int(np.flatnonzero(np.isnan(values))[0]), "has no number")
        return values

    def words(self, name: str, may_miss: bool = True) -> list[str]:
        """A column as text, empty where a cell is missing."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._columns.column(name)
        try:
            cells = [cell or "" for cell in pc.cast(column, pa.string()).to_pylist()]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"data: column {name!r} of {self._path} holds {column.type}, which are no words; leave it out"
            ) from error
        if not may_miss and "" in cells:
            raise self._at(name, cells.index(""), "is empty")
        return cells

    def check_order(self, name: str) -> None:
        """Raises `InputError` unless the times (or numbers) in column `name` rise from row to row."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._columns.column(name)
        times = column
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            times = pc.replace_substring_regex(column, r"^(\d{4}-\d{2})$", r"\1-01")  # a month is its first day
        try:
            times = pc.cast(times, pa.timestamp("us")).cast(pa.int64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            times = pa.chunked_array([self.numbers(name)])
        if times.null_count:
            raise self._at(name, times.is_null().to_pylist().index(True), "is empty")
        values = times.to_numpy()
        if (late := np.flatnonzero(values[1:] <= values[:-1])).size:
            row = int(late[0]) + 1
            raise self._at(name, row, f"has {column[row]} after {column[row - 1]}; sort the file by time", advice="")

    def _at(
        self, name: str, row: int, what: str, advice: str = "; correct it, or leave the row or column out"
    ) -> InputError:
        return InputError(f"data: {self._path}, column {name!r}, row {row + self._first} {what}{advice}")


def _read(path: str, names: Sequence[str]) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    try:
        if _is_parquet(path):
            return parquet.read_table(path, columns=list(names))
        return arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(use_threads=False),
            parse_options=arrow_csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True),
            # Cells stay text, so that one that is no number can be shown.
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(names), column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True
            ),
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise _broken(path, error) from error


def _is_parquet(path: str) -> bool:
    return path.lower().endswith((".parquet", ".pq"))


def _delimiter(path: str) -> str:
    return "\t" if ".tsv" in Path(path).name.lower() else ","


def _is_number(cell: object) -> bool:
    try:
        float(str(cell))
    except ValueError:
        return False
    return True


def _broken(path: str, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno:
        return unreadable(path, error)
    return InputError(f"data.source: {path} cannot be read as {'Parquet' if _is_parquet(path) else 'CSV'}: {error}")
