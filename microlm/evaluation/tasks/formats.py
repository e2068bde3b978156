"""Files of questions as they are published: Arrow, Parquet, JSON lines, GLUE's tables, AI2's requests.

Every reader yields rows in one shape: the task's text columns as the hub names them, the endings that the question
brings, if it does, and a label that is the id of a choice (or the gold value of a regression); -1 where there is none.
"""

import csv
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microlm.errors import UserError
from microlm.evaluation.tasks.task import UNLABELLED, Task
from microlm.schema import shown

Row = dict[str, Any]

# where a published file calls a column otherwise than the hub does: {the hub's name: the file's name}
_NLI = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}
_NAMES = {
    ("snli", ".jsonl"): _NLI,
    ("mnli", ".tsv"): _NLI,
    ("mnli_mismatched", ".tsv"): _NLI,
    ("mrpc", ".tsv"): {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ("stsb", ".tsv"): {"label": "score"},
    ("qqp", ".tsv"): {"label": "is_duplicate"},
}
_COLA_HEADER = ("source", "label", "star", "sentence")  # the one table that is published without its header
_NO_LABEL = ("-", "", str(UNLABELLED), UNLABELLED, None)


def read_file(task: Task, path: Path) -> list[Row]:
    """The rows of a file whose suffix says what it is: .arrow, .parquet, .jsonl, .tsv, or .gz of AI2's requests.

    Raises:
        UserError: it cannot be read, lacks a column, or a row is not one of `task`; names file, row and mend.
    """
    readers = {".arrow": _columns, ".parquet": _columns, ".jsonl": _json_lines, ".tsv": _table, ".gz": _requests}
    try:
        raw = list(readers[path.suffix](task, path))
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not readable as {path.suffix[1:]} ({reason}); replace it by the published file"
        ) from None
    return canonical(task, raw, str(path), _NAMES.get((task.name, path.suffix), {}))


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
            (column,), there = error.args, ", ".join(map(str, row))[:200]
            test = "; the test split is published without labels" if column == names.get("label", "label") else ""
            raise UserError(
                f"{where}: row {number}: no column {column!r}, only {there}{test}; "
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
            raise ValueError(f"{names.get(column, column)!r} holds {shown(text)}, not text")
    if task.options:
        texts["endings"] = _endings(task, row)
    return texts


def _endings(task: Task, row: Mapping[str, Any]) -> list[str]:
    found = [row[column] for column in task.options]
    if len(found) == 1:  # a list, or one beside the list of its labels
        found = found[0]["text"] if isinstance(found[0], dict) else found[0]
    whole = isinstance(found, list) and len(found) in task.counts and all(isinstance(e, str) and e for e in found)
    if not whole or not row[task.columns[0]]:
        raise ValueError(f"not a context with {' or '.join(map(str, sorted(task.counts)))} endings")
    return found


def _label(task: Task, row: Mapping[str, Any], names: Mapping[str, str]) -> int | float:
    """Of a name, a number or a numeral."""
    if not task.gold:
        return 0
    if task.gold in task.options:
        return task.options.index(task.gold)
    name = names.get(task.gold, task.gold)
    label = row[name]
    if label in _NO_LABEL:
        return UNLABELLED
    listed = row[task.options[0]] if task.options else None
    named = listed["label"] if isinstance(listed, dict) else task.choices  # the row itself may name its endings
    if label in named:
        return named.index(label)
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if task.kind == "regression":
        if 0 <= value <= 5:
            return value
        raise ValueError(f"{name!r} is {shown(label)}, not a number from 0 to 5")
    ids = len(task.choices) or len(_endings(task, row))
    if value - task.first in range(ids):
        return int(value) - task.first
    known = f"{', '.join(named)} or " if named else ""
    raise ValueError(f"{name!r} is {shown(label)}, not {known}a number from {task.first} to {task.first + ids - 1}")


def _columns(task: Task, path: Path) -> list[Row]:
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_stream(path.read_bytes()).read_all()
    wanted = {*task.columns, *task.options, task.gold}
    return table.select([name for name in table.column_names if name in wanted]).to_pylist()


def _json_lines(task: Task, path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{shown(row)} is no object")
            except ValueError as error:
                reason = f"line {number}: not JSON ({error})"
                raise UserError(f"{path}: {reason}; replace it by the published file") from None
            yield row


def _requests(task: Task, path: Path) -> Iterator[Row]:
    """Of the first request of each question; those of a question are numbered from 0."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from (_request_row(task, request) for request in map(json.loads, file) if request["idx"] == 0)


def _request_row(task: Task, request: Mapping[str, Any]) -> Row:
    if task.name == "lambada_openai":
        return {"text": request["request"]["context"] + request["request"]["continuation"]}
    doc = request["doc"]
    passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    return {"passage": passage, "question": question, "label": doc["choices"][doc["gold"]]}


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
