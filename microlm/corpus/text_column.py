"""The text of each row of a file. No other column is typed or, in Parquet, read at all.

People bring files that hold whatever else they keep of a document, and no two rows need agree on that.
"""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, islice
from typing import IO, Any

from microlm.errors import UserError

BATCH_ROWS = 1024
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


class RowError(UserError):
    """What is wrong with a row, counted from 1, or with the file where it is None; who knows its name adds that."""

    def __init__(self, told: str, row: int | None = None) -> None:
        super().__init__(told if row is None else f"row {row}: {told}")


class NoColumn(RowError):
    """Who knows the parameter that names the column adds how to mend it."""


def read_column(kind: str, file: IO[bytes], column: str, skip: int = 0) -> Iterator[list[Any]]:
    """Values of `column` in the rows behind the first `skip`, of whatever type, at most BATCH_ROWS at a time.

    Args:
        kind: parquet; json, an object a line or one list of objects; or text, all of which is one row.

    Raises:
        RowError: a row is no object, or has no such column.
        OSError, ValueError, pyarrow.ArrowException: the file cannot be read.
    """
    return READERS[kind](file, column, skip)


def _parquet(file: IO[bytes], column: str, skip: int) -> Iterator[list[Any]]:
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(file)
    names = opened.schema_arrow.names
    if column not in names:
        raise _no_column(column, names)
    ends = list(accumulate(opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)))
    wanted = [group for group, end in enumerate(ends) if end > skip]  # what lies before is not even fetched
    skip -= ends[wanted[0] - 1] if wanted and wanted[0] else 0
    # group by group, so that batches end at the same rows wherever a run goes on
    for batch in chain.from_iterable(opened.iter_batches(BATCH_ROWS, [group], [column]) for group in wanted):
        if values := batch.column(0).to_pylist()[skip:]:
            yield values
        skip = max(0, skip - len(batch))


def _json(file: IO[bytes], column: str, skip: int) -> Iterator[list[Any]]:
    values = (_value(row, column, number) for number, row in _objects(file, skip))
    while batch := list(islice(values, BATCH_ROWS)):
        yield batch


def _objects(file: IO[bytes], skip: int) -> Iterator[tuple[int, Any]]:
    """Number and content of the rows behind the first `skip`; a blank line is no row."""
    lines = iter(file)
    lines = filter(bytes.strip, chain([next(lines, b"").removeprefix(codecs.BOM_UTF8)], lines))
    first = next(lines, b"")
    if first.lstrip().startswith(b"["):
        yield from islice(enumerate(_parsed(first + b"".join(lines)), start=1), skip, None)
    elif first:
        for number, line in islice(enumerate(chain([first], lines), start=1), skip, None):
            try:
                yield number, _parsed(line)
            except (ValueError, RecursionError) as error:
                raise RowError(f"not readable as json ({error}); mend or remove the row", number) from None


def _parsed(content: bytes) -> Any:
    # bytes that are no UTF-8 may be another column's; in the text they are found as surrogates. A number is no text
    # whatever its value, and Python refuses one of more than 4,300 digits
    return json.loads(content.decode("utf-8", "surrogateescape"), parse_int=len)


def _value(row: Any, column: str, number: int) -> Any:
    if not isinstance(row, dict):
        raise RowError(f"a {type(row).__name__}, not an object; mend or remove the row", number)
    if column not in row:
        raise _no_column(column, list(row), None if number == 1 else number)
    return row[column]


def _text(file: IO[bytes], column: str, skip: int) -> Iterator[list[Any]]:
    if not skip:
        yield [io.TextIOWrapper(file, "utf-8-sig").read()]


def _no_column(column: str, names: list[str], row: int | None = None) -> NoColumn:
    return NoColumn(f"has no column {column!r}, only {', '.join(names)}", row)


READERS: dict[str, Callable[[IO[bytes], str, int], Iterator[list[Any]]]] = {
    "parquet": _parquet,
    "json": _json,
    "text": _text,
}
