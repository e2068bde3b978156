"""Files of questions as they are published: Arrow, Parquet, SNLI's and SuperGLUE's JSON lines, GLUE's tables.

Every reader yields rows in one shape: the task's text columns as the hub names them, and a label that is the id of a
choice (or the gold value of a regression); -1 where there is none.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microlm.errors import UserError
from microlm.evaluation.tasks import ENDINGS, UNLABELLED, Task

Row = dict[str, Any]

# where a published file calls a column otherwise than the hub does: {task: {the hub's name: the file's name}}
_JSON_NAMES = {"snli": {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}}
_MNLI = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}
_TSV_NAMES = {
    "mnli": _MNLI,
    "mnli_mismatched": _MNLI,
    "mrpc": {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    "stsb": {"label": "score"},
    "qqp": {"label": "is_duplicate"},
}
_COLA_HEADER = ("source", "label", "star", "sentence")  # the one table that is published without its header
_NO_LABEL = ("-", "", str(UNLABELLED), None)
_LONGEST_SHOWN = 40


def read_file(task: Task, path: Path) -> list[Row]:
    """The rows of a file whose suffix says what it is: .arrow, .parquet, .jsonl or .tsv.

    Raises:
        UserError: it cannot be read, lacks a column, or a row is not one of `task`; names file, row and mend.
    """
    readers = {".arrow": _arrow, ".parquet": _parquet, ".jsonl": _json_lines, ".tsv": _table}
    names = {".jsonl": _JSON_NAMES, ".tsv": _TSV_NAMES}.get(path.suffix, {}).get(task.name, {})
    try:
        raw = list(readers[path.suffix](task, path))
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not readable as {path.suffix[1:]} ({reason}); replace it by the published file"
        ) from None
    return canonical(task, raw, str(path), names)


def canonical(task: Task, raw: Iterable[Mapping[str, Any]], where: str, names: Mapping[str, str]) -> list[Row]:
    """Check rows of `where` and bring them into the one shape. `names` are the columns that are called otherwise there.

    Raises:
        UserError: a column is missing, a text is none, a label is unknown, or there is no row; names the row from 1.
    """
    rows = []
    for number, row in enumerate(raw, start=1):
        try:
            rows.append({"id": str(number - 1), **_texts(task, row, names), "label": _label(task, row, names)})
        except KeyError as error:
            there = ", ".join(map(str, row))[:200]
            test = (
                "; the test split is published without labels" if error.args[0] == names.get("label", "label") else ""
            )
            raise UserError(
                f"{where}: row {number}: no column {error.args[0]!r}, only {there}{test}; "
                f"give the {task.split} split of {task.name} as it is published"
            ) from None
        except ValueError as error:
            raise UserError(f"{where}: row {number}: {error}; replace the file by the published one") from None
    if not rows:
        raise UserError(f"{where}: holds no row; replace it by the published {task.split} split of {task.name}")
    return rows


def _texts(task: Task, row: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    texts = {column: row[names.get(column, column)] for column in task.columns}
    for column, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{names.get(column, column)!r} holds {_shown(text)}, not text")
    if task.name == "hellaswag":
        endings = row["endings"]
        whole = isinstance(endings, list) and len(endings) == ENDINGS and all(isinstance(e, str) and e for e in endings)
        if not whole or not texts["ctx"]:
            raise ValueError(f"not a context with {ENDINGS} endings")
        texts["endings"] = endings
    return texts


def _label(task: Task, row: Mapping[str, Any], names: Mapping[str, str]) -> int | float:
    """Of a name, a number or a numeral."""
    name = names.get("label", "label")
    label = row[name]
    if label in _NO_LABEL or label == UNLABELLED:
        return UNLABELLED
    if label in task.choices:
        return task.choices.index(label)
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if task.kind == "regression":
        if 0 <= value <= 5:
            return value
        raise ValueError(f"{name!r} is {_shown(label)}, not a number from 0 to 5")
    ids = len(task.choices) or ENDINGS
    if value in range(ids):
        return int(value)
    known = f"{', '.join(task.choices)} or " if task.choices else ""
    raise ValueError(f"{name!r} is {_shown(label)}, not {known}a number from 0 to {ids - 1}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _arrow(task: Task, path: Path) -> list[Row]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        return _columns(task, stream.read_all())


def _parquet(task: Task, path: Path) -> list[Row]:
    return _columns(task, pq.read_table(path))


def _columns(task: Task, table: pa.Table) -> list[Row]:
    wanted = {*task.columns, "label", "endings"}
    return table.select([name for name in table.column_names if name in wanted]).to_pylist()


def _json_lines(task: Task, path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{path}: line {number}: not JSON ({error}); replace it by the published file"
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number}: not a JSON object; replace it by the published file")
            yield row


def _table(task: Task, path: Path) -> Iterator[Row]:
    # utf-8-sig: MRPC's file begins with a byte order mark. Quotation marks are text in all of them
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = _COLA_HEADER if task.name == "cola" else tuple(next(lines, ()))
        for cells in lines:
            if len(cells) != len(header):
                raise UserError(
                    f"{path}: line {lines.line_num}: {len(cells)} columns, not {len(header)}; "
                    f"replace it by GLUE's own table of the {task.split} split"
                )
            yield dict(zip(header, cells))
